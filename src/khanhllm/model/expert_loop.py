"""The experts of a layer, one after the other, which is fastest on a CPU: what an expert computes stays in the cache.

The arithmetic is that of `experts.py`. Every product writes into memory that was taken before the loop: into its rows
of what the layer keeps or returns, or, for what only one expert needs, into room that all of them use in turn. Fresh
memory for each would wander through the cache and cost as much as a fifth of the products.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from khanhllm.model.activations import Activation
from khanhllm.model.dispatch import gathered_sum, in_sorted_order, refuse_second_derivative, sizes


class LoopMixture(torch.autograd.Function):
    """y_TD = sum over a token's K experts of  weight x down(activation(x @ up + bias, ...)), as in `experts.py`.

    For one pair, with h = activation(x @ up) and g = weight d y:

        d weight = <g @ down', h> / weight      d up = x' (d h)      d down = h' g

    so each expert multiplies rows of D by weights once, those of d y. Neither x nor h is kept. If the activation has a
    degree n, <g @ down', h> is also <x, d x> / n (Euler's theorem on homogeneous functions), a sum over D, not F.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
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
        ctx.activation, ctx.has_bias, ctx.sizes = activation, bias_EF is not None, _sizes(end_E, len(token_N))
        weight_N1 = in_sorted_order(weight_TK, inverse_TK).unsqueeze(1)
        answer_ND = x_TD.new_empty(len(token_N), down.shape[2])
        kept = [x_TD.new_empty(len(token_N), up.shape[2]) for up in ups]
        x_room, hidden_room = _room(x_TD, ctx.sizes, x_TD.shape[1]), _room(x_TD, ctx.sizes, down.shape[1])
        rows = _by_expert(ctx.sizes, token_N, weight_N1, answer_ND, *kept)
        down_of, *ups_of = (matrices.unbind() for matrices in (down, *ups))
        for expert, (size, token_R, weight_R1, answer_RD, *inputs) in enumerate(rows):
            if not size:
                continue
            x_RD = torch.index_select(x_TD, 0, token_R, out=x_room[:size])
            for input_RF, up_of in zip(inputs, ups_of, strict=True):
                torch.mm(x_RD, up_of[expert], out=input_RF)
            if bias_EF is not None:
                inputs[0].add_(bias_EF[expert])
            hidden_RF = activation.value(*map(activation.keep, inputs), out=hidden_room[:size])
            torch.mm(hidden_RF, down_of[expert], out=answer_RD).mul_(weight_R1)
        ctx.save_for_backward(x_TD, weight_N1, token_N, inverse_TK, down, *ups, *kept)
        return gathered_sum(answer_ND, inverse_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative()
        x_TD, weight_N1, token_N, inverse_TK, down, *rest = ctx.saved_tensors
        ups, kept, degree = rest[: len(rest) // 2], rest[len(rest) // 2 :], ctx.activation.degree
        x_grad_ND, weight_grad_N = x_TD.new_empty(len(token_N), x_TD.shape[1]), torch.empty_like(weight_N1[:, 0])
        down_grad, *up_grads = (torch.empty_like(matrices) for matrices in (down, *ups))
        bias_grad = up_grads[0].new_empty(len(down), down.shape[1]) if ctx.has_bias else None
        x_room, grad_room = (_room(x_TD, ctx.sizes, x_TD.shape[1]) for _ in range(2))
        hidden_room, slope_room = (_room(x_TD, ctx.sizes, down.shape[1]) for _ in range(2))
        rows = _by_expert(ctx.sizes, token_N, weight_N1, x_grad_ND, weight_grad_N, *kept)
        down_of, *ups_of = (matrices.mT.unbind() for matrices in (down, *ups))
        down_grad_of, *up_grads_of = (matrices.unbind() for matrices in (down_grad, *up_grads))
        for expert, (size, token_R, weight_R1, x_grad_RD, weight_grad_R, *inputs) in enumerate(rows):
            x_RD = torch.index_select(x_TD, 0, token_R, out=x_room[:size])
            grad_RD = torch.index_select(grad_TD, 0, token_R, out=grad_room[:size]).mul_(weight_R1)
            hidden_RF = ctx.activation.value(*inputs, out=hidden_room[:size])
            torch.mm(hidden_RF.T, grad_RD, out=down_grad_of[expert])
            slope_RF = torch.mm(grad_RD, down_of[expert], out=slope_room[:size])
            if not degree:
                torch.sum(hidden_RF.mul_(slope_RF), -1, dtype=weight_N1.dtype, out=weight_grad_R)
            slopes = ctx.activation.gradients(slope_RF, *inputs)
            for nth, (slope_RF, up_of, up_grad_of) in enumerate(zip(slopes, ups_of, up_grads_of, strict=True)):
                torch.mm(x_RD.T, slope_RF, out=up_grad_of[expert])
                torch.addmm(x_grad_RD, slope_RF, up_of[expert], beta=min(nth, 1), out=x_grad_RD)
            if degree:
                torch.sum(x_RD.mul_(x_grad_RD), -1, dtype=weight_N1.dtype, out=weight_grad_R)
            if bias_grad is not None:
                torch.sum(slopes[0], 0, out=bias_grad[expert])
        # a weight of zero is too small for a float, and the gradient of its probability zero whatever stands here
        weight_grad_N.div_(weight_N1[:, 0].masked_fill(weight_N1[:, 0] == 0, 1).mul_(degree or 1))
        x_grad = gathered_sum(x_grad_ND, inverse_TK)
        return None, x_grad, weight_grad_N[inverse_TK], None, None, None, down_grad, bias_grad, *up_grads


def _sizes(end_E: Tensor, pairs: int) -> list[int]:
    """How many rows each expert has. Planning computes with tensors without numbers: there all have as many."""
    numbers = type(end_E) is Tensor
    return sizes(end_E.tolist() if numbers else [pairs * nth // len(end_E) for nth in range(1, len(end_E) + 1)])


def _by_expert(counts: list[int], *wholes: Tensor) -> Iterator[tuple[Any, ...]]:
    """For each expert, its number of rows and its rows of each tensor."""
    return zip(counts, *(whole.split(counts) for whole in wholes), strict=True)


def _room(like: Tensor, counts: list[int], width: int) -> Tensor:
    """Memory for the rows of any one expert."""
    return like.new_empty(max(counts), width)
