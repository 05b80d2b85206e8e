"""The processes that train one model together, and all that they say to each other.

A process learns from its environment that others work beside it: `launch` and torchrun set RANK, WORLD_SIZE and what
leads to the others. One without them is alone, and nothing here then does or costs anything.

Numbers are summed in the order of the ranks, so that a sum has the same bits on every process and each time. What is
not a tensor travels as JSON: torch's collectives of objects would unpickle, and so run, what any process of the network
sends. No other file imports torch.distributed, but for FSDP in sharded.py.
"""

import getpass
import json
import os
import tempfile
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count, cycle, islice
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from khanhllm.errors import UserError, first_line
from khanhllm.model.exchange import Part
from khanhllm.schema import MachineConfig

STORE = "KHANHLLM_STORE"
"""names the file through which the processes that `launch` starts find each other"""
LEFT_OVER = "unset WORLD_SIZE and RANK to train without torchrun, or start the processes with torchrun"
CALLED_OFF = "called off"
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""the newer name, and that before torch 2.13"""
SMALL = 2**15
"""numbers in a tensor that takes less time to send than the message around it"""
OPENED = count()
"""groups that this process was part of: each has keys of its own in the store"""
Result = TypeVar("Result")
Way = TypeVar("Way", bound=Hashable)


class Lost(UserError):
    """Another process is gone, or does not answer."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: --resume goes on


class Told(UserError):
    """What the first process met and the user can put right; the others end with it."""


class Move(NamedTuple):
    """A tensor that one process gives to another. `tensor` is what it is, or on the others only what it is like."""

    tensor: Tensor
    giver: int
    taker: int


