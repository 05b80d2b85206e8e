"""The training run: the only file that assembles everything.

    for each step:  train (step.py) -> validate -> log -> save -> write a sample

A run lives in one folder: config.toml, tokenizer.json, training_log.csv, experts.csv, messages.txt, samples.txt,
checkpoints/. Everything that the future depends on is the weights, the optimizer's moments and a `State`, so a resumed
run is the uninterrupted one, bit for bit (same machine, same torch).
"""

import gc
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from filelock import Timeout

from khanhllm import optim
from khanhllm.data.belt import Starved
from khanhllm.data.counting import Marks, Reading
from khanhllm.data.shards import Shards
from khanhllm.errors import UserError
from khanhllm.files import foreign, locked, quoted, there
from khanhllm.inference.score import Score, score
from khanhllm.log.run_log import Log, lacks_validation
from khanhllm.machine import launch
from khanhllm.machine.devices import Machine, open_machine
from khanhllm.machine.group import ALONE, Group, opened
from khanhllm.machine.probe import LinkSpeed, link_speed
from khanhllm.machine.signals import Stop, stop_signals
from khanhllm.model.counts import active_parameters, on_paper, total_parameters
from khanhllm.planning import budget, ways
from khanhllm.schema import Config, TrainConfig
from khanhllm.settings import refuse_to_overwrite, write_config
from khanhllm.training import checkpoint
from khanhllm.training.parts import (
    RISE,
    Parts,
    about_schedule,
    assemble,
    check_validation,
    last_checkpoint,
    restore,
    rows_of,
    time_used,
)
from khanhllm.training.recovery import adapted, recover
from khanhllm.training.samples import write_samples
from khanhllm.training.saver import Saver, room_for, writers
from khanhllm.training.step import NoRows, State, train_step

A_LONG_RUN = 10**9
"""steps of a run that is given its time"""
SETTLED = 2
"""steps after the first, which compiles: from then on a step is as fast as it will be"""


def train(config: Config, folder: Path, resume: bool = False) -> str:
    """Train until `config.train.steps`, or until its time is used up, or until a signal asks to stop. Returns the name
    of that signal; empty if the run is finished.

    Raises UserError for what the user can put right, before any long work where that is possible.
    """
    if launch.wanted(config.machine):
        return launch.train(config, folder, resume)
    with _opened(config, folder, resume) as (parts, state, log, saver, stop), ExitStack() as readers:
        train, group = parts.config.train, parts.learner.machine.group
        rows = readers.enter_context(closing(rows_of(parts, state, stop)))
        passed = log.seconds if state.share is None else state.share * train.seconds
        started = time.perf_counter() - passed
        first, finished = state.step + 1, _make_up(parts, state, log, stop)
        last = finished or stop.agreed(group)
        while not last:
            try:
                state, row = train_step(parts.learner, state, rows)
            except (NoRows, Starved) as error:
                if state.step >= first:
                    _save(parts, state, log, saver, must=True)
                stop.agreed(group)
                if isinstance(error, Starved):
                    raise error.at(state.step, folder) from None
                break
            except RuntimeError as error:
                parts = adapted(parts, state, error, log)
                rows.close()
                rows = readers.enter_context(closing(rows_of(parts, state, stop)))
                continue
            if state.step == first:
                gc.freeze()  # what is alive now lives as long as the run: the garbage collector may skip it
            if row["fault"]:
                log.say(f"step {state.step} is rejected: {row['fault']}; weights and moments stay as they were")
            if row["fault"] and state.guard.doubts(parts.config.guard):
                state = recover(parts, state, row, stop, log, saver)
                if state.step < row["step"]:
                    continue
            seconds = time.perf_counter() - started
            cold = state.step == first and (parts.learner.machine.compile or row.get("waiting", 0) > 0.5)
            state, finished = _progress(train, state, seconds, saver, log, group, cold)
            if due(state.step, train.eval_every) or finished:
                row |= validate(parts, train.eval_tokens, stop) or {}
                finished = finished and "val_ce" in row
            last = finished or stop.agreed(group)
            memory = max(group.exchange(parts.learner.machine.peak_memory()))[0]
            log.add(row | {"memory_mb": memory, "seconds": seconds})
            if state.step == first + SETTLED and (slow := _slow_link(parts, row)):
                log.say(slow)
            saver.report()
            if due(state.step, train.save_every) or last:
                _save(parts, state, log, saver, must=last, ended=finished)
            if (due(state.step, train.sample_every) or finished) and train.sample_tokens:
                write_samples(parts, state.step, log, finished)
        if finished:
            for line in [*_timed(parts, state), *_rise(parts, log)]:
                log.say(line)
        else:
            log.say(f"stopped by {stop.asked}; to continue: khanhllm train --resume --run {quoted(folder)}")
        return "" if finished else stop.asked


