"""The experts of a layer as stacked matrices (E, in, out), applied to rows that are sorted by expert.

Forward and backward need two products only: each row times the matrix of its expert (`grouped_mm`), and for each
expert the transpose of its rows times other rows of the same expert (`grouped_mm_wgrad`, the gradient of a matrix). A
`Backend` computes both. The loop over experts defines what is right and is the fastest on a CPU, where one expert after
the other does all of its work, so that its rows stay in the cache. torch's grouped_mm has shapes that do not depend on
the routing, as a GPU and a compiler need. `machine/` chooses; tests check that all backends agree.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    for expert, rows in enumerate(_slices(end_E.tolist())):
        torch.mm(x_NI[rows], weight_EIO[expert], out=out_NO[rows])
    return out_NO


@torch.library.impl("khanhllm::loop_grouped_mm_wgrad", "default")
def _loop_grouped_mm_wgrad(x_NI: Tensor, y_NO: Tensor, end_E: Tensor) -> Tensor:
    out_EIO = x_NI.new_empty(len(end_E), x_NI.shape[1], y_NO.shape[1])
    for expert, rows in enumerate(_slices(end_E.tolist())):
        torch.mm(x_NI[rows].T, y_NO[rows], out=out_EIO[expert])
    return out_EIO


def _slices(ends: list[int]) -> list[slice]:
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


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


ONE = Backend(lambda x_NI, weight_1IO, _: x_NI @ weight_1IO[0], lambda x_NI, y_NO, _: (x_NI.T @ y_NO)[None])
"""for a stack of one expert"""
LOOP = Backend(torch.ops.khanhllm.loop_grouped_mm.default, torch.ops.khanhllm.loop_grouped_mm_wgrad.default)
GROUPED = Backend(_torch_grouped_mm, _torch_grouped_mm_wgrad)


class Dispatch(NamedTuple):
    """The places of the N = T x K token-expert pairs after they are sorted by expert."""

    token_N: Tensor
    """the token of each sorted pair"""
    inverse_TK: Tensor
    """the sorted place of each token's k-th pair"""
    end_E: Tensor
    """where each expert's pairs end (int32)"""


