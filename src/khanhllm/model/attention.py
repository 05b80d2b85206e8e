"""Causal self-attention (Vaswani et al. 2017, arXiv 1706.03762) through PyTorch's scaled-dot-product attention, with
grouped key and value heads (Ainslie et al. 2023, arXiv 2305.13245) where the config asks for fewer of them.

    x ──┬── query ── norm ── rotate ──┐
        ├── key ──── norm ── rotate ──┼── softmax(q·k / sqrt d) · v ── out
        └── value ────────────────────┘         no position sees a later one
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from khanhllm.model.cache import LayerCache
from khanhllm.schema import ModelConfig


class Attention(nn.Module):
    """Causal self-attention; groups of query heads may share a key and value head."""

    def __init__(self, config: ModelConfig, rope: nn.Module, head_norm: type[nn.Module], bias: bool) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        shared = config.key_value_heads * config.head_dim
        self.query = nn.Linear(config.dim, config.dim, bias=bias)
        self.key = nn.Linear(config.dim, shared, bias=bias)
        self.value = nn.Linear(config.dim, shared, bias=bias)
        self.out = nn.Linear(config.dim, config.dim, bias=bias)
        self.query_norm = head_norm(config.head_dim, eps=config.norm_eps)
        self.key_norm = head_norm(config.head_dim, eps=config.norm_eps)
        self.rope = rope
        self.grouped = config.key_value_heads != config.heads

    def forward(
        self,
        x_BTD: Tensor,
        past: LayerCache | None = None,
        own_BTS: Tensor | None = None,
        mask_BHTS: Tensor | None = None,
    ) -> Tensor:
        """x_BTD -> (B, T, D). With `past`, x holds the positions that follow those in it, and is appended to it.

        own_BTS: what each token itself adds to the values (value embedding), S = kv_heads x d. mask_BHTS: which
        positions each query sees, if not all before it; see `same_document`.
        """
        start = past.start if past else 0
        query_BHTd = self.rope(self.query_norm(self._heads(self.query(x_BTD))), start)
        key_BHTd = self.rope(self.key_norm(self._heads(self.key(x_BTD))), start)
        value_BTS = self.value(x_BTD)
        value_BHTd = self._heads(value_BTS if own_BTS is None else value_BTS + own_BTS)
        mask, is_causal = (mask_BHTS, False) if mask_BHTS is not None else _causal(past, x_BTD.shape[1], x_BTD.device)
        if past:
            key_BHTd, value_BHTd = past.append(key_BHTd, value_BHTd)
        out_BHTd = F.scaled_dot_product_attention(
            query_BHTd, key_BHTd, value_BHTd, attn_mask=mask, is_causal=is_causal, enable_gqa=self.grouped
        )
        return self.out(out_BHTd.transpose(1, 2).flatten(2))

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def same_document(place_BT: Tensor, x_BTD: Tensor) -> Tensor:
    """The mask of rows of several documents, which do not see each other: (B, 1, T, T), 0 or -inf, to be added to the
    scores. In the type of the scores of x, because any other would be converted, and kept, by every layer.

    place_BT: the position of each token in its own document. RoPE may go on counting through the row: only distances
    matter to it.
    """
    device = x_BTD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_BTD.dtype
    here_T = torch.arange(place_BT.shape[1], device=place_BT.device)
    first_BT = here_T - place_BT
    seen_BTT = (here_T >= first_BT[:, :, None]) & (here_T <= here_T[:, None])
    return torch.zeros_like(seen_BTT, dtype=dtype).masked_fill_(~seen_BTT, -torch.inf).unsqueeze(1)


def _causal(past: LayerCache | None, new: int, device: torch.device) -> tuple[Tensor | None, bool]:
    """Mask and `is_causal` flag for `new` queries that follow `past`.

    The flag aligns its mask at the top left, so it is right only without a past. A single new query sees everything.
    """
    if past and past.mask_BHTS is not None:
        return past.mask_BHTS, False
    start = past.length if past else 0
    if start == 0 or new == 1:
        return None, start == 0
    return torch.ones(new, start + new, dtype=torch.bool, device=device).tril(start), False
