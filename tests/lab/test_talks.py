"""What a tuned run makes of the conversations that it held out: the answers are those that count in training, their
nats are those of validation, and what it writes is what `chat` writes."""

import json
from dataclasses import replace

import numpy as np
import pytest

from conftest import tiny
from khanhllm.chaos.server import FaultyServer
from khanhllm.data.batches import batch_of
from khanhllm.data.counting import Marks, counted
from khanhllm.errors import UserError
from khanhllm.lab import experts, suite, talks
from khanhllm.lab.sample import take
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


def test_what_is_scored_is_downloaded_once(opened, tmp_path):
    (tmp_path / "chats.jsonl").write_text('{"question": "2 + 3?", "answer": "5"}\n' * 99)
    (tmp_path / "lines.jsonl").write_text('{"text": "2 + 3 = 5"}\n' * 99)
    for name in ("chats.jsonl", "lines.jsonl"):
        with FaultyServer(tmp_path) as server:
            assert score_opened(opened, f"{server.url}/{name}")["val_ce"]
        asked = 1 if name == "chats.jsonl" else 2  # whether it is there, once or twice
        assert len(server.log) == asked + 1
        with FaultyServer(tmp_path) as server:
            assert len(take(opened, f"{server.url}/{name}", 128).ids) == 2
        assert len(server.log) == asked + 1


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


def test_the_laboratory_reads_conversations_as_training_does(opened):
    """Only answers count, no conversation sees another, and nobody looks at what fills a row."""
    sample, scored = take(opened, None, 10**6), score_opened(opened)
    found = experts.examine(opened, sample)
    assert found["bits_per_byte"] == pytest.approx(scored["val_bpb"], rel=1e-5)
    measure = suite.bits_per_byte(opened, None)
    assert measure["value"] == pytest.approx(scored["val_bpb"], rel=1e-5) and measure["title"] == "held-out answers"
    end, ids = opened.tokenizer.end_of_text, sample.ids
    padding = int(((ids[:, :-1] == end) & (ids[:, 1:] == end)).sum())
    assert padding and found["tokens"] == ids[:, 1:].size - padding
    batch = batch_of(ids, reading=sample.reading)
    _, (routing,) = opened.model(batch.inputs_BT, batch.targets_BT, *batch.extras)
    shares = [one["share"] for one in found["layers"][0]["experts"]]
    assert shares == pytest.approx((routing.load_E / routing.load_E.sum()).tolist())


def test_the_laboratory_reads_other_conversations_too(opened):
    source = str(opened.checkpoint.parents[2] / "chats.jsonl")
    value = suite.bits_per_byte(opened, source)["value"]
    assert value == pytest.approx(score_opened(opened, source)["val_bpb"], rel=1e-5)
    with pytest.raises(UserError, match="leave out --part"):
        take(opened, source, 1000, "file")


def test_a_suite_without_the_conversations_measures_the_rest(opened):
    found = suite.examine(replace(opened, state=opened.state | {"folder": "/nowhere"}), opened.data, most=4)
    assert "brackets" in found["measures"] and "answer_nats" not in found["measures"]
    assert any(note.startswith("no held-out answers: the shards of this run") for note in found["notes"])
