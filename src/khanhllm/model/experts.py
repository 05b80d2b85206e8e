"""The experts of a layer as stacked matrices (E, in, out), applied to rows that are sorted by expert.

Forward and backward need two products only: each row times the matrix of its expert (`grouped_mm`), and for each
expert the transpose of its rows times other rows of the same expert (`grouped_mm_wgrad`, the gradient of a matrix). A
`Backend` computes both for all experts, with shapes that do not depend on the routing, as a GPU and a compiler need.
The loop over experts is the fastest on a CPU, where one expert after the other does all of its work (`expert_loop.py`).
`machine/` chooses; tests check that all backends agree.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from khanhllm.model.activations import GELU, RELU2, SWIGLU, Activation
from khanhllm.model.dispatch import dispatch, gathered_sum, in_sorted_order, refuse_second_derivative, sizes
from khanhllm.model.expert_loop import LoopMixture
from khanhllm.model.router import Choice

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


class Backend(NamedTuple):
    """The two products that experts need."""

    grouped_mm: Product
    """(x_NI, weight_EIO, end_E) -> (N, O). Rows are sorted by expert, `end_E` says where each one's end (int32)."""
    grouped_mm_wgrad: Product
    """(x_NI, y_NO, end_E) -> (E, I, O), zeros for an expert without rows."""


# Custom operators, so that the compiler sees two results of known shape, not the loop, which reads the load. `define`
# instead of `custom_op`, because the first call of the latter imports the compiler even for those who never compile.
torch.library.define("khanhllm::loop_grouped_mm", "(Tensor x_NI, Tensor weight_EIO, Tensor end_E) -> Tensor")
torch.library.define("khanhllm::loop_grouped_mm_wgrad", "(Tensor x_NI, Tensor y_NO, Tensor end_E) -> Tensor")


@torch.library.impl("khanhllm::loop_grouped_mm", "default")
def _loop_grouped_mm(x_NI: Tensor, weight_EIO: Tensor, end_E: Tensor) -> Tensor:
    out_NO = x_NI.new_empty(len(x_NI), weight_EIO.shape[2])
    counts = sizes(end_E.tolist())
    for x_RI, weight_IO, out_RO in zip(x_NI.split(counts), weight_EIO, out_NO.split(counts), strict=True):
        torch.mm(x_RI, weight_IO, out=out_RO)
    return out_NO


@torch.library.impl("khanhllm::loop_grouped_mm_wgrad", "default")
def _loop_grouped_mm_wgrad(x_NI: Tensor, y_NO: Tensor, end_E: Tensor) -> Tensor:
    out_EIO = x_NI.new_empty(len(end_E), x_NI.shape[1], y_NO.shape[1])
    counts = sizes(end_E.tolist())
    for x_RI, y_RO, out_IO in zip(x_NI.split(counts), y_NO.split(counts), out_EIO, strict=True):
        torch.mm(x_RI.T, y_RO, out=out_IO)
    return out_EIO


@torch.library.register_fake("khanhllm::loop_grouped_mm")  # type: ignore[untyped-decorator]
def _(x_NI: Tensor, weight_EIO: Tensor, end_E: Tensor) -> Tensor:
    return x_NI.new_empty(len(x_NI), weight_EIO.shape[2])


@torch.library.register_fake("khanhllm::loop_grouped_mm_wgrad")  # type: ignore[untyped-decorator]
def _(x_NI: Tensor, y_NO: Tensor, end_E: Tensor) -> Tensor:
    return x_NI.new_empty(len(end_E), x_NI.shape[1], y_NO.shape[1])


def _torch_grouped_mm(x_NI: Tensor, weight_EIO: Tensor, end_E: Tensor) -> Tensor:
    return F.grouped_mm(x_NI, weight_EIO, offs=end_E)


def _torch_grouped_mm_wgrad(x_NI: Tensor, y_NO: Tensor, end_E: Tensor) -> Tensor:
    return F.grouped_mm(x_NI.T, y_NO, offs=end_E)


LOOP = Backend(torch.ops.khanhllm.loop_grouped_mm.default, torch.ops.khanhllm.loop_grouped_mm_wgrad.default)
GROUPED = Backend(_torch_grouped_mm, _torch_grouped_mm_wgrad)


