import contextlib
from functools import partial

import pytest
import torch

from khanhllm.machine import backends
from khanhllm.machine.backends import Problem, answers, by_loop, choose, fault, probe
from khanhllm.model.experts import GROUPED

CPU = torch.device("cpu")


class Device:
    """Stands for a CUDA device: knows whether the host may wait now."""

    def __init__(self):
        self.guarded = False

    @contextlib.contextmanager
    def guard(self):
        self.guarded = True
        try:
            yield
        finally:
            self.guarded = False

    def waits(self, problem):
        if self.guarded:
            raise RuntimeError("called a synchronizing CUDA operation")
        return by_loop(problem)


def right(problem):
    return by_loop(problem)


def breaks(_problem):
    raise ImportError("No module named\n'triton'")


def wrong(problem):
    forward, backward, outer = by_loop(problem)
    return forward, backward, outer + 1


def nan(problem):
    forward, backward, outer = by_loop(problem)
    return forward * torch.nan, backward, outer


def unused(_problem):
    pytest.fail("a backend was tried though a better one was found")


def chosen(grouped, triton, device=None):
    device = device or Device()
    return choose(Problem.tiny(CPU, torch.bfloat16), grouped, triton, device.guard)


def test_grouped_mm_where_it_is_right_and_does_not_wait(caplog):
    assert chosen(right, unused) == "grouped"
    assert not caplog.records


@pytest.mark.parametrize("grouped", [breaks, wrong, nan])
def test_triton_where_grouped_mm_fails(grouped, caplog):
    assert chosen(grouped, right) == "triton"
    assert not caplog.records


def test_triton_where_grouped_mm_makes_the_host_wait(caplog):
    device = Device()
    assert chosen(device.waits, right, device) == "triton"
    assert not caplog.records


@pytest.mark.parametrize(
    ("triton", "reason"), [(breaks, "ImportError: No module named 'triton'"), (wrong, "wrong numbers")]
)
def test_a_waiting_grouped_mm_where_triton_fails_with_one_warning(triton, reason, caplog):
    device = Device()
    assert chosen(device.waits, triton, device) == "grouped"
    (record,) = caplog.records
    assert record.levelname == "WARNING" and reason in record.message and "\n" not in record.message


def test_the_loop_where_all_else_fails_with_one_warning(caplog):
    assert chosen(wrong, breaks) == "loop"
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "\n" not in record.message
    assert "wrong numbers" in record.message and "ImportError" in record.message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tiny_problem_tells_right_from_wrong(dtype):
    problem = Problem.tiny(CPU, dtype)
    assert fault(partial(answers, GROUPED), problem) is None
    for shifted in (problem.end_E.roll(1), problem.end_E - 1):
        assert fault(lambda p, end=shifted: answers(GROUPED, p._replace(end_E=end)), problem) == "wrong numbers"


def test_off_cuda_nothing_is_tried():
    assert probe(CPU) == "loop"


def test_the_ban_on_waiting_ends_whatever_happens(monkeypatch):
    mode = [1]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode.append)
    with pytest.raises(RuntimeError, match="waits"), backends.host_must_not_wait():
        assert mode[-1] == "error"
        raise RuntimeError("waits")
    assert mode == [1, "error", 1]
