"""Who updates what, where several processes train one model (Rajbhandari et al. 2020, arXiv 1910.02054, stage 1).

Every process has all weights. Once a step the gradients of a parameter are summed on its *owner*, in the order of the
ranks. The owner alone keeps its moments and updates it, whole, and then gives it to the others. So each optimizer stays
what it is, and with one micro-batch on each process a step has the bits that it has on one.

Where experts lie on several processes (parted.py), each process has one part of a stack of them. The owner of a part is
one of those that hold it, and only they take part in what is said here of "all".
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from khanhllm.errors import UserError, first_line
from khanhllm.machine.devices import out_of_memory
from khanhllm.machine.group import Group, Move, added
from khanhllm.schema import TrainConfig

LARGEST = 2**24
"""numbers that are on their way to a process at one time. An owner keeps the gradients of all others until it adds
them, so the more others there are, the less of each parameter comes at one time"""
Result = TypeVar("Result")
Held = TypeVar("Held", bound=tuple[Any, ...])
"""a parameter, and what belongs to it"""
Kinds = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
Shapes = Mapping[nn.Parameter, Kinds]
Takers = Mapping[nn.Parameter, int]
"""which process each parameter is for; those that it does not name are for the first"""
FIRST: Takers = MappingProxyType({})


class Apart(UserError):
    """The processes hold different weights, which only an error of the hardware explains."""

    exit_code = 76


class Piece(NamedTuple):
    """A parameter, or one part of a stack of experts."""

    parameter: nn.Parameter
    """on each process; of a stack, that has there the part which it holds, and all parts have one shape"""
    holders: range
    """the processes that have it"""
    owner: int

    def is_part(self, group: Group) -> bool:
        """Whether others of the group hold other parts."""
        return len(self.holders) < group.size

    @property
    def others(self) -> list[int]:
        """The holders but the owner."""
        return [rank for rank in self.holders if rank != self.owner]


class Owners:
    """The owner of each parameter, or of each part of one. A process alone owns all of them."""

    waited_for = False
    """whether the others need this process while they run the model"""

    def __init__(self, parameters: Iterable[nn.Parameter], group: Group, cut: Container[nn.Parameter] = ()) -> None:
        self.group = group
        everyone, parts = [range(group.size)], [group.holders(nth) for nth in range(group.parts)]
        held = [(one, holders) for one in parameters for holders in (parts if one in cut else everyone)]
        owners = dealt([one.numel() for one, _ in held], group.size, [holders for _, holders in held])
        self.pieces = [Piece(*each, owner) for each, owner in zip(held, owners, strict=True)]
        self.mine = {piece.parameter for piece in self.pieces if piece.owner == group.rank}

    def collect(self) -> None:
        """Sum each parameter's gradients on its owner; they disappear elsewhere."""
        if self.group.alone:
            return
        rank = self.group.rank
        held: dict[nn.Parameter, Tensor] = {}
        for parameter in (piece.parameter for piece in self.pieces if rank in piece.holders):
            gradient = parameter.grad
            if gradient is None:
                gradient = torch.zeros_like(parameter, dtype=parameter.grad_dtype)  # type: ignore[attr-defined]
            parameter.grad = gradient.contiguous()
            held[parameter] = parameter.grad.view(-1)
        for spans in in_rounds(self.pieces, LARGEST // (self.group.size - 1)):
            grads = [(held[piece.parameter][numbers], piece) for piece, numbers in spans]
            moves = [Move(grad, giver, piece.owner) for grad, piece in grads for giver in piece.others]
            arrived = iter(self.group.move(moves))
            for grad, (_, holders, owner) in grads:
                parts: list[Any] = [grad if giver == owner else next(arrived) for giver in holders]
                if owner == rank:
                    grad.copy_(added(parts))
        for parameter, holders, owner in self.pieces:
            if rank in holders and owner != rank:
                parameter.grad = None

    def clip(self, longest: float) -> Tensor:
        """Scale the collected gradients so that all of them together are no longer than this, and return how long they
        were."""
        if self.group.alone:
            return torch.nn.utils.clip_grad_norm_([piece.parameter for piece in self.pieces], longest)
        norms_P = torch.zeros(len(self.pieces), device=self.pieces[0].parameter.device)
        own = [nth for nth, piece in enumerate(self.pieces) if piece.owner == self.group.rank]
        if own:
            norms = torch._foreach_norm([self.pieces[nth].parameter.grad for nth in own])  # type: ignore[misc]
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
        if self.group.alone:
            return
        whole, parts = ([piece for piece in self.pieces if piece.is_part(self.group) is kind] for kind in (False, True))
        self.group.spread([piece.parameter.data for piece in whole], [piece.owner for piece in whole])
        takers = [(piece, taker) for piece in parts for taker in piece.others]
        arrived = self.group.move([Move(piece.parameter.data, piece.owner, taker) for piece, taker in takers])
        for (piece, _), came in zip(takers, arrived, strict=True):
            if came is not None:
                piece.parameter.data.copy_(came)

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Raise Apart unless these have the same bits on all processes, as far as the sums of their bits tell. It reads
        the weights once and sends two numbers of each."""
        if self.group.alone:
            return
        sums = torch.stack([_sum_of_bits(tensor) for tensor in weights.values()])
        halves = torch.stack([sums >> 32, sums & 2**32 - 1])  # fp64 holds them exactly
        first, *others = self.group.exchange(*halves.flatten().tolist())
        for rank, other in enumerate(others, start=1):
            pairs = zip([*weights, *weights], first, other, strict=True)
            if name := next((name for name, here, there in pairs if here != there), ""):
                raise Apart(
                    f"{name} has other bits on process {rank} than on process 0: a card, memory or a link has failed; "
                    "they are not saved, and --resume goes on from the last checkpoint"
                )

    def takers(self) -> Takers:
        """Who writes each parameter where every process writes its part of a checkpoint: its owner, or of a stack that
        lies in parts whoever would own it whole."""
        sizes: dict[nn.Parameter, int] = {}
        for piece in self.pieces:
            sizes[piece.parameter] = sizes.get(piece.parameter, 0) + piece.parameter.numel()
        return dict(zip(sizes, dealt([*sizes.values()], self.group.size), strict=True))

    def weights(self, model: nn.Module, takers: Takers = FIRST) -> dict[str, Tensor]:
        """The weights that this process takes, by name. What is no parameter the first one takes."""
        taker_of = {name: takers.get(parameter, 0) for name, parameter in self.named(model)}
        return {name: t for name, t in model.state_dict().items() if taker_of.get(name, 0) == self.group.rank}

    def named(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """The optimizer's parameters, by the names that they have in the model."""
        return model.named_parameters()

    def led(self, make: Callable[[], Result]) -> Result:
        """What `make` returns on the first process, which alone calls it and may ask the model; see `Group.told`."""
        return self.group.told(make)

    def final(self, error: RuntimeError, train: TrainConfig) -> Exception | None:
        """What the run ends with if computing a gradient failed on this process; None if all can begin it again. They
        cannot where the others wait inside the model for this process's part of it."""
        if not self.waited_for:
            return None
        first = first_line(error)[:200]
        if out_of_memory(error):
            rows = train.rows
            fewer = next((part for part in range(rows // 2, 0, -1) if rows % part == 0), 0)
            cut = f"--train.micro_batch {fewer} --train.accumulation {train.rows_per_step // fewer}" if fewer else ""
            way = cut or "--machine.checkpointing full"
            return UserError(f"out of memory with a micro-batch of {rows}; go on with --resume {way}")
        if isinstance(error, torch._dynamo.exc.TorchDynamoException):
            return UserError(f"torch.compile does not work here: {first}; take --machine.compile off")
        return error

    def gathered(
        self,
        state: Mapping[Any, dict[str, Any]],
        shapes: Shapes,
        whole: Shapes | None = None,
        takers: Takers = FIRST,
    ) -> Mapping[Any, dict[str, Any]]:
        """The optimizer's state: numbers of all parameters, tensors of those that this process takes.

        shapes: type and shape of each tensor in it. whole: those that it has on a process alone.
        """
        if self.group.alone:
            return state
        mine = [(nth, one.parameter) for nth, one in enumerate(self.pieces) if one.owner == self.group.rank]
        own = {nth: state[parameter] for nth, parameter in mine if state.get(parameter)}
        told = self.group.heard({nth: _numbers(kept) for nth, kept in own.items()})
        numbers = {int(nth): values for part in told for nth, values in part.items()}
        found: dict[nn.Parameter, list[dict[str, Any]]] = {}
        for nth, piece in enumerate(self.pieces):
            taker, kept = takers.get(piece.parameter, 0), own.get(nth) or numbers.get(nth, {})
            if nth in numbers and piece.owner != taker:
                kept = numbers[nth] | self._handed(kept, shapes[piece.parameter], piece.owner, taker)
            found.setdefault(piece.parameter, []).append(kept)
        whole = whole or shapes
        return {p: _joined(parts, shapes[p], whole[p]) if len(parts) > 1 else parts[0] for p, parts in found.items()}

    def _handed(self, kept: Mapping[str, Any], kinds: Kinds, owner: int, taker: int) -> dict[str, Tensor]:
        """The tensors that the owner of a piece keeps for it, on the process that takes them."""
        gives = self.group.rank == owner
        like = [kept[key].cpu() if gives else torch.empty(shape, dtype=dtype) for key, (dtype, shape) in kinds.items()]
        arrived = self.group.move([Move(tensor, owner, taker) for tensor in like])
        return {key: tensor for key, tensor in zip(kinds, arrived, strict=True) if tensor is not None}


def dealt(sizes: list[int], hands: int, holders: Sequence[range] = ()) -> list[int]:
    """Whom each item goes to: from the largest on, whoever has least so far; of equals the first. holders: for each
    item, who may have it, if not all."""
    has, owner = [0] * hands, [0] * len(sizes)
    for nth in sorted(range(len(sizes)), key=lambda nth: -sizes[nth]):
        owner[nth] = min(holders[nth] if holders else range(hands), key=has.__getitem__)
        has[owner[nth]] += sizes[nth]
    return owner


def in_rounds(pieces: Iterable[Piece], room: int) -> list[list[tuple[Piece, slice]]]:
    """All numbers of the pieces, in rounds in which each owner gets the next `room` of its own."""
    rounds: dict[int, list[tuple[Piece, slice]]] = defaultdict(list)
    before: Counter[int] = Counter()
    for piece in pieces:
        start, size = before[piece.owner], piece.parameter.numel()
        before[piece.owner] += size
        for nth in range(start // room, -(-(start + size) // room)):
            rounds[nth].append((piece, slice(max(0, nth * room - start), min(size, (nth + 1) * room - start))))
    return [rounds[nth] for nth in sorted(rounds)]


def in_buckets(held: Iterable[Held]) -> Iterator[list[Held]]:
    """The same in their order, at most `LARGEST` numbers of parameters at a time, or one parameter."""
    bucket: list[Held] = []
    numbers = 0
    for one in held:
        size = one[0].numel()
        if bucket and numbers + size > LARGEST:
            yield bucket
            bucket, numbers = [], 0
        bucket.append(one)
        numbers += size
    yield bucket


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """As 64-bit integers, so that the order of the sum does not matter."""
    bytes_N = tensor.detach().flatten().view(torch.uint8)
    whole = len(bytes_N) // 8 * 8
    return bytes_N[:whole].view(torch.int64).sum() + bytes_N[whole:].sum()


def _numbers(kept: Mapping[str, Any]) -> dict[str, Any]:
    """What is no tensor in it."""
    return {key: value for key, value in kept.items() if not isinstance(value, Tensor)}


def _joined(parts: list[dict[str, Any]], shapes: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept for a stack, made of what is kept for each of its parts."""
    torn = {key for key, kind in shapes.items() if kind != whole[key]}
    first, *_ = parts
    return {key: torch.cat([part[key].cpu() for part in parts]) if key in torn else first[key] for key in first}
