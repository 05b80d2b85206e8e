"""A run that learns only what the assistant says, from shards of conversations."""

import csv
import json
import os
import signal

import pytest

from conftest import tiny
from khanhllm import cli
from khanhllm.data.tokenizer import train_tokenizer
from khanhllm.errors import UserError
from khanhllm.runs.evaluate import score_opened
from khanhllm.runs.run import open_run
from khanhllm.settings import resolve
from khanhllm.training import run as training_run
from khanhllm.training.run import train
from khanhllm.training.step import Learner


def config(talks, **settings):
    run = {
        "data": {"source": str(talks)},
        "train": {"micro_batch": 1, "steps": 24, "eval_every": 8, "save_every": 8, "targets": "answers"}
        | {"document_mask": True},
        "schedule": {"warmup": 2},
        "log": {"every": 1},
    }
    return resolve(resolve(tiny().model_dump(), run).model_dump(), settings)


def logged(run):
    timing = {"tokens_per_s", "mfu", "waiting", "memory_mb", "seconds"}
    with (run / "training_log.csv").open() as file:
        return [{key: cell for key, cell in row.items() if key not in timing} for row in csv.DictReader(file)]


def test_steps_without_an_answer_pass_by(talks, tmp_path, capsys, monkeypatch):
    train(config(talks), tmp_path / "run")
    rows = logged(tmp_path / "run")
    empty = [row for row in rows if row["counted"] == "0"]
    assert 3 < len(empty) < 10 and all(row["loss"] == row["grad_norm"] == "" for row in empty)
    assert all(float(row["loss"]) > 0 and int(row["counted"]) > 2 for row in rows if row not in empty)
    assert {row["rejected"] for row in rows} == {"0"} and "nan" not in capsys.readouterr().err

    honest = training_run.train_step

    def stopping(parts, state, batches):
        result = honest(parts, state, batches)
        if "loss" not in result[1]:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(training_run, "train_step", stopping)  # stops after each of them
    for nth in range(len(empty)):
        train(config(talks), tmp_path / "pieces", resume=nth > 0)
    monkeypatch.undo()
    train(config(talks), tmp_path / "pieces", resume=True)
    assert logged(tmp_path / "pieces") == rows


def test_the_validation_counts_the_held_out_answers(talks, tmp_path):
    train(config(talks), tmp_path / "run")
    score = score_opened(open_run(tmp_path / "run"))
    assert score["val_ce"] == pytest.approx(float(logged(tmp_path / "run")[-1]["val_ce"]), abs=1e-5)
    assert score["val_tokens"] == 4 * (len(train_tokenizer(["what is one and one? two!"], 270).encode("two!")) + 1)


def test_a_validation_without_an_answer_is_refused_before_training(talks, tmp_path, monkeypatch):
    monkeypatch.setattr(training_run, "train_step", lambda *_: pytest.fail("it trains"))
    with pytest.raises(UserError, match="no answer among the first 32 tokens that are held out"):
        train(config(talks, train={"eval_tokens": 32}), tmp_path / "run")


def test_a_tokenizer_without_roles_is_refused_in_one_line(talks, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Learner, "new", lambda *_: pytest.fail("the model was made first"))
    layout = json.loads((talks / "tokenizer.json").read_text())
    for token in layout["added_tokens"]:
        if token["content"] == "<|end|>":
            token["content"] = "<|fin|>"
            layout["model"]["vocab"]["<|fin|>"] = layout["model"]["vocab"].pop("<|end|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout))
    (tmp_path / "text.txt").write_text("what is one and one? two! " * 300)
    words = ["train", "nano", "--data", str(tmp_path / "text.txt"), "--run", str(tmp_path / "run")]
    words += ["--data.tokenizer", str(tmp_path / "tokenizer.json"), "--data.cache", str(tmp_path / "cache")]
    words += ["--model.context", "32", "--train.targets", "answers"]
    assert cli.main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert "the tokenizer has no token <|end|>" in said[-1]
