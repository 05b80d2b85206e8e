"""Token-expert pairs on their way to the experts and back: sorted by expert, so that each expert's are one run of rows.

Both ways are gathers, forward and backward, so no sum depends on the order in which threads finish.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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


def sizes(ends: list[int]) -> list[int]:
    """How many rows lie between one end and the next, for `Tensor.split`."""
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def refuse_second_derivative() -> None:
    """RuntimeError in a backward that autograd is to record, which cannot look inside."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("a mixture of experts has no second derivative")


def in_sorted_order(weight_TK: Tensor, inverse_TK: Tensor) -> Tensor:
    """The weight of each pair, in sorted order: (N,)."""
    weight_N = weight_TK.flatten()
    return torch.empty_like(weight_N).scatter_(0, inverse_TK.flatten(), weight_N)


def gathered_sum(x_ND: Tensor, inverse_TK: Tensor) -> Tensor:
    """Row t is the sum of the rows inverse_TK[t]."""
    return F.embedding_bag(inverse_TK, x_ND, mode="sum")
