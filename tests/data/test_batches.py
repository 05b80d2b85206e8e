"""Laws of the batches: one integer decides what comes next, whatever the micro-batch; faults reach the consumer."""

import threading
import time
from itertools import islice

import pytest
import torch

from khanhllm.data.batches import batches
from khanhllm.data.shards import Shards
from khanhllm.errors import UserError

CPU = torch.device("cpu")


class Rows:
    """Stands in for Shards: row i holds i, i + 1, i + 2."""

    def __init__(self, rows=10, bad=None):
        self.rows, self.bad = rows, bad

    rows_from = Shards.rows_from

    def row(self, index):
        if index == self.bad:
            raise UserError("row is damaged")
        return torch.arange(index, index + 3).numpy()


def order(micro_batch, rows, cursor=0, seed=0):
    stream = batches(Rows(), micro_batch, seed, cursor, CPU)
    found = [int(row[0]) for batch in islice(stream, rows // micro_batch) for row in batch.inputs_BT]
    stream.close()
    return found


def test_a_batch_is_inputs_targets_and_the_cursor_behind_it():
    stream = batches(Rows(), 4, 0, 8, CPU)
    batch = next(stream)
    assert batch.inputs_BT.shape == batch.targets_BT.shape == (4, 2) and batch.inputs_BT.dtype == torch.int64
    assert torch.equal(batch.inputs_BT + 1, batch.targets_BT)
    assert [batch.cursor, next(stream).cursor] == [12, 16]
    stream.close()


def test_the_micro_batch_does_not_change_the_order():
    rows = order(1, 48)
    assert rows == order(2, 48) == order(3, 48) == order(16, 48)


def test_it_goes_on_where_the_cursor_stands():
    rows = order(2, 40)
    for cursor in (2, 10, 13):
        assert order(1, 20, cursor) == rows[cursor : cursor + 20]


def test_every_epoch_has_every_row_in_an_order_of_its_own():
    rows = order(5, 30)
    epochs = [rows[:10], rows[10:20], rows[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order(5, 30, seed=1) != rows


def test_a_fault_surfaces_where_the_batch_would_have_come():
    stream = batches(Rows(bad=7), 1, 0, 0, CPU)
    with pytest.raises(UserError, match="row is damaged"):
        list(islice(stream, 10))


def test_the_thread_ends_with_its_consumer():
    before = set(threading.enumerate())
    stream = batches(Rows(), 1, 0, 0, CPU)
    next(stream)
    (worker,) = set(threading.enumerate()) - before
    assert worker.daemon
    time.sleep(0.3)  # until it waits for room
    started = time.monotonic()
    stream.close()
    assert not worker.is_alive() and time.monotonic() - started < 5


def test_it_works_ahead_but_only_a_little():
    seen = []

    class Counting(Rows):
        def row(self, index):
            seen.append(index)
            return super().row(index)

    stream = batches(Counting(), 1, 0, 0, CPU)
    next(stream)
    time.sleep(0.3)
    assert 1 < len(seen) < 10
    stream.close()
