"""What several processes make of one config before they train."""

import dataclasses
from types import SimpleNamespace

import pytest

from conftest import plain_machine, tiny
from khanhllm.machine.group import STORE, Group
from khanhllm.planning import ways
from khanhllm.settings import resolve
from khanhllm.training import run


def several(size, **more):
    return dataclasses.replace(plain_machine(), group=Group(0, size, **more))


def of(accumulation, **machine):
    train = {"micro_batch": 24 // accumulation, "accumulation": accumulation}
    return resolve(tiny().model_dump(), {"train": train, "machine": machine})


@pytest.mark.parametrize(
    ("accumulation", "machine", "group", "becomes"),
    [
        (6, {}, {}, 6),
        (6, {"split": "all"}, {}, 8),
        (6, {"expert_processes": 2}, {"parts": 2}, 8),
        (4, {}, {"shares": (3, 1, 1, 1)}, 6),
    ],
)
def test_a_step_is_cut_so_that_each_process_has_its_share(accumulation, machine, group, becomes):
    group = {"shares": (1, 1, 1, 1)} | group
    config = run._cut(of(accumulation, **machine), several(4, **group), None)
    assert (config.train.accumulation, config.train.rows_per_step) == (becomes, 24)


@pytest.mark.parametrize("machine", [{"split": "all"}, {"shares": "3,1"}])
def test_what_only_several_processes_have_is_said_to_be_idle(machine, corpus, tmp_path):
    data = {"source": str(corpus), "cache": str(tmp_path / "cache"), "validation": 0.2, "workers": 1}
    settings = {"data": data, "train": {"steps": 1, "sample_tokens": 0, "eval_tokens": 100}, "machine": machine}
    run.train(resolve(tiny().model_dump(), settings), tmp_path / "run")
    (key, value), *_ = machine.items()
    assert f"machine.{key} = {value} changes nothing for one" in (tmp_path / "run" / "messages.txt").read_text()


def test_what_a_killed_process_leaves_lies_in_the_folder_that_the_launcher_removes(monkeypatch, tmp_path):
    group = Group(1, 2)
    with run._own(tmp_path / "run", False, group) as place:
        assert place.parent != tmp_path
    monkeypatch.setenv(STORE, str(tmp_path / "store"))
    with run._own(tmp_path / "run", False, group) as place:
        assert place.parent == tmp_path and place.is_dir()


def test_the_link_is_asked_for_what_a_step_of_this_run_moves(monkeypatch):
    monkeypatch.setattr(run, "link_speed", lambda machine, moved: moved)
    config = of(4, expert_processes=2)
    learner = SimpleNamespace(machine=several(2, shares=(3, 1), parts=2))
    traffic = ways.by_experts(config, "fp32", 2).traffic
    assert run._link(SimpleNamespace(config=config, learner=learner)) == traffic.step + 3 * traffic.micro_batch
    assert run._link(SimpleNamespace(config=config, learner=SimpleNamespace(machine=plain_machine()))) is None
