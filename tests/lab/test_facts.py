"""The bits that a model is said to hold are those that were planted, and no model gets time or rows of its own."""

import json
import math
from itertools import count, islice, pairwise
from threading import Event

import numpy as np
import pytest
import torch

from conftest import exit_code, plain_machine
from khanhllm import cli
from khanhllm.errors import UserError
from khanhllm.lab import facts as lab
from khanhllm.lab import recall
from khanhllm.lab.facts import BITS, CHOICES, MARKS, MODELS, NAMES, Facts, bits_stored, measure, race, vocabulary
from khanhllm.settings import resolve

SMALL = {
    "model": lab.RECIPE["model"] | {"experts": 4, "vocab_size": 500},
    "train": {"micro_batch": 20},
    "optim": lab.RECIPE["optim"],
    "schedule": lab.RECIPE["schedule"] | {"warmup": 5},
    "machine": {"device": "cpu", "threads": 1},
}


class Planted(torch.nn.Module):
    """A model whose loss for each token is known: of the names, and of the values of each fact it is asked about."""

    def __init__(self, names, values):
        super().__init__()
        self.names, self.values = names, iter(values)

    def forward(self, inputs_BT, targets_BT):
        nll_BT = torch.full(targets_BT.shape, float(self.names))
        for row in nll_BT:
            row[NAMES - 1 :] = torch.as_tensor(next(self.values), dtype=torch.float32)
        return nll_BT, ()


UNIFORM = [math.log(choices) for choices in CHOICES.values()]


@pytest.mark.parametrize("number", [1, 2, 50, 81])
def test_facts_are_unique_and_say_exactly_so_much(number):
    facts = Facts.draw(number, 3)
    assert pytest.approx(math.log2(28 * 12 * 100 * 200 * 100)) == BITS
    assert len({tuple(row) for row in facts.ids[:, :NAMES].tolist()}) == number
    start = 2 * facts.names
    for column, choices in zip(facts.ids[:, NAMES:].T, CHOICES.values(), strict=True):
        assert start <= column.min() <= column.max() < start + choices
        start += choices
    assert start == vocabulary(number)
    assert (facts.ids == Facts.draw(number, 3).ids).all() and (facts.ids != Facts.draw(number, 4).ids).any()


def test_every_value_occurs_about_as_often():
    facts = Facts.draw(20_000, 0)
    for column, choices in zip(facts.ids[:, NAMES:].T, CHOICES.values(), strict=True):
        counts = np.bincount(column - column.min(), minlength=choices)
        assert len(counts) == choices and abs(counts * choices / 20_000 - 1).max() < 0.5


def test_a_row_is_a_pure_function_of_seed_and_cursor():
    facts = Facts.draw(10, 0)
    stream = np.stack(list(islice(facts.rows_from(0, 5, Event()), 40)))
    for epoch in range(4):  # every fact once, in an order of its own
        assert sorted(stream[10 * epoch : 10 * epoch + 10].tolist()) == sorted(facts.ids.tolist())
    assert (stream[:10] != stream[10:20]).any()
    for cursor in (1, 9, 10, 23):
        later = np.stack(list(islice(facts.rows_from(cursor, 5, Event()), 10)))
        assert (later == stream[cursor : cursor + 10]).all()


def test_who_knows_all_holds_all_and_who_knows_only_the_format_holds_nothing():
    facts = Facts.draw(9, 0)
    assert sum(measure(Planted(99, [[0.0] * 5] * 9), facts, plain_machine())) == pytest.approx(9 * BITS)
    assert sum(measure(Planted(0, [UNIFORM] * 9), facts, plain_machine())) == pytest.approx(0, abs=1e-4)
    assert bits_stored([math.log(568)] * 5, 9) == [0.0] * 5  # not even the format


def test_what_is_held_of_each_attribute_adds_up():
    facts = Facts.draw(8, 0)
    half = measure(Planted(1, [[0.0] * 5, UNIFORM] * 4), facts, plain_machine())
    assert half == pytest.approx([4 * math.log2(choices) for choices in CHOICES.values()])
    only_years = [*UNIFORM[:2], 0.0, *UNIFORM[3:]]
    assert measure(Planted(1, [only_years] * 8), facts, plain_machine()) == pytest.approx(
        [0, 0, 8 * math.log2(100), 0, 0], abs=1e-4
    )
    a_bit_less = [nats - math.log(2) for nats in UNIFORM]
    assert measure(Planted(1, [a_bit_less] * 8), facts, plain_machine()) == pytest.approx([8.0] * 5)


def test_lucky_guesses_are_no_knowledge():
    """Sure of each value and wrong half of the time: the surprises cost more than the hits bring."""
    facts = Facts.draw(8, 0)
    assert measure(Planted(1, [[0.0] * 5, [20.0] * 5] * 4), facts, plain_machine()) == [0.0] * 5


def test_facts_are_measured_in_several_batches(monkeypatch):
    monkeypatch.setattr(lab, "ROWS", 3)
    facts = Facts.draw(8, 0)
    found = measure(Planted(1, [[0.0] * 5] * 6 + [UNIFORM] * 2), facts, plain_machine())
    assert sum(found) == pytest.approx(6 * BITS)


