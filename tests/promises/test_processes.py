"""Several processes train as one does: bit for bit where each has one micro-batch of a step, else but for rounding.

Sums run in the order of the ranks, a parameter is updated whole by one process, and a checkpoint does not know how many
there were.
"""

import json
import sys
from pathlib import Path

import pytest
from test_resume import config, outcome

from khanhllm.machine.launch import Hands
from khanhllm.schema import Config
from khanhllm.training.run import train


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


def together(size: int, place: Path, *trainings: tuple[Config, Path, bool]) -> None:
    """Run the trainings one after the other on so many processes."""
    place.mkdir()
    (place / "trainings.json").write_text(json.dumps([[c.model_dump(), str(run), more] for c, run, more in trainings]))
    worker = [sys.executable, str(Path(__file__).with_name("hands.py")), str(place / "trainings.json")]
    assert Hands(worker, size, place).run() == ""


WIDE = {"dim": 64, "hidden": 128}
KINDS = {
    "adamw": {},
    "muon": {"optim": {"name": "muon", "clip": 0.5}},
    "adamw8bit": {"optim": {"name": "adamw8bit"}, "model": WIDE},
    "muon8bit": {"optim": {"name": "muon8bit"}, "model": WIDE},
    "muon-bf16": {"optim": {"name": "muon"}, "machine": {"weights": "bf16"}},
    "adamw8bit-bf16": {"optim": {"name": "adamw8bit"}, "model": WIDE, "machine": {"weights": "bf16"}},
    "adamw-bf16": {"machine": {"weights": "bf16"}},
    "muon8bit-bf16": {"optim": {"name": "muon8bit"}, "model": WIDE, "machine": {"weights": "bf16"}},
    "current-load": {"loss": {"load": "current"}, "machine": {"checkpointing": "full"}, "model": {"router_bias": True}},
    "documents": {"train": {"targets": "answers", "document_mask": True}},
}


def short(corpus, cache, accumulation, **settings):
    train = settings.pop("train", {}) | {"steps": 10, "accumulation": accumulation, "micro_batch": 1, "sample_every": 0}
    return config(corpus, cache, train=train, **settings)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_equal_one_bit_for_bit(size, corpus, cache, tmp_path):
    runs = {name: short(corpus, cache, size, **settings) for name, settings in KINDS.items()}
    for name, whole in runs.items():
        train(whole, tmp_path / "one" / name)
    together(size, tmp_path / "hands", *((whole, tmp_path / "many" / name, False) for name, whole in runs.items()))
    for name in runs:
        assert outcome(tmp_path / "many" / name) == outcome(tmp_path / "one" / name), name
