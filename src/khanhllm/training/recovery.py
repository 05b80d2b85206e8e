"""What a run does when steps go wrong: tell new text from weights gone wrong, go back, take smaller micro-batches."""

import traceback
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from itertools import islice
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any

import torch

from khanhllm.data.belt import Starved
from khanhllm.errors import UserError, first_line
from khanhllm.log.run_log import Log
from khanhllm.machine.adapt import uncompile
from khanhllm.machine.devices import out_of_memory
from khanhllm.machine.signals import Stop
from khanhllm.planning import budget
from khanhllm.settings import write_config
from khanhllm.training import checkpoint
from khanhllm.training.guard import Diverged, Guard
from khanhllm.training.parts import Parts, restore, rows_of
from khanhllm.training.saver import Saver
from khanhllm.training.step import State


def recover(parts: Parts, state: State, row: dict[str, Any], stop: Stop, log: Log, saver: Saver) -> State:
    """After several rejected steps, of which `row` is the last: expect another loss from here on if the text has
    changed, else go back. See guard.py."""
    loss, guard = row["loss"], state.guard
    believable = isfinite(loss) and isfinite(row["grad_norm"]) and guard.losses
    known = parts.learner.owners.led(lambda: _loss_of_known_rows(parts, state, stop)) if believable else nan
    if known is None:
        return state  # undecided; the run saves it and stops, or doubts again after the next rejected step
    if not guard.text_changed(loss, known):
        return _return_to_checkpoint(parts, state, log, saver)
    log.say(
        f"step {state.step}: the text has changed, as earlier rows are read as well as before; "
        f"a loss of {loss:.4g} is believed from here on"
    )
    return replace(state, guard=guard.moved(loss))


@torch.no_grad()
def _loss_of_known_rows(parts: Parts, state: State, stop: Stop) -> float | None:
    """What the weights say now of one step's rows from the middle of the guard's losses, nan if nothing of them counts;
    None if they do not come, as a signal asks to stop or the belt starves."""
    learner, train = parts.learner, parts.config.train
    known = replace(state, cursor=state.guard.middle(state.cursor, train.rows_per_step))
    nll, counted = [], 0
    with suppress(Starved), closing(rows_of(parts, known, stop, every=True)) as rows:
        for batch in islice(rows, train.accumulation):
            with learner.machine.autocast():
                nll.append(learner.model(*batch[:2], *batch.extras)[0].sum().item())
            counted += batch.counted
    if len(nll) < train.accumulation:
        return None
    return sum(nll) / counted if counted else nan


def _return_to_checkpoint(parts: Parts, state: State, log: Log, saver: Saver) -> State:
    """After several rejected steps in a row: load weights and moments of the last good checkpoint, and skip the rows
    read since then. Raises Diverged if that has been tried often enough."""
    learner, guard = parts.learner, state.guard
    saver.report(patient=True)
    ends = guard.returns >= learner.config.guard.returns
    good = learner.machine.group.told(lambda: _last_good(parts.run, guard, ends, log))
    step = checkpoint.step_of(Path(good)) if good else 0
    where = f"step {step}" if good else "the beginning"
    in_a_row = guard.rejected >= learner.config.guard.patience
    which = f"{guard.rejected} steps in a row" if in_a_row else f"{guard.spikes} steps, now and then,"
    told = f"step {state.step}: {which} were rejected"
    checkpoint.reject_after(parts.run, step)  # what was saved amid rejections
    if ends:
        again = "--resume goes on from there" if good else "nothing good was saved yet"
        raise Diverged(
            f"{told}, after {guard.returns} returns; the last good state is that of {where} ({again}). "
            f"Try a smaller --optim.lr (now {learner.config.optim.lr:g}), or a larger --guard.spike"
        )
    restored = restore(parts, Path(good)) if good else learner.restart()
    for group in learner.optimizer.param_groups:
        group["step"] = -1
    log.rewind(restored.step)
    log.say(f"{told}; back to {where}, beyond the {state.cursor - restored.cursor:,} rows since then")
    # time that was used up stays so, as do rows
    guard = restored.guard.returned_to(guard.returns + 1)
    return replace(restored, cursor=state.cursor, guard=guard, share=state.share)


def _last_good(run: Path, guard: Guard, ends: bool, log: Log) -> str:
    """The newest checkpoint that was not saved amid rejections, or the one before it if that has failed; empty if there
    is none.

    A loss is measured before the update that follows it, so the update of a step that was saved may have broken the
    weights unseen: then no step after it is believed. ends: whether the run ends now, and a resumed one would begin
    with this checkpoint.
    """

    def newest_good(say: Callable[[str], None], before: float = inf) -> Path | None:
        return checkpoint.newest(
            run, say, suits=lambda saved: saved["step"] < before and not saved["guard"]["rejected"]
        )

    good = newest_good(log.say)
    then = Guard(**checkpoint.read_state(good)["guard"]) if good else guard
    returned_to, none_believed = then.returns < guard.returns, then.losses == guard.losses
    if good and none_believed and (returned_to or ends):
        good = newest_good(lambda _: None, before=checkpoint.step_of(good)) or good
    return str(good or "")


def adapted(parts: Parts, state: State, error: RuntimeError, log: Log) -> Parts:
    """Handle an error in a step, so that the same step can be taken again: if memory ran out, with micro-batches of
    half the size; if torch.compile failed, as for want of a C++ compiler, uncompiled.

    Raises any other error again, and UserError if memory ran out with one row, or in the update.
    """
    learner = parts.learner
    if end := learner.owners.final(error, learner.config.train):
        raise end from None
    updating = learner.optimizer.param_groups[0]["step"] == state.step
    full = out_of_memory(error)
    compiler_failed = learner.machine.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException)
    if not full and (updating or not compiler_failed):
        raise error
    learner.optimizer.zero_grad(set_to_none=True)
    traceback.clear_frames(error.__traceback__)  # they hold the tensors of the step that failed
    learner.machine.give_back_memory()
    if full:
        return _with_smaller_micro_batches(parts, state, updating, log)
    uncompile(learner.model)
    why = first_line(error)[:200]
    log.say(f"torch.compile does not work here, so the model runs uncompiled (as with machine.compile off): {why}")
    return replace(parts, learner=replace(learner, machine=replace(learner.machine, compile=False)))


def _with_smaller_micro_batches(parts: Parts, state: State, updating: bool, log: Log) -> Parts:
    config, rows, machine = parts.config, parts.config.train.rows, parts.learner.machine
    if rows == 1 or updating:
        told = budget.advice(config, budget.here(machine))
        raise UserError(f"step {state.step + 1}: out of memory with a micro-batch of {rows}; {told}") from None
    smaller = budget.with_micro_batch(
        config, max(cut for cut in budget.micro_batch_sizes(config, 2**62) if cut <= rows // 2)
    )
    try:
        write_config(smaller, parts.run)
    except UserError as error:  # as on a full disk; a resumed run then finds out again
        log.say(f"{error}; training continues")
    log.say(f"step {state.step + 1}: out of memory; again with micro-batches of {smaller.train.rows} instead of {rows}")
    return replace(parts, learner=replace(parts.learner, config=smaller))