@dataclass(frozen=True)
class Group:
    """The processes of one training."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """among those on this machine"""
    local_size: int = 1
    shares: tuple[int, ...] = (1,)
    """micro-batches of each process in one round"""
    patience: float = 600.0
    """seconds"""
    store: Store | None = None
    direct: bool = False
    """whether tensors go from card to card; if not, through the host's memory"""
    parts: int = 1
    """of each layer's experts, one on each of so many neighbours"""
    neighbours: Any = None
    """torch's name for those who hold the other parts; None stands for all processes"""
    _tales: list[str] = field(default_factory=list)
    """the keys of what was told so far"""

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def part(self) -> Part:
        """The experts that this process holds."""
        return Part(self.rank % self.parts, self.parts)

    def holders(self, nth: int) -> range:
        """The processes that hold the nth part of the experts."""
        return range(nth, self.size, self.parts)

    def turns(self, micro_batches: int) -> list[bool]:
        """Whether each micro-batch of a step is this process's: they are dealt round by round, by shares."""
        dealt = cycle([rank for rank, share in enumerate(self.shares) for _ in range(share)])
        return [rank == self.rank for rank in islice(dealt, micro_batches)]

    def exchange(self, *numbers: float) -> list[tuple[float, ...]]:
        """The numbers of every process, in the order of the ranks."""
        if self.alone:
            return [numbers]
        return [tuple(row.tolist()) for row in self._gathered(torch.tensor(numbers, dtype=torch.float64))]

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        """The sum of each tensor over all processes, in the order of their ranks."""
        if self.alone:
            return list(tensors)
        parts = _parted(added(self._gathered(_joined(tensors))), tensors)
        return [part.to(like.dtype) for part, like in zip(parts, tensors, strict=True)]

    def told(self, make: Callable[[], Result]) -> Result:
        """What `make` returns on the first process, which alone calls it: something that JSON can hold. It may take
        its time. A UserError there is raised on all."""
        if self.store is None:
            return make()
        key = f"told {len(self._tales)}"
        if not self.leads:
            with self._answered():
                result = self._hear(key)
        else:
            with self._beating(key):
                result = make()
            with self._answered():
                self.store.set(key, json.dumps({"result": result}))
        self._tales.append(key)
        return result  # type: ignore[no-any-return]

    def tell_the_end(self, error: UserError) -> None:
        """Answer with an error whoever waits to be told something."""
        if self.leads and self.store is not None:
            said = {"error": str(error), "code": error.exit_code}
            with suppress(RuntimeError):  # where the store has gone too, the others notice
                self.store.set(f"told {len(self._tales)}", json.dumps(said))

    def _hear(self, key: str) -> Any:
        assert self.store
        beats = 0
        while not self.store.check([key]):
            with suppress(RuntimeError):  # it took its time
                self.store.wait([key], timedelta(seconds=self.patience))
                break
            before, beats = beats, self.store.add(f"{key} beats", 0)
            if beats == before:
                raise self._lost()
        said = json.loads(self.store.get(key))
        if "error" in said:
            raise Told(said["error"], said["code"])
        return said["result"]

    @contextmanager
    def _beating(self, key: str) -> Iterator[None]:
        """Show the others that this process lives, while they wait."""
        done, store = Event(), self.store
        assert store

        def beat() -> None:
            with suppress(RuntimeError):  # where the store is gone, this process notices once it has something to tell
                while not done.wait(self.patience / 3):
                    store.add(f"{key} beats", 1)

        thread = Thread(target=beat, daemon=True, name="heartbeat")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def heard(self, value: Any) -> list[Any]:
        """What each process says, in the order of the ranks; of what JSON can hold."""
        if self.alone:
            return [value]
        letter = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [int(length) for (length,) in self.exchange(len(letter))]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(letter)] = letter
        rows = zip(self._gathered(padded), lengths, strict=True)
        return [json.loads(row[:length].numpy().tobytes()) for row, length in rows]

    def move(self, moves: Sequence[Move]) -> list[Tensor | None]:
        """Make all moves, which every process names in the same order. What arrives here, by move.

        Small ones that go the same way travel together.
        """
        arrived: list[Tensor | None] = [None] * len(moves)
        ways = _together([move.tensor for move in moves], [(giver, taker) for _, giver, taker in moves])
        work = []
        rooms = []
        for (giver, taker), numbers in ways:
            tensors = [moves[nth].tensor for nth in numbers]
            if self.rank == giver:
                work.append(dist.P2POp(dist.isend, self._sent(_joined(tensors)), taker, tag=numbers[0]))
            elif self.rank == taker:
                room = self._sent(tensors[0].new_empty(sum(tensor.numel() for tensor in tensors)))
                work.append(dist.P2POp(dist.irecv, room, giver, tag=numbers[0]))
                rooms.append((room, numbers, tensors))
        with self._answered():
            for request in dist.batch_isend_irecv(work) if work else ():
                request.wait()
        for room, numbers, tensors in rooms:
            for nth, part in zip(numbers, _parted(room, tensors), strict=True):
                arrived[nth] = part
        return arrived

    def spread(self, tensors: Sequence[Tensor], givers: Sequence[int]) -> None:
        """Copy each tensor of its giver into those of all others. Small ones of one giver travel together."""
        ways = [(giver, [tensors[nth] for nth in numbers]) for giver, numbers in _together(tensors, givers)]
        sent = [self._sent(_joined(held)) for _, held in ways]
        with self._answered():
            work = [dist.broadcast(one, giver, async_op=True) for one, (giver, _) in zip(sent, ways, strict=True)]
            for request in work:
                request.wait()
        for one, (_, held) in zip(sent, ways, strict=True):
            for tensor, part in zip(held, _parted(one, held), strict=True):
                if part.data_ptr() != tensor.data_ptr():
                    tensor.copy_(part)

    def swap(self, rows: Tensor, sent: list[int], came: list[int]) -> Tensor:
        """Give so many rows to each neighbour that holds experts, in the order of their ranks. What comes from them."""
        given = self._sent(rows)
        room = given.new_empty(sum(came), *given.shape[1:])
        with self._answered():
            dist.all_to_all_single(room, given, came, sent, group=self.neighbours)
        return room.to(rows.device)

    def unite(self, whole: Tensor, part: Tensor, later: bool = False) -> Any:
        """Fill the whole with the parts of all processes, in the order of the ranks. later: return what to wait for."""
        with self._answered():
            return ALL_GATHER(whole, part, async_op=later)

    def mesh(self) -> DeviceMesh:
        """All processes, as FSDP wants them."""
        return DeviceMesh.from_group(dist.group.WORLD, "cuda" if self.direct else "cpu")  # type: ignore[arg-type]

    def call_off(self) -> None:
        """Let the others know that this process waits for rows no longer, and gets none."""
        if self.store is not None:
            self.store.set(CALLED_OFF, "")

    def is_called_off(self) -> bool:
        return self.store is not None and self.store.check([CALLED_OFF])

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        sent = self._sent(tensor)
        rows = [torch.empty_like(sent) for _ in range(self.size)]
        with self._answered():
            dist.all_gather(rows, sent)
        return rows

    def _sent(self, tensor: Tensor) -> Tensor:
        """The tensor where it can be sent from."""
        return (tensor if self.direct else tensor.cpu()).contiguous()

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Raise Lost for what torch.distributed raises."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            raise self._lost() from None

    def _lost(self) -> Lost:
        return Lost(
            f"another of the {self.size} processes is gone, or has not answered for {self.patience:.0f} s; "
            "--resume goes on from the last checkpoint"
        )


