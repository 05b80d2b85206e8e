"""Nothing that is not finite reaches weights or moments; a run that went wrong returns to its last good checkpoint."""

import os
import random
import signal
import sys
from itertools import islice
from math import inf, nan

import numpy as np
import pytest
import torch
from test_resume import config, outcome

from conftest import save, tiny
from khanhllm.chaos.numbers import everything, spoiled
from khanhllm.data.batches import random_batches
from khanhllm.data.belt import Starved
from khanhllm.data.shards import Shards
from khanhllm.errors import UserError
from khanhllm.machine.devices import open_machine
from khanhllm.model import Transformer, losses
from khanhllm.settings import resolve
from khanhllm.training import checkpoint, recovery
from khanhllm.training import run as training_run
from khanhllm.training.guard import Diverged, Guard
from khanhllm.training.run import train
from khanhllm.training.step import Learner, train_step


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon", "muon8bit"])
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_one_bad_number_in_any_gradient_changes_nothing(name, bad, monkeypatch):
    settings = {"train": {"micro_batch": 1, "accumulation": 4}, "optim": {"name": name, "clip": 0}}
    learner = Learner.new(resolve(tiny(dim=64).model_dump(), settings), open_machine(tiny().machine))
    rows = random_batches(learner.config, learner.machine.device)
    state, _ = train_step(learner, learner.start(), rows)
    before = everything(learner)
    chance = random.Random(0)
    parameters = list(learner.model.parameters())
    for _ in range(20):
        one = chance.choice(parameters)
        place = chance.randrange(one.numel())
        with spoiled(one, place, bad, micro_batch=chance.randrange(4)):
            state, row = train_step(learner, state, rows)
        assert row["fault"]
        assert all(torch.equal(a, b) for a, b in zip(before, everything(learner), strict=True))
    assert state.guard.rejected == 20
    state, row = train_step(learner, state, rows)
    assert not row["fault"]
    assert not all(torch.equal(a, b) for a, b in zip(before, everything(learner), strict=True))


def poisoned(monkeypatch, bad):
    """Losses become NaN where `bad(cursor)` says so of the rows trained on before."""
    honest = training_run.train_step

    def spoiled_step(learner, state, batches):
        micro_batches = list(islice(batches, learner.config.train.accumulation))
        forward = losses.micro_batch_loss

        def spoiled_loss(*inputs):
            loss, nll, routing = forward(*inputs)
            return loss, (nll * nan if bad(micro_batches[0].cursor) else nll), routing

        with monkeypatch.context() as patch:
            patch.setattr(losses, "micro_batch_loss", spoiled_loss)
            return honest(learner, state, iter(micro_batches))

    monkeypatch.setattr(training_run, "train_step", spoiled_step)


def test_a_bad_step_is_passed_over(corpus, cache, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, lambda cursor: 20 < cursor <= 24)  # one step of four rows
    train(config(corpus, cache), tmp_path / "run")
    assert "step 6 is rejected: the loss is nan" in capsys.readouterr().out
    _, rows = outcome(tmp_path / "run")
    assert [row["rejected"] for row in rows] == ["0"] * 5 + ["1"] + ["0"] * 14
    assert "step 6 is rejected" in (tmp_path / "run" / "messages.txt").read_text()


def test_bad_steps_in_a_row_lead_back_and_beyond_the_rows(corpus, cache, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, lambda cursor: 24 < cursor <= 36)  # three steps
    train(config(corpus, cache), tmp_path / "run")
    assert "3 steps in a row were rejected; back to step 5, beyond the 16 rows since then" in capsys.readouterr().out
    _, rows = outcome(tmp_path / "run")
    assert [int(row["step"]) for row in rows] == list(range(1, 21))
    assert [int(row["tokens"]) // 32 for row in rows] == [4 * step for step in range(1, 6)] + [
        36 + 4 * step for step in range(1, 16)
    ]


