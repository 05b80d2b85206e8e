"""Rows become batches on the device, one ahead of the model.

The cursor counts rows trained on since the beginning, over all epochs. Row number `cursor` of a run is a pure function
of (seed, cursor), so stopping, resuming, and any micro-batch size see the same rows in the same order; nothing else
needs to be saved. A thread prepares the next batches while the model is at work on this one.
"""

from collections.abc import Iterator
from queue import Full, Queue
from threading import Event, Thread
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from khanhllm.data.shards import Shards, shuffled

AHEAD = 4
"""batches prepared in advance"""


class Batch(NamedTuple):
    inputs_BT: Tensor
    """int64"""
    targets_BT: Tensor
    """int64: the inputs, one token later"""
    cursor: int
    """rows trained on once this batch is done"""


def batches(shards: Shards, micro_batch: int, seed: int, cursor: int, device: torch.device) -> Iterator[Batch]:
    """Batches of `micro_batch` rows from row number `cursor` on, without end; closing the generator stops its thread.

    Raises UserError from `Shards.row` where the batch would have come.
    """
    queue: Queue[tuple[Tensor, int] | BaseException] = Queue(AHEAD)
    stop = Event()
    work = (shards, micro_batch, seed, cursor, device.type == "cuda")
    Thread(target=_fill, args=(queue, stop, *work), daemon=True, name="batches").start()
    try:
        while True:
            item = queue.get()
            if isinstance(item, BaseException):
                raise item
            ids_BT, cursor = item
            ids_BT = ids_BT.to(device, non_blocking=True)
            yield Batch(ids_BT[:, :-1], ids_BT[:, 1:], cursor)
    finally:
        stop.set()


def _fill(
    queue: "Queue[tuple[Tensor, int] | BaseException]",
    stop: Event,
    shards: Shards,
    micro_batch: int,
    seed: int,
    cursor: int,
    pin: bool,
) -> None:
    try:
        while not stop.is_set():
            ids_BT = torch.from_numpy(np.stack([_row(shards, seed, cursor + nth) for nth in range(micro_batch)]))
            cursor += micro_batch
            _put(queue, stop, (ids_BT.pin_memory() if pin else ids_BT, cursor))
    except BaseException as error:
        _put(queue, stop, error)


def _row(shards: Shards, seed: int, cursor: int) -> np.ndarray:
    epoch, index = divmod(cursor, shards.rows)
    return shards.row(shuffled(index, shards.rows, seed, epoch))


def _put(
    queue: "Queue[tuple[Tensor, int] | BaseException]", stop: Event, item: tuple[Tensor, int] | BaseException
) -> None:
    """Wait for room, but not for a consumer that has gone."""
    while not stop.is_set():
        try:
            return queue.put(item, timeout=0.1)
        except Full:
            continue
