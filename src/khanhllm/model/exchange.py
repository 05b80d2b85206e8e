"""Experts on several processes (Lepikhin et al. 2020, arXiv 2006.16668): each holds an equal part of every mixture
layer's experts, and the pairs of tokens and experts travel to where the expert is, and back.

    sorted by expert   e0 e0 e0 │ e1 ║ e2 e2 │ e3 e3      on each process; experts lie in order, so do their places
                       └─ stay or go to 0 ─┘└─ to 1 ─┘
    on process 1       e2 e2 │ e3 e3 ║ e2 │ e3            what comes from 0, then what comes from 1

The processes first tell each other how many pairs come, so none is dropped, however uneven the load. The experts then
compute what came as tokens with one expert each. The backward pass travels the same ways in the other direction.
Nothing here knows how tensors travel: `Swap` is an argument.
"""

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from khanhllm.model.dispatch import Dispatch, dispatch, gathered_sum, in_sorted_order
from khanhllm.model.experts import in_one_type
from khanhllm.model.moe import MoE
from khanhllm.model.router import Choice

Swap = Callable[[Tensor, list[int], list[int]], Tensor]
"""(rows, how many of them go to each process, how many come from each) -> the rows that come, by process"""
Result = TypeVar("Result")


class Part(NamedTuple):
    """What a process holds: the nth of so many equal parts of each stack of experts."""

    nth: int = 0
    of: int = 1

    def cuts(self, name: str) -> bool:
        """Whether the parameter of this name is a stack of experts that is cut into parts."""
        return self.of > 1 and "experts" in name.split(".")

    def shapes(self, model: nn.Module) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of each tensor of the whole of a model that has this part."""
        found = {}
        for name, tensor in model.state_dict().items():
            shape = tuple(tensor.shape)
            found[name] = tensor.dtype, ((shape[0] * self.of, *shape[1:]) if self.cuts(name) else shape)
        return found

    def slice(self, whole: Tensor) -> Tensor:
        """The part of a stack, or of what an optimizer keeps for it."""
        return whole.chunk(self.of)[self.nth].clone()

    def weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a whole model's state is for the model of this part."""
        return {name: self.slice(tensor) if self.cuts(name) else tensor for name, tensor in state.items()}

    def counts(self, model: nn.Module) -> dict[nn.Parameter, int]:
        """Of each parameter that is cut: into how many parts."""
        return {parameter: self.of for name, parameter in model.named_parameters() if self.cuts(name)}


WHOLE = Part()


class Way(NamedTuple):
    """How the pairs of one forward travel."""

    swap: Swap
    sent: list[int]
    """pairs that go to each process"""
    came: list[int]
    """pairs that come from each"""