def test_a_return_survives_stops(corpus, cache, tmp_path, monkeypatch):
    """Killed at any step around the return, and resumed, it ends the same."""
    poisoned(monkeypatch, lambda cursor: 24 < cursor <= 36)
    train(config(corpus, cache), tmp_path / "whole")
    honest = training_run.train_step

    class Killed(BaseException):
        pass

    for stop in (7, 8, 9, 11):

        def dying(learner, state, rows, left=[stop]):  # noqa: B006
            left[0] -= 1
            if left[0] == -1:
                raise Killed
            return honest(learner, state, rows)

        monkeypatch.setattr(training_run, "train_step", dying)
        with pytest.raises(Killed):
            train(config(corpus, cache), tmp_path / str(stop))
        monkeypatch.setattr(training_run, "train_step", honest)
        train(config(corpus, cache), tmp_path / str(stop), resume=True)
        assert outcome(tmp_path / str(stop)) == outcome(tmp_path / "whole")


@pytest.mark.parametrize("patience", [3, 6], ids=["", "a-state-was-saved-amid-rejections"])
def test_bad_from_the_first_step_it_stops_and_says_so(patience, corpus, cache, tmp_path, monkeypatch):
    poisoned(monkeypatch, lambda cursor: True)
    with pytest.raises(
        Diverged, match=r"after 2 returns.*beginning \(nothing good was saved yet\).*--optim\.lr"
    ) as caught:
        train(config(corpus, cache, guard={"patience": patience}), tmp_path / "run")
    assert caught.value.exit_code == 76
    assert not checkpoint.steps(tmp_path / "run")


@pytest.mark.parametrize("patience", [3, 6], ids=["", "a-state-was-saved-amid-rejections"])
def test_a_run_that_cannot_be_saved_keeps_its_last_good_state(patience, corpus, cache, tmp_path, monkeypatch):
    poisoned(monkeypatch, lambda cursor: cursor > 30)
    with pytest.raises(Diverged, match=r"the last good state is that of step 5.*--resume"):
        train(config(corpus, cache, guard={"patience": patience}), tmp_path / "run")
    assert checkpoint.newest(tmp_path / "run").name == "step-0000005"
    monkeypatch.undo()
    train(config(corpus, cache), tmp_path / "run", resume=True)
    assert checkpoint.newest(tmp_path / "run").name == "step-0000020"


def broken_by_update(monkeypatch, step):
    """The update of a step breaks the weights, once; the loss of that step was measured before, and is fine."""
    honest, pending = training_run.train_step, [True]

    def breaking(learner, state, rows):
        result = honest(learner, state, rows)
        if result[0].step == step and pending:
            pending.clear()
            with torch.no_grad():
                learner.model.head.weight.fill_(inf)
        return result

    monkeypatch.setattr(training_run, "train_step", breaking)


@pytest.mark.parametrize("returns", [0, 1, 2])
def test_a_checkpoint_that_holds_broken_weights_is_left_for_the_one_before(
    returns, corpus, cache, tmp_path, monkeypatch
):
    broken_by_update(monkeypatch, step=6)
    settings = config(corpus, cache, train={"save_every": 3, "sample_every": 0}, guard={"returns": returns})
    if returns == 2:
        train(settings, tmp_path / "run")
    else:
        with pytest.raises(Diverged, match=r"the last good state is that of step 3 \(--resume"):
            train(settings, tmp_path / "run")
        assert [path.name for path in checkpoint.steps(tmp_path / "run")] == ["step-0000003"]
        train(settings, tmp_path / "run", resume=True)
    said = (tmp_path / "run" / "messages.txt").read_text()
    assert said.count("back to step 6") == min(returns, 1) and said.count("back to step 3") == returns // 2
    assert checkpoint.newest(tmp_path / "run").name == "step-0000020"


def test_a_sample_of_broken_weights_does_not_end_the_run(corpus, cache, tmp_path, monkeypatch):
    """The guard brings it back from them."""
    broken_by_update(monkeypatch, step=6)
    assert train(config(corpus, cache, train={"sample_every": 3}), tmp_path / "run") == ""
    said = (tmp_path / "run" / "messages.txt").read_text()
    assert said.count("the sample could not be written: the model answers with numbers that are not finite") == 1
    assert "back to step 5" in said
    steps = (tmp_path / "run" / "samples.txt").read_text().splitlines()
    assert [line for line in steps if line.startswith("--- step")] == [
        f"--- step {nth}" for nth in (3, 6, 9, 12, 15, 18, 20)
    ]


