"""A training removes old checkpoints; who opens one meanwhile gets a newer one, or is told."""

import shutil
from pathlib import Path

import pytest

from khanhllm.errors import UserError
from khanhllm.runs.run import open_run
from khanhllm.training import checkpoint, tensor_files

GOLDEN = Path(__file__).parents[1] / "golden" / "modern"


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(GOLDEN, tmp_path / "run")


@pytest.fixture
def trains(run, monkeypatch):
    """A function after which the training saves a checkpoint, and removes the old one, after each call of a function of
    `checkpoint`, at most so often."""

    def training(name, times):
        honest, before = getattr(checkpoint, name), checkpoint.steps(run)[0]
        weights, moments = (dict(tensor_files.load(before, kind)) for kind in tensor_files.KINDS)
        state = checkpoint.read_state(before)
        coming = iter(range(6, 6 + times))

        def then_saved(*given, **more):
            found = honest(*given, **more)
            if step := next(coming, None):
                checkpoint.write(run, checkpoint.Snapshot(step, weights, moments, state | {"step": step}))
                shutil.rmtree(checkpoint.folder(run, step - 1))
            return found

        monkeypatch.setattr(checkpoint, name, then_saved)

    return training


@pytest.mark.parametrize("moment", ["steps", "verify", "newest", "load_model"])
def test_the_newest_is_the_one_that_is_there(run, trains, moment):
    trains(moment, 1)
    opened = open_run(run)
    assert opened.step == 6 and opened.identity == tensor_files.identity(opened.checkpoint)


@pytest.mark.parametrize("moment", ["steps", "verify", "load_model"])
def test_one_that_was_asked_for_is_said_to_be_gone(run, trains, moment):
    trains(moment, 1)
    with pytest.raises(UserError, match=r"step-0000005 was removed while it was opened.*open a newer one$"):
        open_run(run, step=5)


def test_a_training_that_is_always_faster_is_told(run, trains):
    trains("load_model", 100)
    with pytest.raises(UserError, match="was removed while it was opened"):
        open_run(run)
