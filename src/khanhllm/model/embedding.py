"""Token ids to vectors. classic adds a learned vector for each position; modern leaves positions to Rope."""

import torch
from torch import Tensor, nn


class TokenEmbedding(nn.Module):
    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, dim)

    def forward(self, ids_BT: Tensor, start: int = 0) -> Tensor:
        """ids_BT -> (B, T, D); `start` is the position of the first id."""
        return self.token(ids_BT)


class ValueEmbedding(nn.Module):
    """A second table for every other layer, the last one among them: what the token itself adds to attention's values
    (Zhou et al. 2024, arXiv 2410.17897, in the form of https://github.com/KellerJordan/modded-nanogpt)."""

    def __init__(self, layers: int, vocab_size: int, size: int) -> None:
        super().__init__()
        having = [layer for layer in range(layers) if (layers - 1 - layer) % 2 == 0]
        self.tables = nn.ModuleDict({str(layer): nn.Embedding(vocab_size, size) for layer in having})

    def forward(self, ids_BT: Tensor, layer: int) -> Tensor | None:
        """(B, T, S), or None for a layer without a table."""
        return self.tables[str(layer)](ids_BT) if str(layer) in self.tables else None


class TokenPositionEmbedding(nn.Module):
    def __init__(self, vocab_size: int, dim: int, context: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, dim)
        self.position = nn.Embedding(context, dim)

    def forward(self, ids_BT: Tensor, start: int = 0) -> Tensor:
        position_T = torch.arange(start, start + ids_BT.shape[1], device=ids_BT.device)
        return self.token(ids_BT) + self.position(position_T)
