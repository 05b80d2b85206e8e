"""Who updates what, where several processes train one model (Rajbhandari et al. 2020, arXiv 1910.02054, stage 1).

Every process has all weights. Once a step the gradients of a parameter are summed on its *owner*, in the order of the
ranks. The owner alone keeps its moments and updates it, whole, and then gives it to the others. So each optimizer stays
what it is, and with one micro-batch on each process a step has the bits that it has on one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from khanhllm.errors import UserError
from khanhllm.machine.group import Group, Move
from khanhllm.schema import TrainConfig

LARGEST = 2**24
"""numbers whose gradients are under way at one time, as the owner keeps those of all processes until it adds them"""
Result = TypeVar("Result")
Shapes = Mapping[nn.Parameter, Mapping[str, tuple[torch.dtype, tuple[int, ...]]]]


class Apart(UserError):
    """The processes hold different weights, which only an error of the hardware explains."""

    exit_code = 76


class Owners:
    """The owner of each parameter. A process alone owns all of them."""

    def __init__(self, parameters: Iterable[nn.Parameter], group: Group) -> None:
        self.parameters, self.group = list(parameters), group
        self.owner = dealt([parameter.numel() for parameter in self.parameters], group.size)
        own = zip(self.parameters, self.owner, strict=True)
        self.mine = {parameter for parameter, owner in own if owner == group.rank}

    def collect(self) -> None:
        """Sum each parameter's gradients on its owner; they disappear elsewhere."""
        if self.group.alone:
            return
        ranks = range(self.group.size)
        for bucket in self._buckets():
            for parameter, _ in bucket:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)  # type: ignore[attr-defined]
            grads: list[Any] = [(parameter.grad, owner) for parameter, owner in bucket]
            moves = [Move(grad, rank, owner) for grad, owner in grads for rank in ranks if rank != owner]
            arrived = iter(self.group.move(moves))
            for parameter, owner in bucket:
                parts: list[Any] = [parameter.grad if rank == owner else next(arrived) for rank in ranks]
                parameter.grad = _added(parts) if parameter in self.mine else None

    def clip(self, longest: float) -> Tensor:
        """Scale the collected gradients so that all of them together are no longer than this, and return how long they
        were."""
        if self.group.alone:
            return torch.nn.utils.clip_grad_norm_(self.parameters, longest)
        norms_P = torch.zeros(len(self.parameters), device=self.parameters[0].device)
        own = [nth for nth, parameter in enumerate(self.parameters) if parameter in self.mine]
        if own:
            norms = torch._foreach_norm([self.parameters[nth].grad for nth in own])  # type: ignore[misc]
            norms_P[own] = torch.stack(norms).float()
        total = torch.linalg.vector_norm(*self.group.sum(norms_P))  # as torch does it
        torch.nn.utils.clip_grads_with_norm_(self.mine, longest, total)
        return total

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer update this process's parameters, and give them to all others."""
        optimizer.step()
        self.spread()

    def spread(self) -> None:
        """Give every process the parameters that their owners have updated."""
        if not self.group.alone:
            self.group.spread([parameter.data for parameter in self.parameters], self.owner)

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Raise Apart unless these have the same bits on all processes, as far as the sums of their bits tell. It reads
        the weights once and sends a number of each."""
        if self.group.alone:
            return
        sums = torch.stack([_sum_of_bits(tensor) for tensor in weights.values()]) & 2**53 - 1  # what fp64 holds exactly
        first, *others = self.group.exchange(*sums.tolist())
        for rank, other in enumerate(others, start=1):
            differs = (name for name, *pair in zip(weights, first, other, strict=True) if pair[0] != pair[1])
            if name := next(differs, ""):
                raise Apart(
                    f"{name} has other bits on process {rank} than on process 0: a card, memory or a link has failed; "
                    "they are not saved, and --resume goes on from the last checkpoint"
                )

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """All weights by name, on the first process."""
        return model.state_dict()

    def named(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """The optimizer's parameters, by the names that they have in the model."""
        return model.named_parameters()

    def led(self, make: Callable[[], Result]) -> Result:
        """What `make` returns on the first process, which alone calls it and may ask the model; see `Group.told`."""
        return self.group.told(make)

    def final(self, error: RuntimeError, train: TrainConfig) -> Exception | None:
        """What the run ends with if computing a gradient failed on this process; None if all can begin it again."""
        return None

    def gathered(self, state: Mapping[Any, dict[str, Any]], shapes: Shapes) -> Mapping[Any, dict[str, Any]]:
        """The optimizer's state of all parameters, on the first process; elsewhere it is not whole.

        shapes: type and shape of each tensor in it.
        """
        if self.group.alone:
            return state
        numbers = {
            nth: {key: value for key, value in state[parameter].items() if not isinstance(value, Tensor)}
            for nth, parameter in enumerate(self.parameters)
            if parameter in self.mine and state.get(parameter)
        }
        known = {int(nth): values for part in self.group.heard(numbers) for nth, values in part.items()}
        keys = [(nth, key, *shapes[self.parameters[nth]][key]) for nth in known for key in shapes[self.parameters[nth]]]
        away = [entry for entry in keys if self.owner[entry[0]] != 0]
        moves = [
            Move(
                state[self.parameters[nth]][key].cpu()
                if self.parameters[nth] in self.mine
                else torch.empty(shape, dtype=dtype),
                self.owner[nth],
                0,
            )
            for nth, key, dtype, shape in away
        ]
        arrived = self.group.move(moves)
        for (nth, key, *_), tensor in zip(away, arrived, strict=True):
            known[nth][key] = tensor
        return {p: state[p] if p in self.mine else known.get(nth, {}) for nth, p in enumerate(self.parameters)}

    def _buckets(self) -> Iterator[list[tuple[nn.Parameter, int]]]:
        bucket: list[tuple[nn.Parameter, int]] = []
        for pair in zip(self.parameters, self.owner, strict=True):
            if bucket and sum(p.numel() for p, _ in bucket) + pair[0].numel() > LARGEST:
                yield bucket
                bucket = []
            bucket.append(pair)
        yield bucket


def dealt(sizes: list[int], hands: int) -> list[int]:
    """Whom each item goes to: from the largest on, whoever has least so far; of equals the first."""
    has, owner = [0] * hands, [0] * len(sizes)
    for nth in sorted(range(len(sizes)), key=lambda nth: -sizes[nth]):
        owner[nth] = min(range(hands), key=has.__getitem__)
        has[owner[nth]] += sizes[nth]
    return owner


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """As 64-bit integers, so that the order of the sum does not matter."""
    bytes_N = tensor.detach().flatten().view(torch.uint8)
    whole = len(bytes_N) // 8 * 8
    return bytes_N[:whole].view(torch.int64).sum() + bytes_N[whole:].sum()


def _added(parts: list[Tensor]) -> Tensor:
    """The sum from the first on, as gradients add up over micro-batches."""
    total, *others = parts
    for other in others:
        total += other
    return total
