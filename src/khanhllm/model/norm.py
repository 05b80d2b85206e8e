"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467): each vector divided by its root mean square, times a gain.

On a CPU PyTorch differentiates it through every operation that it consists of. As one operation it takes half the time
and keeps half as much for the backward pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _RMSNorm(torch.autograd.Function):
    """y = w n with n = x / s and s = sqrt(mean(x^2) + eps), along the last axis. For a gradient g of y,

    d w = sum of g n      d x = (w g - n mean(w g n)) / s
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:  # type: ignore[override]
        scale = (x * x).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        normed = x * scale
        return normed if weight is None else normed.mul_(weight)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        x, scale, weight = ctx.saved_tensors
        normed = x * scale
        x_grad = grad.clone() if weight is None else grad * weight
        mean = (x_grad * normed).mean(-1, keepdim=True)
        x_grad.addcmul_(normed, mean, value=-1).mul_(scale)
        weight_grad = None if weight is None else normed.mul_(grad).sum_to_size(weight.shape)
        return x_grad, weight_grad, None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x (..., D), weight (D,) -> (..., D)."""
    exact = x.dtype == torch.float32 and (weight is None or weight.dtype == torch.float32)
    if x.device.type == "cpu" and exact and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return]
    return F.rms_norm(x, x.shape[-1:], weight, eps)


class RMSNorm(nn.RMSNorm):
    """The norm of a layer, or of each head's queries or keys, with a learned gain."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)
