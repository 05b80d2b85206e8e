"""What a tuned run makes of the conversations that it held out: the answers are those that count in training, their
nats are those of validation, and what it writes is what `chat` writes."""

import json

import numpy as np
import pytest

from conftest import tiny
from khanhllm.data.counting import Marks, counted
from khanhllm.lab import suite, talks
from khanhllm.runs.evaluate import held_out, score_opened
from khanhllm.runs.run import open_run
from khanhllm.runs.tune import tune
from khanhllm.settings import resolve
from khanhllm.training.run import train


@pytest.fixture(scope="module")
def opened(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("talks")
    data = {"source": str(corpus), "cache": str(folder / "shards"), "workers": 1}
    machine = {"device": "cpu", "threads": 1}
    train(resolve(tiny(context=64, pattern="DM").model_dump(), {"data": data, "train": {"steps": 3}}), folder / "base")
    with (folder / "chats.jsonl").open("w") as file:
        for nth in range(300):
            turns = [(f"{nth % 10} {nth}?", f"{nth % 10}{nth % 10}"), (f"and {nth % 7}?", "yes")][: 1 + nth % 2]
            messages = [{"role": role, "content": text} for pair in turns
                        for role, text in zip(("user", "assistant"), pair, strict=True)]  # fmt: skip
            file.write(json.dumps({"messages": messages}) + "\n")
    config = tune(folder / "base", folder / "run", str(folder / "chats.jsonl"), rate=2, settings={"machine": machine})
    train(config, folder / "run", resume=True)
    return open_run(folder / "run", config.machine)


def test_the_answers_are_the_targets_that_count(opened):
    marks, context = Marks.of(opened.tokenizer), opened.config.model.context
    rows = [window[:context] for window in held_out(opened).windows()]
    targets = [row[1:][counted(row[None], marks)[0]] for row in rows]
    pairs = list(talks.held_out_answers(opened))
    assert np.concatenate(targets).tolist() == [token for _, answer in pairs for token in answer]
    assert all(before[0] == marks.end_of_text and before[-1] == marks.assistant for before, _ in pairs)
    assert any(marks.end in before for before, _ in pairs)  # second answers, after the first


def test_their_nats_are_those_of_validation(opened):
    nats, tokens, _, _ = talks.answers(opened, 10**6)
    assert nats.sum() / tokens.sum() == pytest.approx(score_opened(opened)["val_ce"], rel=1e-5)


def test_many_answers_together_are_those_of_chat(opened):
    pairs = list(talks.held_out_answers(opened))[:20]
    said = talks.likeliest(opened, [before for before, _ in pairs], tokens=8)
    for (before, _), answer in zip(pairs, said, strict=True):
        turns = opened.tokenizer.decode(before)
        if before.count(before[-1]) == 1:
            asked = [{"role": "user", "content": turns.split("|>")[2].removesuffix("<|assistant")}]
            kept = [token for token in answer if token not in opened.tokenizer.special_ids]
            assert opened.tokenizer.decode(kept) == opened.chat(asked, temperature=0, tokens=8)


def test_what_is_told_is_what_was_planted(opened, monkeypatch):
    pairs = list(talks.held_out_answers(opened))
    planted = [[right, right[:-1], right[::-1]][nth % 3] for nth, (_, right) in enumerate(pairs)]
    monkeypatch.setattr(talks, "likeliest", lambda *_, **__: planted)
    found = dict(suite.conversations(opened, 10**6))
    assert found["answers_right"]["value"] == pytest.approx(len(planted[::3]) / len(planted))
    assert found["answers_end"]["value"] == pytest.approx(len(planted[::3]) / len(planted))
    assert found["answer_nats"]["items"] == len(pairs)


def test_the_suite_has_them_for_a_run_that_talks_alone(opened, monkeypatch):
    assert {"answer_nats", "answers_end"} <= suite.examine(opened, opened.data, most=4)["measures"].keys()
    monkeypatch.setattr(type(opened), "talks", False)
    assert "answer_nats" not in suite.examine(opened, opened.data, most=4)["measures"]
