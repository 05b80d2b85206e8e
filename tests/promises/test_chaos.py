"""A small storm of each kind is survived; and chaos finds what is broken on purpose."""

import os
import random
import re
import shutil
from itertools import islice
from types import SimpleNamespace

import pytest

from khanhllm import cli
from khanhllm.chaos import belt, clients, many, numbers, run, saves, trainers
from khanhllm.chaos.arena import Arena
from khanhllm.training import checkpoint
from khanhllm.training.guard import Guard

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="its processes are forked"),
]


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    return Arena(tmp_path_factory.mktemp("arena"))


def thrown(kind, arena, number):
    return list(islice(kind(arena, random.Random(0)), number))


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (trainers.killed, 5),
        (trainers.asked_to_stop, 5),
        (trainers.met_by_a_rival, 1),
        (trainers.out_of_quota, 1),
        (saves.flipped, 100),
        (numbers.not_finite, 60),
        (belt.failing_network, 40),
        (belt.dying_helpers, 5),
        (clients.vanishing, 15),
        (many.killed, 5),
        (many.halted, 5),
        (many.signalled, 5),
        (many.orphaned, 5),
        (many.not_finite, 5),
        (many.out_of_memory, 1),
        (many.out_of_room, 5),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_it_is_survived(kind, number, arena):
    assert thrown(kind, arena, number) == [""] * number


@pytest.mark.skipif(not shutil.which("strace"), reason="strace stops a process at a system call")
def test_a_save_cut_short_is_survived(arena):
    assert saves.boundaries(arena) > 50
    assert thrown(saves.cut_short, arena, 6) == [""] * 6


def test_a_network_cut_off_is_survived(arena):
    """Where a user may have none of his own, none is thrown."""
    assert set(thrown(many.cut_off, arena, 5)) <= {""}


def test_a_process_that_nobody_misses_is_found_out(arena, monkeypatch):
    """Each fault is a number: exit codes, saved steps and bits are looked at."""
    monkeypatch.setattr(many.launch, "LOST", 3)
    assert any("exit code 75" in fault for fault in thrown(many.killed, arena, 5))


def test_a_blind_verification_is_found_out(arena, monkeypatch):
    monkeypatch.setattr(checkpoint, "verify", lambda *_: None)
    assert any("was not found" in fault for fault in thrown(saves.flipped, arena, 20))


def test_a_guard_that_sleeps_is_found_out(arena, monkeypatch):
    monkeypatch.setattr(Guard, "fault", lambda *_: "")
    assert all("reached the state" in fault for fault in thrown(numbers.not_finite, arena, 5))


def test_a_server_that_grows_or_answers_otherwise_is_found_out(arena, monkeypatch):
    monkeypatch.setattr(clients, "WARM", 2)
    monkeypatch.setattr(clients, "MOST", -1e6)
    monkeypatch.setattr(clients, "WRONG", [(b"{", {}, 200)])
    faults = thrown(clients.vanishing, arena, 6)
    assert any("400 instead of 200" in fault for fault in faults) and any("memory grew" in fault for fault in faults)


def test_the_command_prints_a_table(capsys, monkeypatch):
    monkeypatch.setattr(run, "KINDS", {"damage": (saves.flipped, 1), "numbers": (numbers.not_finite, 1)})
    assert cli.main(["chaos", "--seed", "3", "--faults", "10"]) == 0
    printed = capsys.readouterr().out
    assert "khanhllm chaos --seed 3" in printed
    assert printed.count("ok") == 2
    monkeypatch.setattr(Guard, "fault", lambda *_: "")
    assert cli.main(["chaos", "--faults", "10"]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert cli.main(["chaos", "--faults", "0"]) == 2
    assert cli.main(["chaos", "--only", "ghosts"]) == 2


def test_ctrl_c_leaves_the_table_of_what_was_thrown(capsys, monkeypatch):
    def kind(_arena, _chance):
        yield ""
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "KINDS", {"kills": (kind, 10), "ghosts": (kind, 10)})
    monkeypatch.setattr(run, "Arena", lambda _folder: SimpleNamespace(undisturbed=None))
    assert run.run(0, 20, 0) == 0
    said = capsys.readouterr().out
    assert "kills" in said and "ghosts" not in said


@pytest.mark.skipif(not shutil.which("strace"), reason="strace writes down the order of system calls")
def test_what_is_published_is_on_the_disk_before(arena):
    """A power cut may keep any of two writes that no fsync stands between; this is the order that it must find."""
    folder = arena.folder()
    folder.mkdir()
    trace = folder.with_suffix(".trace")
    saves.traced_save(
        arena.config(), folder, "--trace=fsync,rename,renameat,renameat2", "--decode-fds=path", f"--output={trace}"
    )
    calls = re.findall(r"(fsync)\(\d+<[^>]*/([^>]+)>|(rename)\w*\([^\"]*\"[^\"]*/([^\"]+)\"", trace.read_text())
    files = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
    found = [" ".join(filter(None, call)) for call in calls]
    found = [call for call in found if not call.startswith("rename .tmp")]  # of safetensors, before its file is synced
    synced = [f"fsync {name}" for name in (*files, "step-0000002.tmp")]
    assert found == [*synced, "rename step-0000002.tmp", "fsync checkpoints", f"fsync {folder.name}"]
