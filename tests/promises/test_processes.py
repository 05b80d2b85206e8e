"""Several processes train as one does: bit for bit where each has one micro-batch of a step, else but for rounding.

Sums run in the order of the ranks, a parameter is updated whole by one process, and a checkpoint does not know how many
there were.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import forks
import pytest
from test_resume import config, outcome

from khanhllm.machine import launch
from khanhllm.training import checkpoint
from khanhllm.training.run import train


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


def together(size: int, place: Path, *trainings: tuple[Any, ...]) -> str:
    """Run trainings one after the other on so many processes: config, folder, resume, fault, more (see hands.py)."""
    place.mkdir()
    told = [
        [settings.model_dump(), str(folder), resume, fault, more[0] if more else {}]
        for settings, folder, resume, fault, *more in trainings
    ]
    (place / "trainings.json").write_text(json.dumps(told))
    return forks.run(place / "trainings.json", size, place)


WIDE = {"dim": 64, "hidden": 128}
BF16 = {"weights": "bf16"}
KINDS = {
    "adamw": {},
    "muon": {"optim": {"name": "muon", "clip": 0.5}},
    "adamw8bit": {"optim": {"name": "adamw8bit"}, "model": WIDE},
    "muon8bit": {"optim": {"name": "muon8bit"}, "model": WIDE},
    "adamw-bf16": {"machine": BF16},
    "muon-bf16": {"optim": {"name": "muon"}, "machine": BF16},
    "adamw8bit-bf16": {"optim": {"name": "adamw8bit"}, "model": WIDE, "machine": BF16},
    "muon8bit-bf16": {"optim": {"name": "muon8bit"}, "model": WIDE, "machine": BF16},
    "current-load": {"loss": {"load": "current"}, "machine": {"checkpointing": "full"}, "model": {"router_bias": True}},
    "documents": {"train": {"document_mask": True}},
    "unclipped": {"optim": {"clip": 0.0}, "model": {"pattern": "DD"}},
    "tied": {"optim": {"name": "muon", "clip": 0.5, "expert_every": 2}, "schedule": {"tied_experts": 0.5}},
}


def short(corpus, cache, accumulation, **settings):
    length = {"steps": 10, "accumulation": accumulation, "micro_batch": 1, "sample_every": 0}
    return config(corpus, cache, **settings | {"train": length | settings.get("train", {})})


SOME = ["muon8bit-bf16", "current-load", "tied"]
"""test_process_laws has AdamW and Muon"""


@pytest.mark.parametrize(
    ("size", "kinds"),
    [
        (2, SOME),
        pytest.param(2, KINDS.keys() - SOME, marks=pytest.mark.slow),
        pytest.param(4, KINDS, marks=pytest.mark.slow),
    ],
    ids=["two", "two-others", "four"],
)
def test_several_processes_equal_one_bit_for_bit(size, kinds, corpus, cache, tmp_path):
    runs = {name: short(corpus, cache, size, **KINDS[name]) for name in kinds}
    mixture = {"source": f"{corpus}/json*.txt:1,{corpus}/logging*.txt:2", "shard_tokens": 600, "cache": str(tmp_path)}
    runs["belt"] = short(corpus, cache, size, data=mixture | {"validation": 0.2})
    many = [(whole, tmp_path / "many" / name, False, None, {"size": size}) for name, whole in runs.items()]
    apart = {"size": 1, "first": size}  # the last process, beside the others; but a belt makes its shards once
    one = [
        (whole, tmp_path / "one" / name, False, None, {"size": 1} if name == "belt" else apart)
        for name, whole in runs.items()
    ]
    assert not together(size + 1, tmp_path / "x", *many, *one)
    for name in runs:
        assert outcome(tmp_path / "many" / name) == outcome(tmp_path / "one" / name), name


@pytest.mark.parametrize("rank", [0, 1])
def test_all_end_with_what_keeps_one_from_its_rows(rank, corpus, cache, tmp_path):
    """Saved, and as that one would alone: the first process does not end as if a signal had asked for it."""
    whole, run = short(corpus, cache, 2), tmp_path / "run"
    says = r"^\[Errno 5\] Input/output error \(at step 6; to continue: --resume --run \S+run\)$"
    with pytest.raises(launch.Failed, match=says) as failed:
        together(2, tmp_path / "x", (whole, run, False, None, {"unread": [rank, 12]}))
    assert failed.value.exit_code == 2
    assert "stopped by" not in (run / "messages.txt").read_text()
    assert checkpoint.newest(run).name == "step-0000006"
    train(whole, run, resume=True)
    train(whole, tmp_path / "whole")
    assert outcome(run) == outcome(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="Windows knows no SIGSTOP")
@pytest.mark.slow
def test_nobody_waits_for_one_that_hangs(corpus, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 1.0)
    whole = short(corpus, cache, 2, machine={"patience": 3.0})
    with pytest.raises(launch.Failed, match="process 1 of 2 did not answer; --resume") as failed:
        together(2, tmp_path / "x", (whole, tmp_path / "run", False, [1, 8, "SIGSTOP"]))
    assert failed.value.exit_code == 75
    train(whole, tmp_path / "run", resume=True)
    train(whole, tmp_path / "whole")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_torchrun_starts_them_too(corpus, cache, tmp_path):
    import subprocess

    from khanhllm.settings import to_toml

    whole = short(corpus, cache, 2)
    (tmp_path / "own.toml").write_text(to_toml(whole))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--", "khanhllm", "train"]
    words += ["--config", str(tmp_path / "own.toml"), "--run", str(tmp_path / "run"), "--resume-or-new"]
    subprocess.run([sys.executable, *words], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    train(whole, tmp_path / "whole")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
