"""CORE asks as llm-foundry asks, centres each accuracy, and says of how many tasks it is the mean."""

import json
import random

import pytest
from evaluated import a_run

from khanhllm.cli import main
from khanhllm.inference.likelihood import Likelihood
from khanhllm.lab import answers, core, scores, sets
from khanhllm.lab.core import TASKS, Task

SHOWN = [[3, 4, 5], [0, 4, 5], [0, 1, 5], [1, 4, 5], [0, 1, 5], [0, 3, 4]]
"""what llm-foundry's get_fewshot_sample_idxs draws for 3 of 6 examples, with its own seed"""


def a_set(folder, name, rows):
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return sets.load(path)


def test_examples_are_those_of_llm_foundry_also_for_a_part_of_the_questions(tmp_path):
    chance = random.Random(core.SEED)
    assert [core._examples(6, 3, number, chance) for number in range(6)] == SHOWN
    source = a_set(tmp_path, "any", [{"context": f"C{n} ", "continuation": f"a{n}"} for n in range(6)])
    every = core.prompts(source, Task("any", 3, 0), 6)
    assert core.prompts(source, Task("any", 3, 0), 3) == every[::2]
    assert every[1].choices == [("C0 a0\nC4 a4\nC5 a5\nC1 ", "a1")]


def test_a_choice_is_shown_with_its_right_answer_and_asked_with_each(tmp_path):
    rows = [{"query": f"Question: q{n}", "choices": ["no", "yes"], "gold": n % 2} for n in range(3)]
    prompts = core.prompts(a_set(tmp_path, "any", rows), Task("any", 10, 0.5, core.ANSWER), 3)
    before = "Question: q0\nAnswer: no\nQuestion: q2\nAnswer: no\nQuestion: q1\nAnswer: "
    assert prompts[1].choices == [(before, "no"), (before, "yes")] and prompts[1].right == 1


def test_the_mean_is_over_centred_accuracies_of_the_tasks_that_are_there(tmp_path, monkeypatch):
    """Copa is right in 3 of 4, boolq always; a choice is taken by its likelihood per token."""
    monkeypatch.setattr(answers, "encode", lambda _tokenizer, *pair: pair)
    monkeypatch.setattr(
        answers,
        "log_likelihoods",
        lambda _model, pairs, _machine: [
            Likelihood(-6.0 if "long" in p[1] else -4.0, False, 3 if "long" in p[1] else 1, 0) for p in pairs
        ],
    )
    opened = type("Opened", (), {"tokenizer": None, "model": None, "machine": None})()
    loaded = {
        "copa": a_set(
            tmp_path, "copa", [{"query": "q", "choices": ["long", "b"], "gold": int(n == 0)} for n in range(4)]
        ),
        "boolq": a_set(tmp_path, "boolq", [{"query": "q", "choices": ["b", "long"], "gold": 1} for _ in range(4)]),
    }
    found = core.measure(opened, core.asked(loaded, 10))
    assert [task["value"] for task in found["tasks"].values()] == [0.75, 1.0]
    assert found["value"] == pytest.approx(((0.75 - 0.5) / 0.5 + 1) / 2) and found["of"] == 22
    assert found["error"] == pytest.approx(found["tasks"]["copa"]["error"] / 0.5 / 2)
    told = list(scores.told({"core": found, "missing": [], "notes": []}))
    assert told[-1].startswith("CORE 0.7500 ±") and told[-1].endswith("over 2 of 22 tasks")
    nothing = core.measure(opened, {})
    assert list(scores.told({"core": nothing, "missing": [], "notes": []})) == ["CORE: none of its files are there"]


def test_the_tasks_are_dclm_s():
    assert len(TASKS) == 22 and len(core.files()) == 21, "hellaswag counts twice"
    assert all(0 <= task.chance < 1 and task.shots in (0, 3, 10) for task in TASKS.values())


def test_the_verb_tells_each_task_and_counts_what_does_not_fit(tmp_path, capsys):
    run, files = a_run(tmp_path / "run", context=1024), tmp_path / "files"
    files.mkdir()
    a_set(
        files,
        "winograd_wsc",
        [{"context_options": ["A b", "A c"], "continuation": "d e", "gold": n % 2} for n in range(4)],
    )
    a_set(files, "squad", [{"context": "the old key " * 200 + str(n), "continuation": "box"} for n in range(12)])
    words = ["evaluate", str(run.checkpoint.parents[1]), "--suite", "--core", "--items", "4", "--files", str(files)]
    assert main([*words, "--machine.threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "CORE" in said and "over 2 of 22 tasks" in said and "(4 items, 4 cut)" in said
    assert "hellaswag" in said, "among what is not there"
