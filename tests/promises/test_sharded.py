"""A model in shards (machine.split = all) trains as one that lies whole on each process, or on one: to the same bits
where each process has one micro-batch of a step. Its checkpoints are the same too."""

import pytest
from hands import with_fault
from test_processes import KINDS as OF_OWNERS
from test_processes import short, together
from test_resume import outcome

from khanhllm.errors import UserError
from khanhllm.machine import launch
from khanhllm.model import losses
from khanhllm.model.counts import on_paper, total_parameters
from khanhllm.planning import budget
from khanhllm.schema import Config
from khanhllm.settings import resolve
from khanhllm.training import checkpoint
from khanhllm.training.run import train

KINDS = {name: kind for name, kind in OF_OWNERS.items() if not name.endswith("bf16") and name != "tied"} | {
    "autocast": {"machine": {"precision": "bf16", "checkpointing": "selective"}, "optim": {"name": "muon"}},
    "classic": {"model": {"style": "classic"}},
    "tables": {"model": {"value_embedding": True, "pair_embedding": 50, "embedding_skip": True}},
    "shift": {"model": {"token_shift": True, "stream_scale": True}},
}
SOME = ["muon", "autocast"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


def cut(whole: Config, **machine: object) -> Config:
    return resolve(whole.model_dump(), {"machine": {"split": "all"} | machine})


@pytest.mark.parametrize(
    ("size", "kinds"),
    [
        (2, SOME),
        pytest.param(2, KINDS.keys() - SOME, marks=pytest.mark.slow),
        pytest.param(3, KINDS, marks=pytest.mark.slow),
    ],
    ids=["two", "two-others", "three"],
)
def test_shards_change_no_bit(size, kinds, corpus, cache, tmp_path):
    """Neither of weights, moments and log, nor of what the run writes."""
    runs = {name: resolve(short(corpus, cache, size, **KINDS[name]).model_dump(), SAMPLES) for name in kinds}
    for name, whole in runs.items():
        train(whole, tmp_path / "one" / name)
    assert not together(size, tmp_path / "x", *((cut(runs[name]), tmp_path / name, False, None) for name in runs))
    for name in runs:
        assert outcome(tmp_path / name) == outcome(tmp_path / "one" / name), name
        assert (tmp_path / name / "samples.txt").read_text() == (tmp_path / "one" / name / "samples.txt").read_text()


SAMPLES = {"train": {"sample_every": 7}}


def test_any_split_goes_on_where_another_stopped(corpus, cache, tmp_path, monkeypatch):
    """Also where each process writes its part of a checkpoint. Several micro-batches on each change no more than
    rounding does."""
    whole, six = short(corpus, cache, 2, optim={"name": "muon"}), short(corpus, cache, 6, train={"steps": 20})
    train(whole, tmp_path / "whole")
    train(six, tmp_path / "six")
    for folder in ("one-all", "one-all-owners"):
        monkeypatch.setattr(losses, "micro_batch_loss", with_fault(0, 7, "SIGTERM"))
        assert train(whole, tmp_path / folder) == "SIGTERM"
        monkeypatch.undo()
    trainings = [
        (cut(whole), "all-one", False, [1, 4, "SIGTERM"], {"shared": True}),
        (cut(whole), "one-all-owners", True, [0, 2, "SIGTERM"]),
        (whole, "one-all-owners", True, None),
        (cut(whole), "one-all", True, None, {"shared": True}),
        (cut(six), "six-all", False, None),
    ]
    assert not together(2, tmp_path / "x", *((kind, tmp_path / name, *more) for kind, name, *more in trainings))
    assert checkpoint.step_of(checkpoint.steps(tmp_path / "all-one")[0]) == 4
    for folder in ("one-all", "all-one"):
        assert (checkpoint.newest(tmp_path / folder) / "optimizer-00002-of-00002.safetensors").exists()
    assert train(cut(whole), tmp_path / "all-one", resume=True) == ""
    for folder in ("one-all", "all-one", "one-all-owners"):
        assert outcome(tmp_path / folder) == outcome(tmp_path / "whole"), folder
    near, far = ([float(row["loss"]) for row in outcome(tmp_path / folder)[1]] for folder in ("six-all", "six"))
    assert near == pytest.approx(far, abs=1e-3)


def test_what_fails_on_one_process(corpus, cache, tmp_path, monkeypatch):
    """Of a NaN all reject the step, and go back where that is due. Without memory, or where one is gone, the others
    cannot take the step again: they end. Of weights, gradients and moments each holds its part."""
    whole = short(corpus, cache, 2, train={"micro_batch": 2}, machine={"patience": 30.0})
    back = resolve(whole.model_dump(), {"guard": {"patience": 1}})
    large = short(corpus, cache, 4, train={"steps": 2}, model={"dim": 128, "hidden": 512, "expert_hidden": 256})
    for name, kind, nth in (("nan", whole, 3), ("restart", back, 3), ("return", back, 7)):
        monkeypatch.setattr(losses, "micro_batch_loss", with_fault(0, 2 * nth, "nan"))
        train(kind, tmp_path / "one" / name)
    monkeypatch.undo()
    monkeypatch.setattr(launch, "GRACE", 5.0)
    trainings = [
        (large, "large", [1, 4, "bytes"]),
        (whole, "nan", [1, 3, "nan"]),
        (back, "restart", [1, 3, "nan"]),
        (back, "return", [1, 7, "nan"]),
        (whole, "memory", [1, 3, "memory"]),
    ]
    with pytest.raises(
        launch.Failed, match=r"of 2; go on with --resume --train.micro_batch 1 --train.acc.* 4"
    ) as failed:
        together(2, tmp_path / "x", *((cut(kind), tmp_path / name, False, fault) for kind, name, fault in trainings))
    assert failed.value.exit_code == 2
    for name in ("nan", "restart", "return"):
        assert outcome(tmp_path / name) == outcome(tmp_path / "one" / name), name
    held = next(int(line) for line in (tmp_path / "x" / "said-1.txt").read_text().splitlines() if line.isdigit())
    whole_of_it = 16 * total_parameters(on_paper(large.model))  # in fp32, in the second micro-batch of the second step
    assert 0.5 * whole_of_it < held < 0.55 * whole_of_it


@pytest.mark.slow
def test_nobody_waits_for_one_that_is_gone(corpus, cache, tmp_path):
    whole = short(corpus, cache, 2, machine={"patience": 30.0})
    with pytest.raises(launch.Failed, match="process 1 of 2 was ended by SIGKILL; --resume") as failed:
        together(2, tmp_path / "x", (cut(whole), tmp_path / "gone", False, [1, 8, "SIGKILL"]))
    assert failed.value.exit_code == 75
    train(whole, tmp_path / "gone", resume=True)
    train(whole, tmp_path / "whole")
    assert outcome(tmp_path / "gone") == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_compiled_blocks_in_shards(corpus, cache, tmp_path):
    plain = short(corpus, cache, 2, train={"steps": 4})
    kinds = {"plain": cut(plain), "compiled": cut(plain, compile="on")}
    assert not together(2, tmp_path / "x", *((kind, tmp_path / name, False, None) for name, kind in kinds.items()))
    near, far = ([float(row["loss"]) for row in outcome(tmp_path / name)[1]] for name in kinds)
    assert near == pytest.approx(far, abs=1e-4)


@pytest.mark.parametrize(
    ("machine", "says"),
    [
        ({"weights": "bf16"}, "split = all needs weights = fp32"),
        ({"shares": "2,1"}, "leave shares empty"),
        ({"device": "cuda:1"}, "split = all needs device = auto, cuda or cpu"),
    ],
)
def test_what_cannot_be_cut_is_refused_at_once(machine, says):
    with pytest.raises(UserError, match=says):
        cut(Config(), **machine)


def test_each_process_needs_as_many_rows():
    step = resolve(Config().model_dump(), {"train": {"micro_batch": 2, "accumulation": 3}})
    even = budget.shared_out(step, 2, evenly=True).train
    assert (even.rows, even.accumulation) == (1, 6)
    assert budget.shared_out(step, 3, evenly=True) == budget.shared_out(step, 2) == step
    with pytest.raises(UserError, match=r"4 processes equally many micro-batches; take a train\.accumulation that 4"):
        budget.shared_out(step, 4, evenly=True)
