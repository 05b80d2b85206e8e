"""A run whose experts lie on several processes is the run of one process, but for rounding, and so is its checkpoint.

Rounding: an expert's gradient is one product over the tokens of all processes, instead of a sum of products.
"""

import pytest
import torch
from hands import with_fault
from safetensors.torch import load_file
from test_processes import short, together
from test_resume import outcome

from conftest import plain_machine
from khanhllm.machine import launch
from khanhllm.model import losses
from khanhllm.training import checkpoint
from khanhllm.training.run import train
from khanhllm.training.step import Learner


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


APART = {"machine": {"expert_processes": 2}}
KINDS = {
    "muon": {"optim": {"name": "muon", "clip": 0.3}},
    "current-load": {"loss": {"load": "current"}, "model": {"router_bias": True}, "checkpointing": "full"},
    "muon8bit": {"optim": {"name": "muon8bit"}, "model": {"dim": 64, "hidden": 128}},
    "classic": {"model": {"style": "classic"}, "train": {"document_mask": True}},
    "compiled": {"compile": "on", "checkpointing": "full"},
    "adamw8bit-bf16": {"optim": {"name": "adamw8bit"}, "model": {"dim": 64, "hidden": 128}, "weights": "bf16"},
}


def of(kind, corpus, cache, apart=True, steps=20):
    settings = dict(KINDS[kind])
    machine = {key: settings.pop(key) for key in ("checkpointing", "weights", "compile") if key in settings}
    train = {"steps": steps, "sample_every": 7} | settings.pop("train", {})
    return short(corpus, cache, 4, **settings, train=train, machine=machine | (APART["machine"] if apart else {}))


def near(run, other, tolerance=1e-3):
    """The logs of two runs differ by no more than rounding; near a tie a token may go to another expert."""
    for name in ("loss", "val_ce"):
        ours, theirs = ([float(row[name]) for row in outcome(place)[1] if row[name]] for place in (run, other))
        assert len(ours) > 1 and ours == pytest.approx(theirs, abs=tolerance), name


@pytest.mark.parametrize(
    ("size", "kinds"),
    [
        (2, ["muon", "current-load"]),
        pytest.param(2, ["classic", "muon8bit", "adamw8bit-bf16", "compiled"], marks=pytest.mark.slow),
        pytest.param(4, ["muon", "current-load", "muon8bit"], marks=pytest.mark.slow),
    ],
    ids=["two", "two-others", "four"],
)
def test_a_run_is_that_of_one_process_but_for_rounding(size, kinds, corpus, cache, tmp_path):
    """Twice the same, it has the same bits, whoever writes its checkpoints. With four processes, two hold the same
    experts."""
    trainings = [(of(kind, corpus, cache), tmp_path / "apart" / kind, False, None) for kind in kinds]
    trainings.append((of(kinds[0], corpus, cache), tmp_path / "again", False, None, {"shared": True}))
    assert together(size, tmp_path / "x", *trainings) == ""
    assert outcome(tmp_path / "again") == outcome(tmp_path / "apart" / kinds[0])
    parts = [*checkpoint.newest(tmp_path / "again").glob("*.safetensors")]
    sizes = [path.stat().st_size for path in parts if path.name.startswith("model")]
    assert len(parts) == 2 * size and max(sizes) < 1.3 * sum(sizes) / size
    for kind in kinds:
        train(of(kind, corpus, cache, apart=False), tmp_path / "one" / kind)
        near(tmp_path / "apart" / kind, tmp_path / "one" / kind, 2e-2 if "bf16" in kind else 1e-3)
        norms = [[float(row["grad_norm"]) for row in outcome(tmp_path / p / kind)[1]] for p in ("apart", "one")]
        assert norms[0] == pytest.approx(norms[1], rel=0.2 if "bf16" in kind else 1e-2)
        samples = [(tmp_path / p / kind / "samples.txt").read_text().count("--- step") for p in ("apart", "one")]
        assert samples == [3, 3]


def test_a_checkpoint_does_not_know_where_experts_lay(corpus, cache, tmp_path, monkeypatch):
    """One process goes on from two, and two from one; a signal reaches one of them. Of a NaN all reject the step."""
    apart, one = (of("muon", corpus, cache, where, steps=10) for where in (True, False))
    train(one, tmp_path / "whole")
    monkeypatch.setattr(losses, "micro_batch_loss", with_fault(0, 16, "SIGTERM"))
    assert train(one, tmp_path / "1-2") == "SIGTERM"
    monkeypatch.undo()
    trainings = [(apart, tmp_path / "nan", False, [1, 5, "nan"]), (apart, tmp_path / "1-2", True, None)]
    assert together(2, tmp_path / "x", *trainings, (apart, tmp_path / "2-1", False, [1, 8, "SIGTERM"])) == "SIGTERM"
    assert [row["rejected"] for row in outcome(tmp_path / "nan")[1]][1:4] == ["0", "1", "0"]
    near(tmp_path / "1-2", tmp_path / "whole")
    path = checkpoint.newest(tmp_path / "2-1")
    assert checkpoint.step_of(path) == 4
    learner = Learner.new(one, plain_machine())
    checkpoint.load_model(path, learner.model)
    checkpoint.load_optimizer(path, learner.model, learner.optimizer, checkpoint.read_state(path)["optimizer"])
    again = checkpoint.snapshot(4, learner.model, learner.optimizer, {})
    for name, tensors in (("model", again.model), ("optimizer", again.optimizer)):
        kept = load_file(path / f"{name}.safetensors")
        assert kept.keys() == tensors.keys() and all(torch.equal(kept[key], tensors[key]) for key in kept)
    assert train(one, tmp_path / "2-1", resume=True) == ""
    near(tmp_path / "2-1", tmp_path / "whole")


def test_out_of_memory_ends_the_run_and_says_how_to_go_on(corpus, cache, tmp_path):
    """On one process, while the other waits for its tokens."""
    whole = short(corpus, cache, 4, train={"micro_batch": 2}, **APART)
    says = r"out of memory.*--resume --train\.micro_batch 1 --train\.accumulation 8"
    with pytest.raises(launch.Failed, match=says) as full:
        together(2, tmp_path / "x", (whole, tmp_path / "run", False, [1, 3, "memory"]))
    assert full.value.exit_code == 2
