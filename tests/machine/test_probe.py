"""The link between processes is measured before they train, and a pair of cards that hangs is named."""

import dataclasses
import os
import time
from threading import Event
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from conftest import plain_machine, tiny
from khanhllm.machine import probe
from khanhllm.machine.group import Group
from khanhllm.machine.probe import LinkSpeed, link_speed
from khanhllm.training.run import _slow_link


class Both(Group):
    """A group of two whose other process does what this one does, in half the time."""

    given: int = 0
    """rounds"""

    def exchange(self, *numbers):
        return [numbers, tuple(number / 2 for number in numbers)]

    def move(self, moves):
        assert [(giver, taker) for _, giver, taker in moves] == [(0, 1), (1, 0)]
        return [None] * len(moves)

    def spread(self, tensors, givers):
        object.__setattr__(self, "given", self.given + 1)
        assert [*givers] == [0, 1] and len({tensor.numel() for tensor in tensors}) == 1


def machine(group):
    return dataclasses.replace(plain_machine(), group=group)


def test_rounds_grow_until_one_is_long(monkeypatch):
    """Each round takes as long as its bytes on a link of 100 MB/s, but the first, which opens connections."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    class Slow(Both):
        def move(self, moves):
            clock[0] += moves[0].tensor.numel() / 100e6
            return super().move(moves)

        def spread(self, tensors, givers):
            super().spread(tensors, givers)
            clock[0] += 3.0 if self.given == 1 else tensors[0].numel() / 100e6

    found = link_speed(machine(group := Slow(size=2)), moved=50_000_000)
    assert found.speed == pytest.approx(100e6) and found.seconds == pytest.approx(0.5)
    assert group.given == 1 + next(nth for nth, size in enumerate(probe.SIZES) if size * 1.5 / 100e6 > probe.LONG)
    assert found.describe() == "link: 100 MB/s between 2 processes; a step moves 50 MB, about 0.5 s"


def test_a_link_that_takes_most_of_a_step_is_named():
    found = LinkSpeed(processes=2, speed=1e8, moved=50_000_000)
    assert found.warning(step=1.1) == ""
    assert found.warning(step=0.8).startswith("the processes wait for their link for about 62% of a step of 0.8 s; ")
    assert "100%" in found.warning(step=0.1)


def test_a_run_compares_the_link_with_the_step_that_it_took():
    config = tiny()
    parts = SimpleNamespace(config=config, link=LinkSpeed(processes=2, speed=1e8, moved=50_000_000))
    assert "62% of a step of 0.8 s" in _slow_link(parts, {"tokens_per_s": config.tokens_per_step / 0.8})
    assert _slow_link(parts, {"tokens_per_s": config.tokens_per_step / 2}) == ""
    assert _slow_link(parts, {}) == ""  # a step in which no target counted
    assert _slow_link(SimpleNamespace(config=config, link=None), {"tokens_per_s": 1.0}) == ""


def test_cards_that_do_not_answer_end_the_process_with_what_helps(monkeypatch, capsys):
    ended, codes = Event(), []

    def end(code):
        codes.append(code)
        ended.set()

    class Hangs(Both):
        def spread(self, tensors, givers):
            assert ended.wait(60)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(probe, "LIMIT", 0.01)
    monkeypatch.setattr(probe, "SIZES", probe.SIZES[:1])
    link_speed(machine(Hangs(size=2, direct=True)), 1000)
    said = capsys.readouterr().err
    assert codes == [2] and "NCCL_P2P_DISABLE=1" in said and len(said.splitlines()) == 1


def test_cards_that_answer_go_on(monkeypatch):
    timer = Mock()
    monkeypatch.setattr(probe, "Timer", lambda *_: timer)
    assert link_speed(machine(Both(size=2, direct=True)), 1000).speed > 0
    assert [name for name, *_ in timer.method_calls] == ["start", "cancel"]


def test_processes_without_cards_have_the_patience_of_the_run(monkeypatch):
    monkeypatch.setattr(probe, "Timer", None)
    assert link_speed(machine(Both(size=2)), 1000).speed > 0
