"""Token ids to vectors. classic adds a learned vector for each position; modern leaves positions to Rope."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from khanhllm.model.norm import rms_norm
from khanhllm.model.rope import places

MIX = 0x9E3779B97F4A7C15 - 2**64
"""2^64 divided by the golden ratio: products with it are spread evenly (Knuth, TAOCP 3, section 6.4)"""


def _table(size: int, dim: int) -> nn.Embedding:
    """An embedding whose numbers come later, from `Transformer.initialise` or a checkpoint. PyTorch's own constructor
    draws them, which on the meta device would import its compiler."""
    return nn.Embedding.from_pretrained(torch.empty(size, dim), freeze=False)


class TokenEmbedding(nn.Module):
    """A vector for each token; normed, its root mean square is 1. With `pairs`, a vector for its pair with the token
    before is added; pairs whose hashes agree share one (Cheng et al. 2026, arXiv 2601.07372; norm and pairs as in
    https://github.com/KellerJordan/modded-nanogpt).

    Adam lets the vectors of tokens grow with every step. Unless they are normed, they soon outweigh what the layers add
    to them.
    """

    def __init__(self, vocab_size: int, dim: int, pairs: int, normed: bool = False, eps: float = 0) -> None:
        super().__init__()
        self.normed, self.eps = normed, eps
        self.token = _table(vocab_size, dim)
        self.pair = _table(pairs, dim) if pairs else None

    def forward(self, ids_BT: Tensor, start: int | Tensor = 0, before_B1: Tensor | None = None) -> Tensor:
        """ids_BT -> (B, T, D); `start` is the position of the first id, one number or (B,), or that of each id in its
        own document, (B, T); before_B1 the ids before the first, if any."""
        x_BTD = self.token(ids_BT)
        if self.normed:
            x_BTD = rms_norm(x_BTD, None, self.eps)
        if self.pair is None:
            return x_BTD  # type: ignore[no-any-return]
        first_B1 = torch.zeros_like(ids_BT[:, :1]) if before_B1 is None else before_B1
        before_BT = torch.cat((first_B1, ids_BT[:, :-1]), dim=1)
        if isinstance(start, Tensor) and start.dim() == 2:
            before_BT = before_BT.masked_fill(start == 0, 0)  # as at the beginning of a row
        hash_BT = ((before_BT << 24) + ids_BT) * MIX >> 16
        return x_BTD + self.pair(hash_BT % self.pair.num_embeddings)  # type: ignore[no-any-return]


class ValueEmbedding(nn.Module):
    """A second table for some layers: what the token itself adds to attention's values (Zhou et al. 2024,
    arXiv 2410.17897, in the form of https://github.com/KellerJordan/modded-nanogpt).

    normed: divided by the root mean square of the layer's input x, as the norm divides x. The vectors are then features
    of the residual stream that nothing writes and only these values read; see `as_wider` in export/encode.py.
    """

    def __init__(self, layers: Sequence[int], vocab_size: int, size: int, normed: bool, eps: float) -> None:
        super().__init__()
        self.normed, self.eps = normed, eps
        self.tables = nn.ModuleDict({str(layer): _table(vocab_size, size) for layer in layers})

    def forward(self, ids_BT: Tensor, layer: int, x_BTD: Tensor) -> Tensor | None:
        """(B, T, S), or None for a layer without a table."""
        if str(layer) not in self.tables:
            return None
        own_BTS: Tensor = self.tables[str(layer)](ids_BT)
        if not self.normed:
            return own_BTS
        scale_BT1 = torch.rsqrt(x_BTD.float().square().mean(-1, keepdim=True) + self.eps)
        return own_BTS * scale_BT1.to(own_BTS.dtype)


class StreamScale(nn.Module):
    """The input of a layer: (1 + a) x, with a learned number per layer that starts at zero. The norms behind it do not
    see it; it decides how much what layers write counts beside what was in the stream before them."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.stream_L = nn.Parameter(torch.empty(layers))

    def forward(self, x_BTD: Tensor, embedding_BTD: Tensor, layer: int) -> Tensor:
        return (1 + self.stream_L[layer]) * x_BTD


class EmbeddingSkip(StreamScale):
    """The input of a layer: (1 + a) x + b embedding, with two learned numbers per layer that start at zero
    (https://github.com/KellerJordan/modded-nanogpt)."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers)
        self.embedding_L = nn.Parameter(torch.empty(layers))

    def forward(self, x_BTD: Tensor, embedding_BTD: Tensor, layer: int) -> Tensor:
        return super().forward(x_BTD, embedding_BTD, layer) + self.embedding_L[layer] * embedding_BTD


class NoSkip(nn.Module):
    """Leaves the input of a layer as it is."""

    def forward(self, x_BTD: Tensor, embedding_BTD: Tensor, layer: int) -> Tensor:
        return x_BTD


class TokenPositionEmbedding(nn.Module):
    """A vector for each token plus one for each position."""

    def __init__(self, vocab_size: int, dim: int, context: int) -> None:
        super().__init__()
        self.token = _table(vocab_size, dim)
        self.position = _table(context, dim)

    def forward(self, ids_BT: Tensor, start: int | Tensor = 0, before_B1: Tensor | None = None) -> Tensor:
        return self.token(ids_BT) + self.position(places(start, ids_BT.shape[1], ids_BT.device))
