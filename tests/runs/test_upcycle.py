"""A mixture made from a dense run computes the same at first, and learns on from there."""

import pytest
import torch

from conftest import tiny
from khanhllm import cli
from khanhllm.runs.run import open_run
from khanhllm.settings import read_config, resolve, write_config
from khanhllm.training import checkpoint
from khanhllm.training.run import train


@pytest.fixture
def dense(corpus, tmp_path, request):
    style = getattr(request, "param", {})
    run = {"data": {"source": str(corpus), "cache": str(tmp_path / "shards"), "workers": 1}, "train": {"steps": 3}}
    train(resolve(tiny(pattern="DDD", **style).model_dump(), run), tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize("dense", [{"style": "classic"}, {}, {"feedforward": "relu2"}], indirect=True)
def test_it_computes_what_the_dense_model_did(dense, tmp_path):
    assert cli.main(["upcycle", str(dense), "--out", str(tmp_path / "mixture"), "--experts", "4"]) == 0
    before, after = open_run(dense), open_run(tmp_path / "mixture")
    assert after.config.model.pattern == "DMD"
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        assert torch.allclose(before.model.logits(ids), after.model.logits(ids), atol=1e-5)


def test_one_expert_alone_is_the_dense_model(dense, tmp_path):
    words = ["upcycle", str(dense), "--out", str(tmp_path / "mixture"), "--experts", "1", "--experts-per-token", "1"]
    assert cli.main(words) == 0
    before, after = open_run(dense), open_run(tmp_path / "mixture")
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        assert torch.allclose(before.model.logits(ids), after.model.logits(ids), atol=1e-5)


@pytest.mark.parametrize("more", [["--experts", "3"], ["--experts", "5", "--experts-per-token", "3"]])
def test_tied_experts_of_the_dense_run_do_not_bind_the_mixture(dense, tmp_path, more):
    """A twin keeps that key of its mixture's preset."""
    write_config(resolve(read_config(dense).model_dump(), {"schedule": {"tied_experts": 0.2}}), dense)
    assert cli.main(["upcycle", str(dense), "--out", str(tmp_path / "mixture"), *more]) == 0
    assert read_config(tmp_path / "mixture").schedule.tied_experts == 0


def test_it_goes_on_with_new_rows(dense, tmp_path):
    mixture = tmp_path / "mixture"
    assert cli.main(["upcycle", str(dense), "--out", str(mixture), "--pattern", "MMM"]) == 0
    assert cli.main(["train", "--resume", "--run", str(mixture), "--steps", "2", "--machine.threads", "1"]) == 0
    cursors = [checkpoint.read_state(checkpoint.newest(run))["cursor"] for run in (dense, mixture)]
    assert cursors[1] == cursors[0] + 2 * 2


def test_what_cannot_be_upcycled(dense, tmp_path, capsys):
    mixture = tmp_path / "mixture"
    words = ["upcycle", str(dense), "--out", str(mixture)]
    for wrong in (["--pattern", "DM"], ["--pattern", "DDD"], ["--experts", "0"], ["--experts-per-token", "9"]):
        assert cli.main([*words, *wrong]) == 2
        assert not mixture.exists()
    assert cli.main([*words, "--experts-per-token", "1"]) == 2
    assert "--experts-per-token 1: the router's probability would weigh" in capsys.readouterr().err
    assert not mixture.exists()
    assert cli.main(words) == 0
    assert cli.main(words) == 2
    assert cli.main([*words[:3], str(tmp_path / "my mixture")]) == 0
    assert capsys.readouterr().out.endswith(f"khanhllm train --resume --run '{tmp_path}/my mixture'\n")
    assert cli.main(["upcycle", str(mixture), "--out", str(tmp_path / "twice")]) == 2
    assert "mixture layers already" in capsys.readouterr().err


def test_nothing_is_written_into_a_folder_that_holds_something(dense, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "tokenizer.json").write_text("of another model")
    for words in (["upcycle", str(dense)], ["import", str(taken)]):
        assert cli.main([*words, "--out", str(taken)]) == 2
        assert capsys.readouterr().err.endswith("taken exists already and is no empty folder; choose a new one\n")
    assert [path.read_text() for path in taken.iterdir()] == ["of another model"]