ALONE = Group()


def _together(tensors: Sequence[Tensor], ways: Sequence[Way]) -> list[tuple[Way, list[int]]]:
    """The numbers of the tensors that travel in each message: small ones of one type that go the same way in one,
    others alone, as copying them into one costs more than it saves."""
    messages: dict[Any, tuple[Way, list[int]]] = {}
    for nth, (tensor, way) in enumerate(zip(tensors, ways, strict=True)):
        key = (way, tensor.dtype) if tensor.numel() <= SMALL else nth
        messages.setdefault(key, (way, []))[1].append(nth)
    return list(messages.values())


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """All their numbers in one row."""
    first, *others = (tensor.flatten() for tensor in tensors)
    return torch.cat([first, *others]) if others else first


def _parted(row: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The row cut into tensors with the shapes of these, on their device."""
    parts = row.to(like[0].device).split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def added(parts: Sequence[Tensor]) -> Tensor:
    """The sum from the first on, as gradients add up over micro-batches; it takes the first one's place."""
    total, *others = parts
    for other in others:
        total += other
    return total


def environment(name: str, least: int = 0, most: int = 2**31, default: int | None = None) -> int:
    """A whole number that torchrun or `launch` has set. Raises UserError for any other: often what a shell exports for
    another program, or half of what is needed."""
    text = os.environ.get(name, "" if default is None else str(default))
    if text.isdecimal() and least <= int(text) <= most:
        return int(text)
    raise UserError(
        f"the environment has {f'{name}={text[:60]!r}' if name in os.environ else f'no {name}'}, which must be a whole "
        f"number from {least} to {most}; {LEFT_OVER}"
    )


@contextmanager
def opened(config: MachineConfig) -> Iterator[Group]:
    """The group that this process's environment speaks of. Raises UserError, as where the others do not come."""
    size = environment("WORLD_SIZE", 1, default=1)
    parts = config.expert_processes
    if size % parts:
        raise UserError(
            f"machine.expert_processes: {parts} must divide the number of processes, {size} (machine.processes)"
        )
    if size == 1:
        yield ALONE
        return
    rank = environment("RANK", most=size - 1)
    local_rank = environment("LOCAL_RANK", most=size - 1, default=rank)
    local_size = environment("LOCAL_WORLD_SIZE", 1, size, default=size)
    for name in () if STORE in os.environ else ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(f"the environment has WORLD_SIZE={size}, but no {name}; {LEFT_OVER}")
    shares = tuple(map(int, config.shares.split(","))) if config.shares else (1,) * size
    if len(shares) != size:
        raise UserError(f"machine.shares: {config.shares} is for {len(shares)} processes, but there are {size}")
    cards = torch.cuda.device_count() if config.device in ("auto", "cuda") else 0
    if 0 < cards < local_size:
        raise UserError(f"machine.processes: {local_size} processes need a GPU each, but {cards} are found")
    if cards:
        torch.cuda.set_device(local_rank)
    direct = cards > 0 and dist.is_nccl_available()  # it is not on Windows
    if local_rank:  # two processes that compile into one folder read each other's half-written files
        user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()  # in a container it may have no name
        mine = f"torchinductor_{user}_{local_rank}"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / mine))
    timeout = timedelta(seconds=config.patience)
    try:
        store = PrefixStore(f"khanhllm {next(OPENED)}", _store(size, timeout))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if direct else "gloo", store=store, rank=rank, world_size=size, timeout=timeout
        )
        neighbours = _neighbours(rank, size, parts, timeout) if 1 < parts < size else None
    except (RuntimeError, ValueError) as error:
        raise Lost(f"the {size} processes do not find each other: {first_line(error)[:200]}") from None
    group = Group(rank, size, local_rank, local_size, shares, config.patience, store, direct, parts, neighbours)
    try:
        yield group
    except UserError as error:
        group.tell_the_end(error)
        raise
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _neighbours(rank: int, size: int, parts: int, timeout: timedelta) -> Any:
    """Those who hold the experts together with this process; every process names all such groups."""
    groups = [dist.new_group(range(first, first + parts), timeout=timeout) for first in range(0, size, parts)]
    return groups[rank // parts]


def _store(size: int, timeout: timedelta) -> Store:
    """Where the processes find each other: in a file on one machine, else where torchrun says."""
    if STORE in os.environ:
        return dist.FileStore(os.environ[STORE], size)  # type: ignore[attr-defined]
    store, _rank, _size = next(rendezvous("env://", timeout=timeout))
    return store  # type: ignore[no-any-return]