@contextmanager
def _opened(config: Config, folder: Path, resume: bool) -> Iterator[tuple[Parts, State, Log, Saver, Stop]]:
    """Everything that a training needs, opened in an order that finds mistakes before long work, and closed again."""
    launch.end_with_launcher()
    with (
        launch.last_words(),
        opened(config.machine) as group,
        _own(folder, resume, group) as own,
        ExitStack() as taken,
    ):
        machine = open_machine(config.machine, group)
        taken.enter_context(machine.taken_process())
        hardware = budget.least(machine) if config.train.micro_batch == "auto" else None
        config = Config.model_validate_json(group.told(lambda: _cut(config, machine, hardware).model_dump_json()))
        paper = on_paper(config.model)
        optim.build(paper, config.optim)  # a library that it needs is missed before the text is prepared
        last = group.told(lambda: last_checkpoint(config, folder, paper) if resume else "")
        saved = checkpoint.read_state(Path(last)) if last else {}
        parts = assemble(config, own, saved, machine)
        check_validation(parts)
        parts = replace(parts, link=_link(parts))
        used = group.told(lambda: time_used(config, folder, saved) if last and config.train.seconds else 0.0)
        state = restore(parts, Path(last), used) if last else parts.learner.start()
        size = checkpoint.size(parts.learner.model, parts.learner.optimizer, parts.learner.part)
        tight = _room(parts, state, size) if group.leads else ""
        place, by = writers(own, size, group)
        with (
            stop_signals() as stop,
            Log.open(own, config, state.step, total_parameters(paper), quiet=not group.leads) as log,
            Saver(place, config.train.keep, log.say, log.best if config.train.keep_best else None, by) as saver,
        ):
            stop.over_panel = log.terminal.live is not None
            parts.tokenizer.save(own / "tokenizer.json")
            told = [*_introduction(parts, state), *about_schedule(parts, state), tight] if group.leads else []
            write_config(parts.config, own)
            checkpoint.reject_after(own, state.step, paper)
            for line in filter(None, told):
                log.say(line)
            try:
                yield parts, state, log, saver, stop
            finally:
                gc.unfreeze()
                if parts.learner.machine.compile:
                    torch.compiler.reset()  # a process may compile only so many models; the next one may need the room


def _link(parts: Parts) -> LinkSpeed | None:
    config, machine = parts.config, parts.learner.machine
    if machine.group.alone:
        return None
    turns = sum(machine.group.turns(config.train.accumulation))
    return link_speed(machine, ways.chosen(config, machine.precision, machine.group.size).traffic.moved(turns))


def _slow_link(parts: Parts, row: dict[str, Any]) -> str:
    """What a step says of the link between the processes, if they mostly wait for it."""
    rate = row.get("tokens_per_s")
    return parts.link.warning(parts.config.tokens_per_step / rate) if parts.link and rate else ""


def _cut(config: Config, machine: Machine, hardware: budget.Hardware | None) -> Config:
    """The config with micro-batches that fit into this hardware, if that is given, and enough of them for all."""
    if hardware:
        config = budget.fit_micro_batch(config, hardware)
    even = config.machine.split == "all" or machine.group.parts > 1
    return budget.shared_out(config, sum(machine.group.shares), evenly=even)


