"""The checkpoint with the best validation is kept, found again, and spoken of when the run ends clearly above it."""

import pytest

import khanhllm
from conftest import tiny
from khanhllm.errors import UserError
from khanhllm.log.run_log import best_of, validations_of
from khanhllm.runs.run import find_checkpoint
from khanhllm.settings import resolve
from khanhllm.training import checkpoint
from khanhllm.training import run as training_run


def config(corpus, cache, **train):
    data = {"source": str(corpus), "cache": str(cache), "validation": 0.2, "workers": 1}
    length = {"steps": 12, "eval_every": 1, "save_every": 2, "keep": 2}
    return resolve(tiny().model_dump(), {"data": data, "train": length}, {"train": train})


def scripted(monkeypatch, losses):
    """Validations with these losses, in this order."""
    coming = iter(losses)

    def validate(parts, tokens, stop):
        loss = next(coming)
        return {"val_ce": loss, "val_bpb": loss, "val_tokens": 1, "val_bytes": 1}

    monkeypatch.setattr(training_run, "validate", validate)


def kept(run):
    return sorted(map(checkpoint.step_of, checkpoint.steps(run)))


RISING = [5, 4, 3.5, 3, 3.2, 3.4, 3.6, 3.8, 4, 4.2, 4.4, 4.6]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


def test_the_best_is_kept_beyond_the_newest(corpus, cache, tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, RISING)
    chosen = config(corpus, cache)
    training_run.train(chosen, tmp_path / "run")
    assert kept(tmp_path / "run") == [4, 10, 12]
    told = [line for line in capsys.readouterr().out.splitlines() if "validation was best" in line]
    assert len(told) == 1
    assert "at step 4, 3.0000, and rose to 4.6000" in told[0]
    assert "that of step 4" in told[0]
    assert khanhllm.load(tmp_path / "run").step == 12
    assert khanhllm.load(tmp_path / "run", step="best").step == 4
    assert khanhllm.load(tmp_path / "run", step=10).step == 10
    with pytest.raises(UserError, match="no checkpoint of step 2; it has 4, 10, 12, and best"):
        khanhllm.load(tmp_path / "run", step=2)
    (tmp_path / "run" / "checkpoints" / "step-0000004" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="not intact"):
        khanhllm.load(tmp_path / "run", step="best")


def test_a_resumed_run_knows_what_was_best(corpus, cache, tmp_path, monkeypatch):
    scripted(monkeypatch, RISING)
    training_run.train(config(corpus, cache, steps=6), tmp_path / "run")
    training_run.train(config(corpus, cache), tmp_path / "run", resume=True)
    assert kept(tmp_path / "run") == [4, 10, 12]


def test_without_it_only_the_newest_are_kept_and_a_falling_loss_is_no_news(
    corpus, cache, tmp_path, monkeypatch, capsys
):
    scripted(monkeypatch, sorted(RISING, reverse=True))
    training_run.train(config(corpus, cache), tmp_path / "falling")
    scripted(monkeypatch, RISING)
    assert "validation was best" not in capsys.readouterr().out
    training_run.train(config(corpus, cache, keep_best=False), tmp_path / "rising")
    assert kept(tmp_path / "falling") == kept(tmp_path / "rising") == [10, 12]


def test_which_step_is_best():
    assert best_of([2, 4, 6], {1: 1.0, 3: 3.0, 6: 2.0}) == 2  # the latest validation before step 2 is that of step 1
    assert best_of([4, 6, 8], {4: 1.0, 9: 0.5}) == 4  # of equal ones the nearest to its validation
    assert best_of([2, 4], {5: 1.0}) is None
    assert best_of([], {5: 1.0}) is None


def test_a_validation_that_is_no_number_is_never_best(corpus, cache, tmp_path, monkeypatch):
    chosen = config(corpus, cache, steps=4)
    scripted(monkeypatch, [3, 2, float("nan"), float("inf")])
    training_run.train(chosen, tmp_path / "run")
    assert validations_of(tmp_path / "run", chosen) == {1: 3, 2: 2}
    assert checkpoint.step_of(find_checkpoint(tmp_path / "run", chosen, "best")) == 2
