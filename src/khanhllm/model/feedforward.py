"""The dense feed-forwards. Each returns (y, ()), because a dense layer routes nothing; so what a router heeds beside x
does not concern it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class GeluFeedForward(nn.Module):
    """down(gelu(up(x))), with biases."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x_BTD: Tensor, *_routing: Tensor | None) -> tuple[Tensor, tuple[()]]:
        return self.down(F.gelu(self.up(x_BTD))), ()


class _Relu2(torch.autograd.Function):
    """relu(x)^2. On the way back it goes over the memory twice, where torch's two functions do so four times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        relu = F.relu(x)
        ctx.save_for_backward(relu)
        return relu.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (relu,) = ctx.saved_tensors
        return (grad * relu).mul_(2)


class Relu2FeedForward(nn.Module):
    """down(relu(up(x))^2), without biases (So et al. 2021, arXiv 2109.08668)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x_BTD: Tensor, *_routing: Tensor | None) -> tuple[Tensor, tuple[()]]:
        return self.down(_Relu2.apply(self.up(x_BTD))), ()


class SwiGLUFeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x_BTD: Tensor, *_routing: Tensor | None) -> tuple[Tensor, tuple[()]]:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD)), ()
