"""What the first process tells all others through a store, how long they wait for it, and where the store is gone."""

from concurrent.futures import ThreadPoolExecutor
from threading import Condition, Event

import pytest

from khanhllm.errors import UserError
from khanhllm.machine.group import Group, Lost, Told, opened
from khanhllm.schema import MachineConfig


class Gone:
    """A store whose process has ended."""

    def fail(self, *_):
        raise RuntimeError("Connection was likely closed")

    check = wait = get = set = add = fail


class Shared:
    """A store in which a wait is over as soon as somebody shows that it lives."""

    def __init__(self):
        self.said, self.beats, self.waits, self.changed = {}, 0, 0, Condition()

    def set(self, key, value):
        with self.changed:
            self.said[key] = value
            self.changed.notify_all()

    def add(self, _key, number):
        with self.changed:
            self.beats += number
            self.changed.notify_all()
            return self.beats

    def check(self, keys):
        return keys[0] in self.said

    def get(self, key):
        return self.said[key]

    def wait(self, keys, timeout):
        with self.changed:
            self.waits, before = self.waits + 1, self.beats
            self.changed.wait_for(lambda: self.check(keys) or self.beats > before, timeout.total_seconds())
        if not self.check(keys):
            raise RuntimeError("wait timeout")


def test_one_that_takes_its_time_is_waited_for_and_one_that_is_silent_is_lost():
    store = Shared()
    first, other = (Group(rank, 2, store=store, patience=patience) for rank, patience in ((0, 0.01), (1, 20)))
    over = Event()

    def make():
        while store.waits < 5 and not over.wait(0.001):
            pass
        return store.waits

    def hear():
        try:
            return other.told(make)
        finally:
            over.set()

    with ThreadPoolExecutor(2) as pool:
        told, heard = pool.submit(first.told, make), pool.submit(hear)
        assert told.result() == heard.result() >= 5
    with pytest.raises(Lost):
        Group(1, 2, store=Shared(), patience=0.01).told(make)


def test_an_error_of_the_first_is_told_to_all():
    store = Shared()
    first, other = (Group(rank, 2, store=store) for rank in (0, 1))
    first.told(lambda: 1)
    first.tell_the_end(Lost("gone"))
    assert other.told(None) == 1
    with pytest.raises(Told, match=r"^gone$") as told:
        other.told(None)
    assert told.value.exit_code == 75


@pytest.mark.parametrize(
    ("settings", "cards", "says"),
    [
        ({"shares": "2,1,1"}, 2, "2,1,1 is for 3 processes, but there are 2"),
        ({}, 1, "2 processes need a GPU each, but 1 are found"),
        ({"expert_processes": 3}, 2, "3 must divide the number of processes, 2"),
    ],
)
def test_what_does_not_fit_the_processes_is_refused_before_they_meet(monkeypatch, settings, cards, says):
    monkeypatch.setattr("torch.cuda.device_count", lambda: cards)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("KHANHLLM_STORE", "/dev/null/none")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says), opened(MachineConfig(processes=2, **settings)):
        pass


@pytest.mark.parametrize("rank", [0, 1])
def test_a_store_that_is_gone_is_a_lost_process(rank):
    group = Group(rank, 2, store=Gone())
    with pytest.raises(Lost, match="--resume goes on"):
        group.told(lambda: 1)
    group.tell_the_end(UserError("the cause"))  # says nothing, and hides no cause
