"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864): a query or key at position t is rotated by angles
proportional to t, so that their dot product depends on the distance between them alone.

Feature i is paired with feature i + d/2 (the layout of Llama and Qwen), which keeps exported weights interchangeable.
"""

import torch
from torch import Tensor, nn


class Rope(nn.Module):
    """Rotates x_BHTd, whose first position is `start`, by its positions. One instance serves every layer."""

    def __init__(self, head_dim: int, context: int, theta: float) -> None:
        super().__init__()
        # on the CPU, wherever the model will stand: the same numbers everywhere
        even_d = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
        place_T = torch.arange(context, dtype=torch.float32, device="cpu")
        angle_Td = torch.outer(place_T, theta ** (-even_d / head_dim))
        device = torch.get_default_device()
        self.register_buffer("cos_Td", angle_Td.cos().repeat(1, 2).to(device), persistent=False)
        self.register_buffer("sin_Td", angle_Td.sin().repeat(1, 2).to(device), persistent=False)

    def forward(self, x_BHTd: Tensor, start: int = 0) -> Tensor:
        span = slice(start, start + x_BHTd.shape[2])
        first, second = x_BHTd.chunk(2, dim=-1)
        quarter_turn = torch.cat((-second, first), dim=-1)
        return (x_BHTd * self.cos_Td[span] + quarter_turn * self.sin_Td[span]).to(x_BHTd.dtype)  # type: ignore[index]


class NoRope(nn.Module):
    """Leaves x as it is, for a model whose embedding adds learned positions."""

    def forward(self, x_BHTd: Tensor, start: int = 0) -> Tensor:
        return x_BHTd