class _ToExperts(torch.autograd.Function):
    """(T, D) tokens and (T, K) weights here -> (M, D) and (M,) of the pairs that are for experts of this process."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, way: Way, where: Dispatch, x_TD: Tensor, weight_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.way = way
        ctx.save_for_backward(where.inverse_TK)
        pairs = x_TD.index_select(0, where.token_N), in_sorted_order(weight_TK, where.inverse_TK)
        x_MD, weight_M = (way.swap(tensor, way.sent, way.came) for tensor in pairs)
        return x_MD, weight_M

    @staticmethod
    def backward(ctx: Any, *grads_M: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (inverse_TK,) = ctx.saved_tensors
        x_grad_ND, weight_grad_N = (ctx.way.swap(grad_M, ctx.way.came, ctx.way.sent) for grad_M in grads_M)
        return None, None, gathered_sum(x_grad_ND, inverse_TK), weight_grad_N[inverse_TK]


class _FromExperts(torch.autograd.Function):
    """(M, D) answers of the experts of this process -> (T, D), the sum of the answers for each token here."""

    @staticmethod
    def forward(ctx: Any, way: Way, where: Dispatch, y_MD: Tensor) -> Tensor:  # type: ignore[override]
        ctx.way = way
        ctx.save_for_backward(where.token_N)
        return gathered_sum(way.swap(y_MD, way.came, way.sent), where.inverse_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (token_N,) = ctx.saved_tensors
        return None, None, ctx.way.swap(grad_TD.index_select(0, token_N), ctx.way.sent, ctx.way.came)


class Exchange:
    """The answer of a mixture layer whose experts lie on several processes, all of which call it at once."""

    def __init__(self, experts: nn.Module, part: Part, swap: Swap) -> None:
        self.experts, self.part, self.swap = experts, part, swap

    def __call__(self, x_TD: Tensor, choice: Choice, load_E: Tensor) -> Tensor:
        where, (x_TD,) = dispatch(choice.expert_TK, load_E), in_one_type(x_TD)
        came_PE, way = self.shared_out(load_E)
        x_MD, weight_M = _ToExperts.apply(way, where, x_TD, choice.weight_TK)
        return _FromExperts.apply(way, where, self._answer(x_MD, weight_M, came_PE))  # type: ignore[no-any-return]

    def shared_out(self, load_E: Tensor) -> tuple[Tensor, Way]:
        """(P, E / P): the pairs that each process sends to each expert here; and their way."""
        load_PE = load_E.long().view(self.part.of, -1)
        came_PE = self._told(load_PE)
        return came_PE, Way(self.swap, *torch.stack([load_PE.sum(1), came_PE.sum(1)]).tolist())  # waits for the device

    def _told(self, load_PE: Tensor) -> Tensor:
        each_once = [1] * self.part.of
        return self.swap(load_PE, each_once, each_once)

    def _answer(self, x_MD: Tensor, weight_M: Tensor, came_PE: Tensor) -> Tensor:
        """The weighted answers of the experts here to what came."""
        if not len(x_MD):  # no kernel must bear it, but the gradient's way back begins here
            return x_MD * weight_M.to(x_MD.dtype).unsqueeze(1)
        expert_PE = torch.arange(came_PE.shape[1], device=came_PE.device).expand_as(came_PE)
        expert_M = expert_PE.flatten().repeat_interleave(came_PE.flatten(), output_size=len(x_MD))
        return self.experts(x_MD, Choice(expert_M.unsqueeze(1), weight_M.unsqueeze(1)), came_PE.sum(0))  # type: ignore[no-any-return]

    def serve(self) -> bool:
        """Let the experts here answer the first process, while this one has no tokens. False if it said `end`."""
        came_PE = self._told(self._pairs(0))
        if came_PE[0, 0] < 0:
            return False
        nothing, came = [0] * self.part.of, came_PE.sum(1).tolist()
        rows = *in_one_type(self._down.new_empty(0, self._down.shape[2])), torch.empty(0, device=self._down.device)
        x_MD, weight_M = (self.swap(tensor, nothing, came) for tensor in rows)
        self.swap(self._answer(x_MD, weight_M, came_PE), came, nothing)
        return True

    def end(self) -> None:
        """Say that no more pairs come."""
        self._told(self._pairs(-1))

    def _pairs(self, count: int) -> Tensor:
        return torch.full((self.part.of, len(self._down)), count, device=self._down.device)

    @property
    def _down(self) -> Tensor:
        return self.experts.down  # type: ignore[return-value]


def spread(model: nn.Module, part: Part, swap: Swap, kind: type[Exchange] = Exchange) -> tuple[Exchange, ...]:
    """Leave only a part of the experts in the model, and let its mixture layers ask the others for the rest."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    for layer in layers:
        for parameter in layer.experts.parameters():
            parameter.data = part.slice(parameter.data)
    exchanges = tuple(kind(layer.experts, part, swap) for layer in layers)
    for layer, exchange in zip(layers, exchanges, strict=True):
        layer.answer = exchange  # type: ignore[method-assign]
    return exchanges


def lead(exchanges: Sequence[Exchange], make: Callable[[], Result]) -> Result:
    """What `make` returns, which calls the model on the first process alone, while the others `serve`."""
    try:
        return make()
    finally:
        exchanges[0].end()


@torch.no_grad()
def serve(exchanges: Sequence[Exchange]) -> None:
    """Answer the first process, layer after layer, until it calls the model no more."""
    for exchange in cycle(exchanges):
        if not exchange.serve():
            return