def test_a_checkpoint_from_after_a_return_has_not_failed_yet(corpus, cache, tmp_path, monkeypatch):
    """Two patches of bad rows: the run does not go back further than it must."""
    poisoned(monkeypatch, lambda cursor: 24 < cursor <= 36 or 60 < cursor <= 72)
    train(config(corpus, cache), tmp_path / "run")
    said = (tmp_path / "run" / "messages.txt").read_text()
    assert [line.split("back to ")[1].split(",")[0] for line in said.splitlines() if "back to" in line] == [
        "step 5",
        "step 10",
    ]


def test_a_checkpoint_after_which_steps_were_believed_has_not_failed(corpus, cache, tmp_path, monkeypatch):
    """The second patch of bad rows comes one good step after the return, before the next save."""
    poisoned(monkeypatch, lambda cursor: 24 < cursor <= 36 or 40 < cursor <= 52)
    train(config(corpus, cache, train={"save_every": 2}), tmp_path / "run")
    said = (tmp_path / "run" / "messages.txt").read_text()
    assert said.count("back to step 6") == 2 and said.count("back to") == 2


def other_text(monkeypatch, border, every=1):
    """From row number `border` of the run on, the rows of every so many steps hold only ids that the corpus never
    has."""
    honest = Shards.rows_from

    def rows_from(shards, cursor, seed, stopped):
        chance = np.random.default_rng(cursor)
        for nth, row in enumerate(honest(shards, cursor, seed, stopped), cursor):
            yield row if nth < border or (nth - border) // 4 % every else chance.integers(2, 40, len(row))

    monkeypatch.setattr(Shards, "rows_from", rows_from)


def test_a_change_of_text_is_no_divergence_and_an_ended_run_gets_over_it(corpus, cache, tmp_path, monkeypatch, capsys):
    other_text(monkeypatch, border=240)
    settings = config(corpus, cache, train={"steps": 90}, optim={"lr": 2e-2})
    with monkeypatch.context() as patch, pytest.raises(Diverged):
        patch.setattr(Guard, "text_changed", lambda *_: False)  # as it was once: a high loss is a divergence
        train(settings, tmp_path / "ended")
    for run in ("ended", "fresh"):
        train(settings, tmp_path / run, resume=run == "ended")
        assert checkpoint.newest(tmp_path / run).name == "step-0000090"
        assert "the text has changed" in (tmp_path / run / "messages.txt").read_text()
    assert "back to" not in (tmp_path / "fresh" / "messages.txt").read_text()
    _, rows = outcome(tmp_path / "fresh")
    assert sum(row["rejected"] != "0" for row in rows) <= 6
    assert float(rows[-1]["loss"]) < float(rows[63]["loss"]), "the new text is learned"


def test_a_text_that_comes_and_goes_is_told_from_weights_gone_wrong(corpus, cache, tmp_path, monkeypatch):
    """Every second step is rejected. So was one in the middle of all steps; that of the middle loss was not. A resumed
    run knows it too."""
    other_text(monkeypatch, border=244, every=2)
    settings = config(corpus, cache, train={"steps": 125}, optim={"lr": 2e-2})
    with monkeypatch.context() as patch:
        patch.setattr(Guard, "text_changed", lambda *_: False)
        with pytest.raises(Diverged, match="step 124: 32 steps, now and then, were rejected, after 0 returns"):
            train(resolve(settings.model_dump(), {"guard": {"returns": 0}}), tmp_path / "run")
    train(settings, tmp_path / "run", resume=True)
    said = (tmp_path / "run" / "messages.txt").read_text()
    assert "step 124: the text has changed" in said and "back to" not in said


@pytest.mark.parametrize("starves", [False, True], ids=["a-signal", "a-starved-belt"])
def test_earlier_rows_that_do_not_come_decide_nothing(starves, corpus, cache, tmp_path, monkeypatch):
    """The text changes with step 61. Where a signal cuts the doubt short, it is saved and settled later."""
    other_text(monkeypatch, border=240)
    settings = config(corpus, cache, train={"steps": 90}, optim={"lr": 2e-2})

    def none(*_, **__):
        if starves:
            raise Starved("nothing comes")
        os.kill(os.getpid(), signal.SIGTERM)
        yield from ()

    with monkeypatch.context() as patch:
        patch.setattr(recovery, "rows_of", none)
        assert train(settings, tmp_path / "run") == ("" if starves else "SIGTERM")
    assert checkpoint.newest(tmp_path / "run").name == f"step-00000{90 if starves else 63}"
    train(resolve(settings.model_dump(), {"train": {"steps": 95}}), tmp_path / "run", resume=True)
    said = (tmp_path / "run" / "messages.txt").read_text()
    assert "the text has changed" in said and "back to" not in said