def dispatch(expert_TK: Tensor, load_E: Tensor) -> Dispatch:
    """Sort the token-expert pairs by expert."""
    order_N = expert_TK.flatten().argsort(stable=True)
    place_N = torch.arange(len(order_N), device=order_N.device)
    inverse_N = torch.empty_like(order_N).scatter_(0, order_N, place_N)
    return Dispatch(order_N // expert_TK.shape[1], inverse_N.view_as(expert_TK), load_E.cumsum(0).to(torch.int32))


class Activation(NamedTuple):
    """An activation function and its gradients."""

    value: Callable[..., Tensor]
    """(*kept_NF) -> value_NF"""
    gradients: Callable[..., tuple[Tensor, ...]]
    """(grad_NF, *kept_NF) -> the gradient of each input; grad_NF may be overwritten"""
    keep: Callable[[Tensor], Tensor] = lambda input_NF: input_NF
    """input_NF -> kept_NF, what the backward pass needs of it; input_NF may be overwritten"""


def _swiglu_gradients(grad_NF: Tensor, gate_NF: Tensor, up_NF: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(grad_NF * up_NF, gate_NF), grad_NF * F.silu(gate_NF)


def _gelu_gradients(grad_NF: Tensor, up_NF: Tensor) -> tuple[Tensor]:
    return (torch.ops.aten.gelu_backward(grad_NF, up_NF),)


SWIGLU = Activation(lambda gate_NF, up_NF: F.silu(gate_NF) * up_NF, _swiglu_gradients)
GELU = Activation(F.gelu, _gelu_gradients)
RELU2 = Activation(torch.square, lambda grad_NF, relu_NF: (grad_NF.mul_(relu_NF).mul_(2),), keep=torch.relu_)


class Portion(NamedTuple):
    """Experts that work together, and their sorted rows."""

    rows: slice
    experts: slice
    end_E: Tensor
    """where the rows of each of these experts end"""
    backend: Backend


def portions(backend: Backend, end_E: Tensor, pairs: int, idle: bool = True) -> list[Portion]:
    """All experts at once; with the loop, one after the other, `idle` ones too. A compiler needs shapes that it knows,
    so for it the loop is inside each product. Planning computes with tensors without numbers: there all experts get as
    many rows."""
    if backend is not LOOP or torch.compiler.is_compiling():
        return [Portion(slice(None), slice(None), end_E, backend)]
    experts = len(end_E)
    ends = end_E.tolist() if type(end_E) is Tensor else [pairs * nth // experts for nth in range(1, experts + 1)]
    return [
        Portion(rows, slice(expert, expert + 1), end_E.new_full((1,), rows.stop - rows.start), ONE)
        for expert, rows in enumerate(_slices(ends))
        if idle or rows.start < rows.stop
    ]


class _Mixture(torch.autograd.Function):
    """y_TD = sum over a token's K experts of  weight x down(activation(x @ up + bias, ...)).

    Permuting tokens to their experts and un-permuting the answers are gathers in both directions, so no sum
    depends on the order in which threads finish. For one pair, with h = activation(x @ up),

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
        answers, kept = [], []
        for rows, experts, end, products in portions(backend, end_E, len(token_N), idle=any(ctx.needs_input_grad)):
            x_ND = x_TD.index_select(0, token_N[rows])
            inputs = [products.grouped_mm(x_ND, up[experts], end) for up in ups]
            if bias_EF is not None:
                inputs[0] = torch.addmm(inputs[0], _one_hot(end, x_ND), bias_EF[experts])
            inputs = [activation.keep(input_NF) for input_NF in inputs]
            answer_ND = products.grouped_mm(activation.value(*inputs), down[experts], end)
            answers.append(answer_ND.mul_(weight_N1[rows]))
            kept += inputs
        ctx.backend, ctx.activation, ctx.has_bias, ctx.ups = backend, activation, bias_EF is not None, len(ups)
        ctx.save_for_backward(x_TD, weight_N1, token_N, inverse_TK, end_E, down, *ups, *kept)
        return gathered_sum(_joined(answers or [x_TD[:0]]), inverse_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph: autograd cannot look inside
            raise RuntimeError("a mixture of experts has no second derivative")
        x_TD, weight_N1, token_N, inverse_TK, end_E, down, *rest = ctx.saved_tensors
        ups, kept = rest[: ctx.ups], rest[ctx.ups :]
        parts = []
        for portion in portions(ctx.backend, end_E, len(token_N)):
            token, weight = token_N[portion.rows], weight_N1[portion.rows]
            rows = x_TD.index_select(0, token), grad_TD.index_select(0, token), weight
            matrices = [matrix[portion.experts] for matrix in (down, *ups)]
            own, kept = kept[: ctx.ups], kept[ctx.ups :]
            parts.append(_gradients(ctx.activation, portion, rows, matrices, own, ctx.has_bias))
        x_grad, weight_grad, *grads = map(_joined, zip(*parts, strict=True))
        return None, None, gathered_sum(x_grad, inverse_TK), weight_grad[inverse_TK], None, None, None, *grads


def _gradients(
    activation: Activation,
    portion: Portion,
    sorted_rows: tuple[Tensor, Tensor, Tensor],
    matrices: list[Tensor],
    kept: list[Tensor],
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, *tuple[Tensor, ...]]:
    """The gradients of x, of the weights, of down, of the bias and of the ups. slope_NF is d y @ down'."""
    (_, _, end_E, backend), (x_ND, grad_ND, weight_N1), (down, *ups) = portion, sorted_rows, matrices
    hidden_NF = activation.value(*kept)
    slope_NF = backend.grouped_mm(grad_ND, down.mT, end_E)
    down_grad = backend.grouped_mm_wgrad(hidden_NF, grad_ND.mul_(weight_N1), end_E)
    weight_grad_N = hidden_NF.mul_(slope_NF).sum(-1, dtype=weight_N1.dtype)
    del hidden_NF
    slopes = activation.gradients(slope_NF, *kept)
    del slope_NF
    x_grad_ND, *more = (backend.grouped_mm(slope, up.mT, end_E) for slope, up in zip(slopes, ups, strict=True))
    for part in more:
        x_grad_ND.add_(part)
    bias_grad = _one_hot(end_E, x_ND).mul_(weight_N1).T @ slopes[0] if has_bias else None
    x_ND.mul_(weight_N1)
    up_grads = [backend.grouped_mm_wgrad(x_ND, slope, end_E) for slope in slopes]
    return x_grad_ND.mul_(weight_N1), weight_grad_N, down_grad, bias_grad, *up_grads


def _joined(parts: Sequence[Any]) -> Any:
    """Tensors of all portions in one, or None."""
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(list(parts))


def in_sorted_order(weight_TK: Tensor, inverse_TK: Tensor) -> Tensor:
    """The weight of each pair, in sorted order: (N,)."""
    weight_N = weight_TK.flatten()
    return torch.empty_like(weight_N).scatter_(0, inverse_TK.flatten(), weight_N)


def gathered_sum(x_ND: Tensor, inverse_TK: Tensor) -> Tensor:
    """Row t is the sum of the rows inverse_TK[t]."""
    return F.embedding_bag(inverse_TK, x_ND, mode="sum")


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
        y_TD = _Mixture.apply(self.backend, GELU, x_TD, choice.weight_TK, *where, down, up_bias, up)
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
        return _Mixture.apply(self.backend, RELU2, x_TD, choice.weight_TK, *where, down, None, up)  # type: ignore[no-any-return]


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
        return _Mixture.apply(self.backend, SWIGLU, x_TD, choice.weight_TK, *where, down, None, gate, up)  # type: ignore[no-any-return]


def in_one_type(*tensors: Tensor) -> list[Tensor]:
    """Cast as autocast would, which does not reach into our own autograd functions."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensors[0].dtype
    return [tensor.to(dtype) for tensor in tensors]