class _Mixture(torch.autograd.Function):
    """y_TD = sum over a token's K experts of  weight x down(activation(x @ up + bias, ...)).

    For one pair, with h = activation(x @ up),

        y = weight (h @ down)      d weight = <d y @ down', h>

    so neither the answer nor the gathered x nor h is kept for the backward pass; x and h are cheap to compute again
    (Guo et al. 2025, arXiv 2512.14080). Weights multiply rows of D, which are shorter than those of F.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        backend: Backend,
        activation: Activation,
        x_TD: Tensor,
        weight_TK: Tensor,
        token_N: Tensor,
        inverse_TK: Tensor,
        end_E: Tensor,
        down: Tensor,
        bias_EF: Tensor | None,
        *ups: Tensor,
    ) -> Tensor:
        weight_N1 = in_sorted_order(weight_TK, inverse_TK).unsqueeze(1)
        x_ND = x_TD.index_select(0, token_N)
        inputs = [backend.grouped_mm(x_ND, up, end_E) for up in ups]
        if bias_EF is not None:
            inputs[0] = torch.addmm(inputs[0], _one_hot(end_E, x_ND), bias_EF)
        kept = [activation.keep(input_NF) for input_NF in inputs]
        answer_ND = backend.grouped_mm(activation.value(*kept), down, end_E).mul_(weight_N1)
        ctx.backend, ctx.activation, ctx.has_bias, ctx.ups = backend, activation, bias_EF is not None, len(ups)
        ctx.save_for_backward(x_TD, weight_N1, token_N, inverse_TK, end_E, down, *ups, *kept)
        return gathered_sum(answer_ND, inverse_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative()
        x_TD, weight_N1, token_N, inverse_TK, end_E, down, *rest = ctx.saved_tensors
        backend, ups, kept = ctx.backend, rest[: ctx.ups], rest[ctx.ups :]
        hidden_NF, grad_ND = ctx.activation.value(*kept), grad_TD.index_select(0, token_N)
        slope_NF = backend.grouped_mm(grad_ND, down.mT, end_E)  # d y @ down'
        down_grad = backend.grouped_mm_wgrad(hidden_NF, grad_ND.mul_(weight_N1), end_E)
        weight_grad_N = hidden_NF.mul_(slope_NF).sum(-1, dtype=weight_N1.dtype)
        del hidden_NF, grad_ND
        slopes = ctx.activation.gradients(slope_NF, *kept)
        del slope_NF
        x_grad_ND, *more = (backend.grouped_mm(slope, up.mT, end_E) for slope, up in zip(slopes, ups, strict=True))
        for part in more:
            x_grad_ND.add_(part)
        x_ND = x_TD.index_select(0, token_N).mul_(weight_N1)
        bias_grad = _one_hot(end_E, x_ND).mul_(weight_N1).T @ slopes[0] if ctx.has_bias else None
        up_grads = [backend.grouped_mm_wgrad(x_ND, slope, end_E) for slope in slopes]
        x_grad = gathered_sum(x_grad_ND.mul_(weight_N1), inverse_TK)
        return None, None, x_grad, weight_grad_N[inverse_TK], None, None, None, down_grad, bias_grad, *up_grads


def mixture(backend: Backend, *arguments: Any) -> Tensor:
    """The weighted answers of the chosen experts, (T, D). A compiler needs shapes that it knows, so for it the loop is
    inside each product."""
    if backend is LOOP and not torch.compiler.is_compiling():
        return LoopMixture.apply(*arguments)  # type: ignore[no-any-return]
    return _Mixture.apply(backend, *arguments)  # type: ignore[no-any-return]


def _one_hot(end_E: Tensor, like_ND: Tensor) -> Tensor:
    """(N, E): which expert each sorted row belongs to. A product with it adds biases; its transpose sums gradients."""
    row_N = torch.arange(len(like_ND), device=end_E.device).unsqueeze(1)
    return ((row_N < end_E) & (row_N >= end_E - end_E.diff(prepend=end_E.new_zeros(1)))).to(like_ND.dtype)


class GeluExperts(nn.Module):
    """E times down(gelu(up(x))), with biases."""

    def __init__(self, experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(experts, dim, hidden))
        self.up_bias = nn.Parameter(torch.empty(experts, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, dim))
        self.down_bias = nn.Parameter(torch.empty(experts, dim))
        self.backend = LOOP

    def forward(self, x_TD: Tensor, choice: Choice, load_E: Tensor) -> Tensor:
        x_TD, up, up_bias, down, down_bias = in_one_type(x_TD, self.up, self.up_bias, self.down, self.down_bias)
        where = dispatch(choice.expert_TK, load_E)
        y_TD = mixture(self.backend, GELU, x_TD, choice.weight_TK, *where, down, up_bias, up)
        none_TE = x_TD.new_zeros(len(x_TD), len(load_E))
        weight_TE = none_TE.scatter(1, choice.expert_TK, choice.weight_TK.to(x_TD.dtype))
        return y_TD + weight_TE @ down_bias


class Relu2Experts(nn.Module):
    """E times down(relu(up(x))^2), without biases."""

    def __init__(self, experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(experts, dim, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, dim))
        self.backend = LOOP

    def forward(self, x_TD: Tensor, choice: Choice, load_E: Tensor) -> Tensor:
        x_TD, up, down = in_one_type(x_TD, self.up, self.down)
        where = dispatch(choice.expert_TK, load_E)
        return mixture(self.backend, RELU2, x_TD, choice.weight_TK, *where, down, None, up)


class SwiGLUExperts(nn.Module):
    """E times down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(experts, dim, hidden))
        self.up = nn.Parameter(torch.empty(experts, dim, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, dim))
        self.backend = LOOP

    def forward(self, x_TD: Tensor, choice: Choice, load_E: Tensor) -> Tensor:
        x_TD, gate, up, down = in_one_type(x_TD, self.gate, self.up, self.down)
        where = dispatch(choice.expert_TK, load_E)
        return mixture(self.backend, SWIGLU, x_TD, choice.weight_TK, *where, down, None, gate, up)


def in_one_type(*tensors: Tensor) -> list[Tensor]:
    """Cast as autocast would, which does not reach into our own autograd functions."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensors[0].dtype
    return [tensor.to(dtype) for tensor in tensors]