def test_an_even_model_holds_nothing():
    """A whole model whose head is zero gives every token of the vocabulary the same probability."""
    facts, learner = Facts.draw(20, 0), lab.Learner.new(resolve(SMALL), plain_machine())
    with torch.no_grad():
        learner.model.head.weight.zero_()
    assert measure(learner.model, facts, plain_machine()) == [0.0] * 5


@pytest.mark.slow
def test_three_models_learn_the_facts_by_heart_in_equal_time_and_no_others():
    """The clock of this test counts steps; 128 of them, so that shares of the time are exact."""
    config = resolve(SMALL, {"train": {"seconds": 128}})
    facts, steps = Facts.draw(20, 0), count()
    runners = race(config, facts, plain_machine(), clock=lambda: float(next(steps)))
    assert list(runners) == list(MODELS)
    for runner in runners.values():
        assert (runner.state.step, runner.state.cursor) == (128, 128 * 20)
        assert runner.seconds == pytest.approx([128 / MARKS * mark for mark in range(MARKS + 1)], abs=1)
        assert runner.bits[0] < 0.05 * 20 * BITS and runner.bits[-1] > 0.95 * 20 * BITS
        other = Facts.draw(20, 1)  # nearly the same names, other values
        assert sum(measure(runner.learner.model, other, plain_machine())) < 0.1 * 20 * BITS
    found = lab.summary(config, 20, [{name: runner.result(facts) for name, runner in runners.items()}])
    sizes = {name: found[name]["parameters"] for name in MODELS}
    assert sizes["active"] < sizes["mixture"] and abs(sizes["total"] / sizes["mixture"] - 1) < 0.05
    assert abs(found["mixture"]["active_parameters"] / sizes["active"] - 1) < 0.05
    assert found["total"]["runs"][0]["bits_by_attribute"].keys() == CHOICES.keys()


def test_all_is_written_shown_and_drawn(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(recall, "RECIPE", SMALL)
    out = tmp_path / "deep" / "facts"
    words = ["lab", "facts", "--facts", "20", "--seconds", "0.01", "--seeds", "2", "--out", str(out)]
    words += ["--machine.device", "cpu", "--machine.threads", "1"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "facts.json").read_text())
    assert (out / "facts.png").stat().st_size > 5000
    assert [run["seed"] for run in found["models"]["total"]["runs"]] == [0, 1]
    assert found["bits"] == pytest.approx(20 * BITS)
    assert cli.main(words) == 0
    said = capsys.readouterr()
    for word in ("bits held", "bits per parameter", "2404.05405", "equal arithmetic", str(out / "facts.png")):
        assert word in said.out
    assert "born 19" in said.err and "seed 1: mixture of experts" in said.err
    assert max(map(len, said.out.splitlines()[:-1])) <= 80


@pytest.mark.parametrize(
    ("least", "most", "words"),
    [(1.1, 1.3, "20 % more than"), (0.7, 0.9, "20 % less than"), (0.9, 1.1, "not clearly")],
)
def test_the_verdict_says_only_what_all_seeds_say(least, most, words):
    ratio = {"least": least, "median": (least + most) / 2, "most": most}
    assert words in recall.verdict({"seconds": 50.0, "models": {"active": {"mixture_over_it": ratio}}})


def test_labels_that_would_cover_each_other_move_apart():
    for heights in ([0.9, 0.91, 0.92], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.1, 0.5, 0.9]):
        placed = recall._apart(dict(zip("abc", heights, strict=True)))
        ordered = [placed[name] for name in sorted("abc", key=lambda name: heights["abc".index(name)])]
        assert all(b - a > 0.13 for a, b in pairwise(ordered))
        assert ordered[0] >= 0 and ordered[-1] <= 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--seconds", "0"], "--seconds"),
        (["--seconds", "nan"], "--seconds"),
        (["--seconds", "-3"], "--seconds"),
        (["--seconds", "soon"], "--seconds"),
        (["--facts", "0"], "--facts"),
        (["--seeds", "0"], "--seeds"),
    ],
)
def test_wrong_input_is_one_line(words, named, capsys, tmp_path):
    code = exit_code(["lab", "facts", "--out", str(tmp_path / "out"), *words])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and named in line and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_the_training(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(recall, "learn", lambda *_: pytest.fail("it trained"))
    (tmp_path / "file").write_text("")
    assert cli.main(["lab", "facts", "--out", str(tmp_path / "file" / "out")]) == 2
    place = tmp_path / "file" / "out" / "facts.json"
    assert f"cannot write {place}: " in capsys.readouterr().err


def test_no_compiler_works_while_the_clock_runs(tmp_path, monkeypatch):
    seen = []

    def race(config, facts, machine, **_):
        seen.append(machine.compile)
        raise UserError("that is enough")

    monkeypatch.setattr(recall, "race", race)
    words = ["--machine.device", "cpu", "--machine.compile", "on"]
    assert cli.main(["lab", "facts", "--facts", "20", "--out", str(tmp_path / "out"), *words]) == 2
    assert seen == [False]
