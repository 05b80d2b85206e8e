"""The activation functions of experts, with gradients that may overwrite what they are given."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """An activation function and its gradients."""

    value: Callable[..., Tensor]
    """(*kept_NF) -> value_NF, which may lie in `out`"""
    gradients: Callable[..., tuple[Tensor, ...]]
    """(grad_NF, *kept_NF) -> the gradient of each input; grad_NF may be overwritten"""
    keep: Callable[[Tensor], Tensor] = lambda input_NF: input_NF
    """input_NF -> kept_NF, what the backward pass needs of it, in the same memory"""
    degree: int = 0
    """value(c input) = c^degree value(input) for c > 0, or 0 if there is no such degree"""


def _swiglu_gradients(grad_NF: Tensor, gate_NF: Tensor, up_NF: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(grad_NF * up_NF, gate_NF), grad_NF * F.silu(gate_NF)


def _gelu_gradients(grad_NF: Tensor, up_NF: Tensor) -> tuple[Tensor]:
    return (torch.ops.aten.gelu_backward(grad_NF, up_NF),)


def _swiglu(gate_NF: Tensor, up_NF: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.mul(F.silu(gate_NF), up_NF, out=out)


def _gelu(up_NF: Tensor, out: Tensor | None = None) -> Tensor:
    return F.gelu(up_NF)


def _relu2_gradients(grad_NF: Tensor, relu_NF: Tensor) -> tuple[Tensor]:
    return (grad_NF.mul_(relu_NF).mul_(2),)


SWIGLU = Activation(_swiglu, _swiglu_gradients)
GELU = Activation(_gelu, _gelu_gradients)
RELU2 = Activation(torch.square, _relu2_gradients, keep=torch.relu_, degree=2)