def _progress(
    train: TrainConfig, state: State, seconds: float, saver: Saver, log: Log, group: Group = ALONE, cold: bool = False
) -> tuple[State, bool]:
    """The state with the share of the time budget that is used up, and whether the run is finished; by the clock of the
    first process. cold: whether this step compiled or waited, so that it does not tell how long the next one takes."""
    if state.share is None:
        return state, state.step == train.steps
    share = seconds / train.seconds
    # finished when there is no time left for another step and for saving
    following = 0.0 if cold else share - state.share
    finished = share + following + saver.seconds / train.seconds >= 1
    share, finished = group.exchange(share, finished)[0]  # type: ignore[assignment]
    log.expect(state.step if finished else max(state.step + 1, round(state.step / share)))
    return replace(state, share=share), bool(finished)


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Stopped(Exception):
    """A signal asks to stop while the validation is at work."""


def validate(parts: Parts, tokens: int, stop: Stop) -> dict[str, Any] | None:
    """Score the first `tokens` tokens of the validation documents, always the same ones, and of those of the run that
    this one goes on from. None if a signal asks to stop: a resumed run then makes up for it, from the same weights. The
    first process does it for all."""
    return parts.learner.owners.led(lambda: _validate(parts, tokens, stop))


def _validate(parts: Parts, tokens: int, stop: Stop) -> dict[str, Any] | None:

    def windows(shards: Shards) -> Iterator[np.ndarray]:
        for window in islice(shards.windows(), -(-tokens // parts.config.model.context)):
            if stop.asked:
                raise _Stopped
            yield window

    learner = parts.learner

    def scored(shards: Shards, reading: Reading | None) -> Score:
        token_bytes, rows = parts.tokenizer.token_bytes, parts.config.train.rows
        return score(learner.model, windows(shards), token_bytes, learner.machine, rows, reading)

    try:
        own = scored(parts.validation, parts.reading)
        if not parts.base:
            return {**own}
        # as the base itself was scored: a text without a mask, conversations by their answers
        talks, tokenizer = parts.base.manifest.laid, parts.tokenizer
        reading = Reading(tokenizer.end_of_text, Marks.of(tokenizer), document_mask=True) if talks else None
        return own | {"base_bpb": scored(parts.base, reading)["val_bpb"]}
    except _Stopped:
        return None


def _make_up(parts: Parts, state: State, log: Log, stop: Stop) -> bool:
    """Validate after the step that a resumed run starts from, if a signal cut that short, so that its log is the
    uninterrupted one's. Returns whether that finishes the run."""
    train, group = parts.config.train, parts.learner.machine.group
    finished = state.share is None and state.step == train.steps
    if not (due(state.step, train.eval_every) or finished):
        return False
    if not group.told(lambda: lacks_validation(parts.run, parts.config, state.step)):
        return False
    found = validate(parts, train.eval_tokens, stop)
    if found is None:
        return False
    if group.leads:
        log.complete(found)
    if finished and train.sample_tokens:
        write_samples(parts, state.step, log, finished)
    return finished


def _timed(parts: Parts, state: State) -> Iterator[str]:
    """How often a run read its text that could not know before how much it would read."""
    tokens = state.cursor * parts.config.model.context
    if parts.config.train.seconds and (laps := parts.train.laps(tokens)) > 1:
        yield f"the run read its text {laps:.1f} times"


def _rise(parts: Parts, log: Log) -> Iterator[str]:
    """One line if the model was clearly better before, and which checkpoint is left of that."""
    found = log.validations
    least, last = min(found, key=found.__getitem__, default=0), max(found, default=0)
    if not found or found[last] <= found[least] * (1 + RISE):
        return
    best = log.best(map(checkpoint.step_of, checkpoint.steps(parts.run)))
    yield (
        f"validation was best at step {least}, {found[least]:.4f}, and rose to {found[last]:.4f}, as when a text is "
        f"read too often; the best checkpoint is that of step {best}: khanhllm generate {quoted(parts.run)} --step best"
    )


def _save(parts: Parts, state: State, log: Log, saver: Saver, must: bool, ended: bool = False) -> None:
    """Begin to save; `must` as in Saver.save. ended: whether the run is finished. Raises Apart rather than save weights
    on which processes differ."""
    learner, model, optimizer = parts.learner, parts.learner.model, parts.learner.optimizer
    learner.owners.check(model.state_dict())
    log.flush()
    extra = {
        "cursor": state.cursor,
        "load": state.load_LE.tolist(),
        "data": parts.train.sha256,
        "tokenizer": parts.tokenizer.sha256,
        "folder": str(parts.train.folder.resolve()),
        "guard": asdict(state.guard),
        "seconds": (state.share or 0) * parts.config.train.seconds,
        "ended": parts.config.train.seconds if ended else 0.0,
        "tied": state.tied,
        "model": parts.config.model.model_dump(),
    }
    takers = learner.owners.takers() if saver.shared else {}
    shapes, whole = optim.state_shapes(optimizer), optim.state_shapes(optimizer, learner.part.counts(model))
    moments = learner.owners.gathered(optimizer.state, shapes, whole, takers)
    part = checkpoint.snapshot(state.step, model, optimizer, extra, moments, learner.owners.weights(model, takers))
    del moments  # the saver gives up what was gathered, once it has a copy
    if saver.shared:
        saver.save(part, must)
    else:  # the others hear that the first process is alive, however long it waits for a disk
        learner.machine.group.told(lambda: saver.save(part, must))


def _introduction(parts: Parts, state: State) -> Iterator[str]:
    config, learner = parts.config, parts.learner
    model, part = on_paper(config.model), learner.part
    yield f"model: {total_parameters(model):,} parameters, {active_parameters(model):,} at work on each token"
    if part.of > 1:
        yield f"each process holds {config.model.experts // part.of} of {config.model.experts} experts of a layer"
    for key, value in {"split": config.machine.split, "shares": config.machine.shares}.items():
        if learner.machine.group.alone and value not in ("", "optimizer"):
            yield f"machine.{key} = {value} changes nothing for one process; --machine.processes N starts N"
    yield f"machine: {learner.machine.describe()}; optimizer: {optim.describe(learner.optimizer)}"
    yield (
        f"data: {parts.train.describe()}; "
        f"{config.tokens_per_step:,} a step ({config.train.accumulation} micro-batches of {config.train.rows})"
    )
    if config.data.base and not parts.base:
        yield f"the shards in {config.data.base} are gone, so base_bpb stays empty; --data.base names their place"
    if parts.link:
        yield parts.link.describe()
    known, rows = parts.train.vocab_size, config.model.vocab_size
    if known < rows:
        yield f"the tokenizer has {known:,} tokens, so {rows - known:,} of model.vocab_size = {rows:,} rows stay unused"
    # rows read so far may have come in steps of another size
    tokens = state.cursor * config.model.context + (config.train.steps - state.step) * config.tokens_per_step
    epochs = 0 if config.train.seconds else parts.train.laps(tokens)
    if epochs > 1:
        yield f"the run reads its text {epochs:.1f} times"
    if state.step:
        yield f"resumed after step {state.step}"


def _room(parts: Parts, state: State, size: int) -> str:
    """What `room_for` says of the saves to come, of checkpoints of so many bytes."""
    train = parts.config.train
    left = A_LONG_RUN if train.seconds else train.steps - state.step
    saves = -(-left // train.save_every) if train.save_every else min(left, 1)
    kept = train.keep + train.keep_best
    return room_for(parts.run, size, kept, saves)


@contextmanager
def _own(folder: Path, resume: bool, group: Group) -> Iterator[Path]:
    """The folder that this process writes into: the run's for the first process, which alone is read later, and one
    that disappears for others."""
    if group.leads:
        refuse_to_overwrite(folder, resume)
        with _locked(folder):
            yield folder
    else:
        with TemporaryDirectory(prefix="khanhllm-", dir=launch.place()) as scratch:
            yield Path(scratch)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two trainings in one folder would tear each other's files, and through a link they would tear others'."""
    if fault := foreign(folder, "checkpoints"):
        raise UserError(f"{fault}; a run folder must hold its own files")
    kept = folder / ".lock"
    made = [place for place in (folder, *folder.parents) if not there(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = ExitStack()
        held.enter_context(locked(kept))
    except Timeout:
        raise UserError(f"another training is at work in {folder}; choose another folder with --run") from None
    except OSError as error:
        raise UserError(f"cannot use {folder} as a run folder: {error.strerror}; choose another with --run") from None
    with held:
        try:
            yield
        finally:
            with suppress(OSError):  # of a training that was refused nothing stays
                if [*folder.iterdir()] == [kept]:
                    kept.unlink()
                    for place in made:
                        place.rmdir()
