"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864): a query or key at position t is rotated by angles
proportional to t, so that their dot product depends on the distance between them alone.

Feature i is paired with feature i + d/2 (the layout of Llama and Qwen), which keeps exported weights interchangeable.
"""

from typing import Any

import torch
from torch import Tensor, nn


def places(start: int | Tensor, new: int, device: torch.device) -> Tensor:
    """The positions of `new` tokens from `start` on: (T,), or (B, T) for a start of (B,) or of each token, (B, T)."""
    if isinstance(start, int):
        return torch.arange(start, start + new, device=device)
    return start if start.dim() == 2 else start[:, None] + torch.arange(new, device=device)


class Rope(nn.Module):
    """Rotates x_BHTd, whose first position is `start` (a number, or (B,)), by its positions. One instance serves every
    layer."""

    def __init__(self, head_dim: int, context: int, theta: float) -> None:
        super().__init__()
        # on the CPU, wherever the model will stand: the same numbers everywhere
        even_d = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
        place_T = torch.arange(context, dtype=torch.float32, device="cpu")
        angle_Td = torch.outer(place_T, theta ** (-even_d / head_dim))
        device = torch.get_default_device()
        self.register_buffer("cos_Td", angle_Td.cos().repeat(1, 2).to(device), persistent=False)
        self.register_buffer("sin_Td", angle_Td.sin().repeat(1, 2).to(device), persistent=False)

    def forward(self, x_BHTd: Tensor, start: int | Tensor = 0) -> Tensor:
        first, second = x_BHTd.chunk(2, dim=-1)
        quarter_turn = torch.cat((-second, first), dim=-1)
        cos, sin = (self._span(table_Td, start, x_BHTd.shape[2]) for table_Td in (self.cos_Td, self.sin_Td))
        return (x_BHTd * cos + quarter_turn * sin).to(x_BHTd.dtype)

    @staticmethod
    def _span(table_Td: Any, start: int | Tensor, new: int) -> Tensor:
        """The rows of the next positions: (T, d), a view, or (B, 1, T, d)."""
        if isinstance(start, int):
            return table_Td[start : start + new]
        return table_Td[places(start, new, table_Td.device)].unsqueeze(1)


class NoRope(nn.Module):
    """Leaves x as it is, for a model whose embedding adds learned positions."""

    def forward(self, x_BHTd: Tensor, start: int | Tensor = 0) -> Tensor:
        return x_BHTd