def test_weights_gone_wrong_are_not_taken_for_a_change_of_text(corpus, cache, tmp_path, monkeypatch):
    honest, pending = training_run.train_step, [True]

    def spoiling(learner, state, rows):
        if state.step == 60 and pending:
            pending.clear()
            with torch.no_grad():
                learner.model.head.weight.mul_(-20)
        return honest(learner, state, rows)

    monkeypatch.setattr(training_run, "train_step", spoiling)
    train(config(corpus, cache, train={"steps": 70}, optim={"lr": 2e-2}), tmp_path / "run")
    said = (tmp_path / "run" / "messages.txt").read_text()
    assert "back to step 60" in said
    assert "text has changed" not in said


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_back_at_the_beginning_everything_is_as_it_was_then(weights, corpus, cache, tmp_path, monkeypatch):
    """A step was accepted, three were not, and nothing was saved. Then memory runs out in the first step of the second
    try: that is no update that had begun, and the step is taken again with the same rows."""
    poisoned(monkeypatch, lambda cursor: 4 < cursor <= 16)
    settings = config(corpus, cache, train={"save_every": 0, "steps": 5}, machine={"weights": weights})
    steps, honest = [], training_run.train_step
    drawn, draw = [], Transformer.initialise
    monkeypatch.setattr(
        Transformer, "initialise", lambda model, generator: drawn.append(model) or draw(model, generator)
    )

    def watched(learner, state, rows):
        steps.append((state.step, state.cursor))
        if len(steps) == 5:
            fresh = Learner.new(settings, learner.machine)
            now, then = learner.model.state_dict(), fresh.model.state_dict()
            assert now.keys() == then.keys() and all(torch.equal(now[name], then[name]) for name in now)
            assert all(now[name].dtype == then[name].dtype for name in now)
            assert drawn.count(learner.model) == 1, "a generator of the CPU draws no weights on another device"
            assert not learner.optimizer.state
            assert [group["step"] for group in learner.optimizer.param_groups] == [-1] * len(
                fresh.optimizer.param_groups
            )
            raise RuntimeError("can't allocate memory")
        return honest(learner, state, rows)

    monkeypatch.setattr(training_run, "train_step", watched)
    train(settings, tmp_path / "run")
    assert steps == [(0, 0), (1, 4), (2, 8), (3, 12), (0, 16), *((step, 16 + 4 * step) for step in range(5))]
    _, rows = outcome(tmp_path / "run")
    assert [int(row["tokens"]) // 32 for row in rows] == [20, 24, 28, 32, 36]


def test_back_at_given_weights_there_are_no_moments_yet(tmp_path):
    """A run that goes on from another's weights saves them as step 0."""
    learner = Learner.new(tiny(), open_machine(tiny().machine))
    path = save(tmp_path, 0, learner.model, learner.optimizer, {})
    train_step(learner, learner.start(), random_batches(learner.config, learner.machine.device))
    assert learner.optimizer.state
    numbers = checkpoint.read_state(path)["optimizer"]
    checkpoint.load_optimizer(path, learner.model, learner.optimizer, numbers)
    assert not learner.optimizer.state


def test_a_library_that_is_missing_is_told_before_the_text_is_prepared(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "khanhllm.optim.eight_bit", None)
    with pytest.raises(UserError, match="needs bitsandbytes"):
        train(config(corpus, tmp_path / "none", optim={"name": "muon8bit"}), tmp_path / "run")
    assert not (tmp_path / "none").exists()


def test_the_load_of_a_rejected_step_is_forgotten():
    """Or the next step would be balanced against what a bad batch did."""
    learner = Learner.new(tiny(), open_machine(tiny().machine))
    rows = random_batches(learner.config, learner.machine.device)
    good, _ = train_step(learner, learner.start(), rows)
    with spoiled(next(learner.model.parameters()), 0, nan, micro_batch=0):
        bad, row = train_step(learner, good, rows)
    assert row["fault"]
    assert torch.equal(bad.load_LE, good.load_LE)
