"""Run folders, shards and tokenizers of commit 68dc1be still open, score and resume as they did then."""

import json
import shutil
from pathlib import Path

import pytest

from khanhllm.log.pictures import read_log
from khanhllm.runs.evaluate import score_opened
from khanhllm.runs.run import open_run
from khanhllm.settings import read_config
from khanhllm.training.run import train

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(params=["classic", "modern"])
def run(request, tmp_path, monkeypatch) -> Path:
    """A run of ten steps, interrupted after the fifth; its config names the shards as they lie beside it."""
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path(request.param)


def test_a_checkpoint_scores_as_it_did(run):
    expected = json.loads((run / "expected.json").read_text())["score"]
    assert score_opened(open_run(run)) == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_goes_on_as_the_uninterrupted_one_did(run):
    expected = json.loads((run / "expected.json").read_text())["steps"]
    train(read_config(run), run, resume=True)
    log = read_log(run / "training_log.csv", ("step", "loss", "grad_norm"))
    found = {f"{step:.0f}": [loss, norm] for step, loss, norm in zip(*log.values(), strict=True) if step > 5}
    assert found.keys() == expected.keys()
    for step in expected:
        assert found[step] == pytest.approx(expected[step], rel=1e-4), step
