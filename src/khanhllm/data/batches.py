"""Make batches of rows on the device, ahead of the model.

The cursor counts rows trained on since the beginning, over all epochs. Row number `cursor` of a run is a pure function
of (seed, cursor), so a resumed run and any micro-batch size see the same rows in the same order; nothing else needs to
be saved. A thread prepares the next batches while the model computes on this one.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from itertools import cycle, islice
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from khanhllm.data import counting
from khanhllm.data.counting import Reading
from khanhllm.schema import Config

AHEAD = 4
"""batches prepared in advance"""
PATIENCE = 10.0
"""how long closing waits for the thread, which a dead disk may hold (seconds)"""


class Batch(NamedTuple):
    """Inputs and targets of one micro-batch, and the cursor after it."""

    inputs_BT: Tensor
    """int64"""
    targets_BT: Tensor
    """int64: the inputs, one token later"""
    cursor: int
    """rows trained on once this batch is done"""
    counted_N: Tensor | None = None
    """int64: the targets that count, by their place in the flattened targets; None: all"""
    place_BT: Tensor | None = None
    """int64: the position of each input in its own document, if documents do not see each other"""
    padding_BT: Tensor | None = None
    """bool: inputs that only fill a row"""
    padding: int = 0
    """how many they are"""

    @property
    def counted(self) -> int:
        """Targets that count. Known without waiting for the device, as are `tokens`."""
        return self.targets_BT.numel() if self.counted_N is None else len(self.counted_N)

    @property
    def tokens(self) -> int:
        """Inputs, but for those that only fill a row."""
        return self.inputs_BT.numel() - self.padding

    @property
    def extras(self) -> tuple[Tensor | None, ...]:
        """What the model takes beside inputs and targets."""
        return self.counted_N, self.place_BT, self.padding_BT

    def by_row(self, value: Tensor) -> Tensor:
        """The sums over each row, (B,), of a value of each target, (B, T), or of each that counts, (N,)."""
        if self.counted_N is None:
            return value.sum(1)
        row_N = self.counted_N // self.targets_BT.shape[1]
        return value.new_zeros(len(self.targets_BT)).index_add(0, row_N, value)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with a function applied to each tensor."""
        return Batch._make(function(value) if isinstance(value, Tensor) else value for value in self)


def batch_of(ids_BT: np.ndarray, cursor: int = 0, reading: Reading | None = None) -> Batch:
    """The batch, on the CPU, of rows of one more token than the model sees at once."""
    tensor_BT = torch.from_numpy(ids_BT)
    batch = Batch(tensor_BT[:, :-1], tensor_BT[:, 1:], cursor)
    if reading is None:
        return batch
    padding_BT = counting.padding(ids_BT, reading.end_of_text)
    counted_BT = counting.counted(ids_BT, reading.marks) if reading.marks else ~padding_BT
    place_BT = counting.places(ids_BT[:, :-1], reading.end_of_text) if reading.document_mask else None
    return batch._replace(
        counted_N=torch.from_numpy(np.flatnonzero(counted_BT)),
        place_BT=None if place_BT is None else torch.from_numpy(place_BT),
        padding_BT=torch.from_numpy(padding_BT),
        padding=int(padding_BT.sum()),
    )


class Rows(Protocol):
    """A source of rows: prepared shards, or a belt."""

    def rows_from(self, cursor: int, seed: int, stopped: Event) -> Iterator[np.ndarray]: ...


def batches(
    source: Rows,
    micro_batch: int,
    seed: int,
    cursor: int,
    device: torch.device,
    give_up: Callable[[], object] = lambda: False,
    reading: Reading | None = None,
    turns: Sequence[bool] = (True,),
) -> Generator[Batch]:
    """Batches of `micro_batch` rows from row number `cursor` on. Where several processes share the rows, `turns` says
    of each batch, over and over, whether it is for this one. Closing the generator ends its thread. One that is
    alive when the interpreter exits may end the process with an error, from inside torch.

    Endless, unless `give_up()` turns true while it waits for a batch. Raises the UserError of `source` in place of the
    batch.
    """
    queue: Queue[Batch | BaseException] = Queue(AHEAD)
    stop = Event()
    work = (source, micro_batch, seed, cursor, device.type == "cuda", reading, turns)
    thread = Thread(target=_fill, args=(queue, stop, *work), daemon=True, name="batches")
    thread.start()
    try:
        while True:
            try:
                item = queue.get(timeout=0.2)
            except Empty:
                if give_up():
                    return
                continue
            if isinstance(item, BaseException):
                raise item
            yield item.map(lambda tensor: tensor.to(device, non_blocking=True))
    finally:
        stop.set()
        with suppress(Empty):  # it may wait for room
            queue.get_nowait()
        thread.join(PATIENCE)


def _fill(
    queue: "Queue[Batch | BaseException]",
    stop: Event,
    source: Rows,
    micro_batch: int,
    seed: int,
    cursor: int,
    pin: bool,
    reading: Reading | None,
    turns: Sequence[bool],
) -> None:
    try:
        stream, mine = source.rows_from(cursor, seed, stop), cycle(turns)
        while not stop.is_set() and (rows := list(islice(stream, micro_batch))):
            cursor += micro_batch
            if not next(mine):
                continue
            batch = batch_of(np.stack(rows), cursor, reading)
            _put(queue, stop, batch.map(lambda tensor: tensor.contiguous().pin_memory()) if pin else batch)
    except BaseException as error:
        _put(queue, stop, error)


def _put(queue: "Queue[Batch | BaseException]", stop: Event, item: Batch | BaseException) -> None:
    """Put an item into the queue; wait for room until `stop` is set, which says that the consumer has gone."""
    while not stop.is_set():
        with suppress(Full):
            return queue.put(item, timeout=0.1)


def random_batches(config: Config, device: torch.device) -> Iterator[Batch]:
    """Yield micro-batches of random tokens, endlessly."""
    generator = torch.Generator().manual_seed(0)
    shape = (config.train.rows, config.model.context + 1)
    while True:
        ids_BT = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
        yield Batch(ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous(), 0)
