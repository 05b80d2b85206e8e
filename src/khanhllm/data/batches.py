"""Make batches of rows on the device, ahead of the model.

The cursor counts rows trained on since the beginning, over all epochs. Row number `cursor` of a run is a pure function
of (seed, cursor), so a resumed run and any micro-batch size see the same rows in the same order; nothing else needs to
be saved. A thread prepares the next batches while the model computes on this one.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from itertools import islice
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

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
) -> Generator[Batch]:
    """Batches of `micro_batch` rows from row number `cursor` on; closing the generator ends its thread. One that is
    alive when the interpreter exits may end the process with an error, from inside torch.

    Endless, unless `give_up()` turns true while it waits for a batch. Raises the UserError of `source` in place of the
    batch.
    """
    queue: Queue[tuple[Tensor, int] | BaseException] = Queue(AHEAD)
    stop = Event()
    work = (source, micro_batch, seed, cursor, device.type == "cuda")
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
            ids_BT, cursor = item
            ids_BT = ids_BT.to(device, non_blocking=True)
            yield Batch(ids_BT[:, :-1], ids_BT[:, 1:], cursor)
    finally:
        stop.set()
        with suppress(Empty):  # it may wait for room
            queue.get_nowait()
        thread.join(PATIENCE)


def _fill(
    queue: "Queue[tuple[Tensor, int] | BaseException]",
    stop: Event,
    source: Rows,
    micro_batch: int,
    seed: int,
    cursor: int,
    pin: bool,
) -> None:
    try:
        stream = source.rows_from(cursor, seed, stop)
        while not stop.is_set() and (rows := list(islice(stream, micro_batch))):
            ids_BT = torch.from_numpy(np.stack(rows))
            cursor += micro_batch
            _put(queue, stop, (ids_BT.pin_memory() if pin else ids_BT, cursor))
    except BaseException as error:
        _put(queue, stop, error)


def _put(
    queue: "Queue[tuple[Tensor, int] | BaseException]", stop: Event, item: tuple[Tensor, int] | BaseException
) -> None:
    """Put an item into the queue; wait for room until `stop` is set, which says that the consumer has gone."""
    while not stop.is_set():
        try:
            return queue.put(item, timeout=0.1)
        except Full:
            continue


def random_batches(config: Config, device: torch.device) -> Iterator[Batch]:
    """Yield micro-batches of random tokens, endlessly."""
    generator = torch.Generator().manual_seed(0)
    shape = (config.train.rows, config.model.context + 1)
    while True:
        ids_BT = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
        yield Batch(ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous(), 0)
