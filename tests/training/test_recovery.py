"""What a run does when the machine fails it, and what it leaves behind."""

import errno
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from conftest import build, tiny
from khanhllm import settings
from khanhllm.errors import UserError
from khanhllm.settings import resolve, to_toml
from khanhllm.training import checkpoint
from khanhllm.training import run as training_run
from khanhllm.training.guard import Guard
from khanhllm.training.start import write_start


def config(corpus, cache, **train):
    data = {"source": str(corpus), "cache": str(cache), "validation": 0.2, "workers": 1}
    return resolve(tiny().model_dump(), {"data": data, "train": {"steps": 3, "eval_tokens": 200} | train})


def ours():
    """The threads that we start: of the batches, and the one that saves."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("batches", "checkpoint"))]


class Clock:
    """Says what the test lets pass."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


def test_rows_that_come_late_once_do_not_end_a_run_with_a_time(corpus, tmp_path, monkeypatch):
    clock, honest = Clock(), training_run.train_step

    def step(learner, state, rows):
        state, row = honest(learner, state, rows)
        clock.now += 6.0 if state.step == 1 else 1.0
        return state, row | {"waiting": 5 / 6 if state.step == 1 else 0.0}

    monkeypatch.setattr(training_run, "time", clock)
    monkeypatch.setattr(training_run, "train_step", step)
    training_run.train(config(corpus, tmp_path / "cache", steps=1, seconds=10.0, save_every=0), tmp_path / "run")
    assert clock.now >= 9.0


def test_only_a_rejected_step_raises_doubts(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(Guard, "doubts", lambda *_: True)
    monkeypatch.setattr(training_run, "recover", lambda *_: pytest.fail("each step was accepted"))
    training_run.train(config(corpus, tmp_path / "cache"), tmp_path / "run")


def test_a_full_disk_leaves_no_half_of_a_run_that_is_to_begin(tmp_path):
    def full(path):
        raise UserError(f"cannot write the tokenizer {path}: No space left on device")

    tokenizer = SimpleNamespace(sha256="", save=full)
    with pytest.raises(UserError, match="cannot write the tokenizer"):
        write_start(tmp_path / "run", tiny(), build(tiny()), tokenizer)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_without_a_compiler_a_run_trains_uncompiled_and_says_so_once(corpus, tmp_path):
    (tmp_path / "tiny.toml").write_text(to_toml(config(corpus, tmp_path / "shards")), "utf-8")
    bare = {"PATH": "/nonexistent", "CXX": "/nonexistent/g++"}
    bare["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "inductor")  # nothing that was compiled before
    heard = {}
    for compiled in ("on", "off"):
        run = [sys.executable, "-m", "khanhllm", "train", "--config", tmp_path / "tiny.toml"]
        place = ["--run", tmp_path / compiled, "--machine.compile", compiled]
        done = subprocess.run(run + place, env=os.environ | bare, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        heard[compiled] = done.stdout
    assert heard["on"].count("torch.compile does not work here") == 1
    assert "torch.compile" not in heard["off"]
    logs = [(tmp_path / compiled / "training_log.csv").read_text().splitlines() for compiled in ("on", "off")]
    exact = [[line.split(",")[:4] for line in log] for log in logs]
    assert exact[0] == exact[1] and len(exact[0]) == 4


def test_no_thread_of_ours_outlives_a_training(corpus, tmp_path, monkeypatch):
    training_run.train(config(corpus, tmp_path / "shards"), tmp_path / "run")
    assert not ours()
    monkeypatch.setattr(training_run, "write_samples", lambda *_: (_ for _ in ()).throw(UserError("enough")))
    with pytest.raises(UserError, match="enough"):
        training_run.train(config(corpus, tmp_path / "shards"), tmp_path / "other")
    assert not ours()


def test_a_step_that_ran_out_of_memory_leaves_no_thread_either(corpus, tmp_path, monkeypatch):
    honest, errors = training_run.train_step, [RuntimeError("out of memory")]

    def full_once(learner, state, rows):
        if errors:
            next(rows)
            raise errors.pop()
        result = honest(learner, state, rows)
        assert ours().count("batches") == 1
        return result

    monkeypatch.setattr(training_run, "train_step", full_once)
    training_run.train(config(corpus, tmp_path / "shards"), tmp_path / "run")
    assert not ours()


def test_memory_that_runs_out_while_the_disk_is_full_ends_no_training(corpus, tmp_path, monkeypatch):
    honest, publish = training_run.train_step, settings.publish

    def disk_full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_once(learner, state, rows):
        if settings.publish is publish:
            monkeypatch.setattr(settings, "publish", disk_full)
            raise RuntimeError("out of memory")
        return honest(learner, state, rows)

    monkeypatch.setattr(training_run, "train_step", full_once)
    training_run.train(config(corpus, tmp_path / "shards"), tmp_path / "run")
    said = (tmp_path / "run" / "messages.txt").read_text()
    assert f"config.toml: {os.strerror(errno.ENOSPC)}; training continues" in said
    assert "again with micro-batches of 1 instead of 2" in said
    assert settings.read_config(tmp_path / "run").train.rows == 2
    assert checkpoint.newest(tmp_path / "run").name == "step-0000003"
