"""The training run: the only file that assembles everything.

    for each step:  train (step.py) -> validate -> log -> save -> write a sample

A run lives in one folder: config.toml, tokenizer.json, training_log.csv, messages.txt, samples.txt, checkpoints/.
Everything that the future depends on is the weights, the optimizer's moments and a `State`, so a resumed run is the
uninterrupted one, bit for bit (same machine, same torch).
"""

import gc
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from khanhllm import optim
from khanhllm.data.batches import Batch, batches
from khanhllm.data.belt import Belt, Starved
from khanhllm.data.belt_notes import RECIPE
from khanhllm.data.ensure import check_rows_fit, ensure
from khanhllm.data.shards import MANIFEST, Shards
from khanhllm.data.tokenizer import Tokenizer
from khanhllm.errors import UserError
from khanhllm.files import foreign, there
from khanhllm.inference.generate import write
from khanhllm.inference.score import Score, score
from khanhllm.log.run_log import Log, lacks_validation
from khanhllm.machine.devices import Machine, open_machine, out_of_memory
from khanhllm.machine.signals import Stop, stop_signals
from khanhllm.model.counts import active_parameters, on_paper, total_parameters
from khanhllm.planning import budget
from khanhllm.schema import Config, Sampling, TrainConfig
from khanhllm.settings import read_toml, refuse_to_overwrite, resolve, write_config
from khanhllm.training import checkpoint
from khanhllm.training.guard import Diverged, Guard
from khanhllm.training.saver import Saver, room_for
from khanhllm.training.step import Learner, NoRows, State, train_step

A_LONG_RUN = 10**9
"""steps of a run that is given its time"""
A_SECOND = 20_000
"""tokens trained on in one, before it is known: decides how long a text the tokenizer learns from"""


@dataclass(frozen=True)
class Parts:
    """What a run is made of, once everything is open."""

    run: Path
    learner: Learner
    tokenizer: Tokenizer
    train: Shards | Belt
    validation: Shards

    @property
    def config(self) -> Config:
        return self.learner.config


def train(config: Config, folder: Path, resume: bool = False) -> str:
    """Train until `config.train.steps`, or until its time is used up, or until a signal asks to stop. Returns the name
    of that signal; empty if the run is finished.

    Raises UserError for what the user can put right, before any long work where that is possible.
    """
    with _opened(config, folder, resume) as (parts, state, log, saver, stop):
        train = parts.config.train
        rows = _batches(parts, state, stop)
        started = time.perf_counter() - (state.share or 0) * train.seconds
        first, finished = state.step + 1, _make_up(parts, state, log, stop)
        last = finished or bool(stop.asked)
        while not last:
            try:
                state, row = train_step(parts.learner, state, rows)
            except (NoRows, Starved) as error:
                if state.step >= first:
                    _save(parts, state, log, saver, must=True)
                if isinstance(error, Starved):
                    raise Starved(f"{error} (at step {state.step}; to continue: --resume --run {folder})") from None
                break
            except (torch.OutOfMemoryError, RuntimeError) as error:
                parts = _with_smaller_micro_batches(parts, state, error, log)
                rows = _batches(parts, state, stop)
                continue
            if state.step == first:
                gc.freeze()  # what is alive now lives as long as the run: the garbage collector may skip it
            if row["fault"]:
                log.say(f"step {state.step} is rejected: {row['fault']}; weights and moments stay as they were")
            if state.guard.rejected >= parts.config.guard.patience:
                state = _return_to_checkpoint(parts, state, log, saver)
                continue
            seconds = time.perf_counter() - started
            state, finished = _progress(train, state, seconds, saver, log)
            if due(state.step, train.eval_every) or finished:
                row |= validate(parts, train.eval_tokens, stop) or {}
                finished = finished and "val_ce" in row
            last = finished or bool(stop.asked)
            log.add(row | {"memory_mb": parts.learner.machine.peak_memory(), "seconds": seconds})
            saver.report()
            if due(state.step, train.save_every) or last:
                _save(parts, state, log, saver, must=last)
            if (due(state.step, train.sample_every) or finished) and train.sample_tokens:
                _write_sample(parts, state.step, log)
        if not finished:
            log.say(f"stopped by {stop.asked}; to continue: khanhllm train --resume --run {folder}")
        return "" if finished else stop.asked


@contextmanager
def _opened(config: Config, folder: Path, resume: bool) -> Iterator[tuple[Parts, State, Log, Saver, Stop]]:
    """Everything that a training needs, opened in an order that finds mistakes before long work, and closed again."""
    refuse_to_overwrite(folder, resume)
    machine = open_machine(config.machine)
    threads, products = torch.get_num_threads(), torch.get_float32_matmul_precision()
    machine.take_process()
    if config.train.micro_batch == "auto":
        config = budget.fit_micro_batch(config, budget.here(machine))
    with _locked(folder):
        if resume and checkpoint.steps(folder):
            _check_same(config, folder)
        paper = on_paper(config.model)
        last = checkpoint.newest(folder, paper=paper) if resume else None
        saved = checkpoint.read_state(last) if last else {}
        if last:
            _check_longer(config, folder, saved)
        parts = assemble(config, folder, saved, machine)
        state = _restore(parts, last) if last else parts.learner.start()
        tight = _room(parts, state)
        with (
            stop_signals() as stop,
            Log.open(folder, config, state.step, total_parameters(parts.learner.model)) as log,
            Saver(folder, config.train.keep, log.say) as saver,
        ):
            stop.over_panel = log.terminal.live is not None
            parts.tokenizer.save(folder / "tokenizer.json")
            write_config(config, folder)
            checkpoint.reject_after(folder, state.step, paper)
            for line in filter(None, (*_introduction(parts, state), tight)):
                log.say(line)
            try:
                yield parts, state, log, saver, stop
            finally:
                torch.set_num_threads(threads)
                torch.set_float32_matmul_precision(products)
                gc.unfreeze()
                if parts.learner.machine.compile:
                    torch.compiler.reset()  # a process may compile only so many models; the next one may need the room


def _progress(train: TrainConfig, state: State, seconds: float, saver: Saver, log: Log) -> tuple[State, bool]:
    """The state with the share of the time budget that is used up, and whether the run is finished."""
    if state.share is None:
        return state, state.step == train.steps
    share = seconds / train.seconds
    # finished when there is no time left for another step and for saving
    finished = share + (share - state.share) + saver.seconds / train.seconds >= 1
    log.expect(state.step if finished else max(state.step + 1, round(state.step / share)))
    return replace(state, share=share), finished


def _batches(parts: Parts, state: State, stop: Stop) -> Iterator[Batch]:
    train = parts.config.train
    return batches(parts.train, train.rows, train.seed, state.cursor, parts.learner.machine.device, lambda: stop.asked)


def _return_to_checkpoint(parts: Parts, state: State, log: Log, saver: Saver) -> State:
    """After several rejected steps in a row: load weights and moments of the last good checkpoint, and skip the rows
    read since then. Raises Diverged if that has been tried often enough."""
    learner, guard = parts.learner, state.guard
    saver.report(patient=True)
    good = checkpoint.newest(parts.run, log.say, suits=lambda saved: not saved["guard"]["rejected"])
    where = f"step {int(good.name[5:])}" if good else "the beginning"
    told = f"step {state.step}: {guard.rejected} steps in a row were rejected"
    if guard.returns >= learner.config.guard.returns:
        again = "--resume goes on from there" if good else "nothing was saved yet"
        raise Diverged(
            f"{told}, after {guard.returns} returns; the last good state is that of {where} ({again}). "
            f"Try a smaller --optim.lr (now {learner.config.optim.lr:g}), or a larger --guard.spike for unusual text"
        )
    restored = _restore(parts, good) if good else learner.restart()
    for group in learner.optimizer.param_groups:
        group["step"] = -1
    checkpoint.reject_after(parts.run, restored.step)
    log.rewind(restored.step)
    log.say(f"{told}; back to {where}, beyond the {state.cursor - restored.cursor:,} rows since then")
    # time that was used up stays so, as do rows
    guard = replace(restored.guard, accepted=0, returns=guard.returns + 1)
    return replace(restored, cursor=state.cursor, guard=guard, share=state.share)


def _with_smaller_micro_batches(parts: Parts, state: State, error: RuntimeError, log: Log) -> Parts:
    """Handle an error in a step: if memory ran out, halve the micro-batch, so that the same step can be taken again.

    Raises any other error again, and UserError if the micro-batch is one row or the update had begun.
    """
    if not out_of_memory(error):
        raise error
    config, rows = parts.config, parts.config.train.rows
    optimizer, machine = parts.learner.optimizer, parts.learner.machine
    updating = optimizer.param_groups[0]["step"] == state.step
    optimizer.zero_grad(set_to_none=True)
    traceback.clear_frames(error.__traceback__)  # they hold the tensors of the step that failed
    machine.give_back_memory()
    if rows == 1 or updating:
        told = budget.advice(config, budget.here(machine))
        raise UserError(f"step {state.step + 1}: out of memory with a micro-batch of {rows}; {told}") from None
    smaller = budget.with_micro_batch(
        config, max(cut for cut in budget.micro_batch_sizes(config, 2**62) if cut <= rows // 2)
    )
    write_config(smaller, parts.run)
    log.say(f"step {state.step + 1}: out of memory; again with micro-batches of {smaller.train.rows} instead of {rows}")
    return replace(parts, learner=replace(parts.learner, config=smaller))


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Stopped(Exception):
    """A signal asks to stop while the validation is at work."""


def validate(parts: Parts, tokens: int, stop: Stop) -> Score | None:
    """Score the first `tokens` tokens of the validation documents, always the same ones. None if a signal asks to stop:
    a resumed run then makes up for it, from the same weights."""

    def windows() -> Iterator[np.ndarray]:
        for window in islice(parts.validation.windows(), -(-tokens // parts.config.model.context)):
            if stop.asked:
                raise _Stopped
            yield window

    learner = parts.learner
    try:
        return score(learner.model, windows(), parts.tokenizer.token_bytes, learner.machine, parts.config.train.rows)
    except _Stopped:
        return None


def _make_up(parts: Parts, state: State, log: Log, stop: Stop) -> bool:
    """Validate after the step that a resumed run starts from, if a signal cut that short, so that its log is the
    uninterrupted one's. Returns whether that finishes the run."""
    train = parts.config.train
    finished = state.share is None and state.step == train.steps
    if not (due(state.step, train.eval_every) or finished) or not lacks_validation(parts.run, parts.config, state.step):
        return False
    found = validate(parts, train.eval_tokens, stop)
    if found is None:
        return False
    log.complete(found)
    if finished and train.sample_tokens:
        _write_sample(parts, state.step, log)
    return finished


def _write_sample(parts: Parts, step: int, log: Log) -> None:
    train = parts.config.train
    sampling = Sampling(tokens=train.sample_tokens, seed=train.seed + step)
    learner = parts.learner
    pieces = write(learner.model, parts.tokenizer, learner.machine, train.sample_prompt, sampling)
    text = train.sample_prompt + "".join(pieces)
    log.say(f"step {step} writes: {' '.join(text.split())[:300]}")
    try:
        with (parts.run / "samples.txt").open("a", encoding="utf-8", errors="replace") as file:
            file.write(f"--- step {step}\n{text}\n")
    except OSError as error:
        log.say(f"the sample could not be kept: {error}; training continues")


def _save(parts: Parts, state: State, log: Log, saver: Saver, must: bool) -> None:
    """Begin to save; `must` as in Saver.save."""
    log.flush()
    extra = {
        "cursor": state.cursor,
        "load": state.load_LE.tolist(),
        "data": parts.train.sha256,
        "folder": str(parts.train.folder.resolve()),
        "guard": asdict(state.guard),
        "seconds": (state.share or 0) * parts.config.train.seconds,
    }
    saver.save(state.step, parts.learner.model, parts.learner.optimizer, extra, must)


def assemble(config: Config, folder: Path, saved: dict[str, Any], machine: Machine) -> Parts:
    """Open everything that the run needs. A resumed run takes the shards it has, wherever it is called from."""
    data = Path(saved.get("folder", ""))
    own = {"source": str(data), "tokenizer": ""} if saved and there(data / MANIFEST) else {}
    check_rows_fit(own.get("source", config.data.source), config.data.shard_tokens, config.model.context)
    needed = config.train.seconds * A_SECOND or config.train.steps * config.tokens_per_step
    data = ensure(config.data.model_copy(update=own), config.model.vocab_size, round(needed))
    tokenizer = Tokenizer.load(data / "tokenizer.json")
    train: Shards | Belt = (
        Belt(data, config.model.context, config.data.ahead, config.data.disk, config.data.patience)
        if (data / RECIPE).exists()
        else Shards.open(data, "train", config.model.context)
    )
    validation = Shards.open(data, "validation", config.model.context)
    return Parts(folder, Learner.new(config, machine), tokenizer, train, validation)


def _check_same(config: Config, folder: Path) -> None:
    """What a resumed run cannot change, refused before its checkpoints are read."""
    kept = resolve(read_toml(folder / "config.toml"), where=str(folder / "config.toml"))
    fixed = [("model", config.model, kept.model), ("data", config.data, kept.data)]
    changed = [f"{name}.{key}" for name, new, old in fixed for key, value in new if value != getattr(old, key)]
    changed = [key for key in changed if key not in ("data.workers", "data.cache", "data.tokens")]
    changed += ["train.seed"] if config.train.seed != kept.train.seed else []
    if changed:
        raise UserError(f"{folder} was trained with another {changed[0]}; change it in a new run (--run)")


def _check_longer(config: Config, folder: Path, saved: dict[str, Any]) -> None:
    """A resumed run must have something left to do."""
    train, step = config.train, saved["step"]
    done = train.steps <= step and not (train.steps == step and lacks_validation(folder, config, step))
    if not train.seconds and done:
        raise UserError(f"{folder} has {step:,} steps already; to continue, give a larger --steps (or --tokens)")
    if 0 < train.seconds <= saved["seconds"]:
        raise UserError(f"{folder} has used {saved['seconds']:.0f} s already; to continue, give a longer --for")


def _restore(parts: Parts, path: Path) -> State:
    """Bring weights, moments and state back from a checkpoint."""
    saved, learner = checkpoint.read_state(path), parts.learner
    if saved["data"] != parts.train.sha256:
        raise UserError(f"{path} was trained on other shards than those in {parts.train.folder}; see data.* keys")
    checkpoint.load_model(path, learner.model)
    checkpoint.load_optimizer(path, learner.model, learner.optimizer, saved["optimizer"])
    start = learner.start()
    load_LE = torch.tensor([share for layer in saved["load"] for share in layer], device=learner.machine.device)
    if len(load_LE) != start.load_LE.numel():
        raise UserError(f"{path / 'state.json'} has the load of other experts than this model's")
    budget_s = learner.config.train.seconds
    share = saved["seconds"] / budget_s if budget_s else None
    return State(saved["step"], saved["cursor"], load_LE.view_as(start.load_LE), Guard(**saved["guard"]), share)


def _introduction(parts: Parts, state: State) -> Iterator[str]:
    config, learner = parts.config, parts.learner
    model = learner.model
    yield f"model: {total_parameters(model):,} parameters, {active_parameters(model):,} at work on each token"
    yield f"machine: {learner.machine.describe()}; optimizer: {optim.describe(learner.optimizer)}"
    yield (
        f"data: {parts.train.describe()}; "
        f"{config.tokens_per_step:,} a step ({config.train.accumulation} micro-batches of {config.train.rows})"
    )
    epochs = 0 if config.train.seconds else parts.train.laps(config.train.steps * config.tokens_per_step)
    if epochs > 1:
        yield f"the run reads its text {epochs:.1f} times"
    if state.step:
        yield f"resumed after step {state.step}"


def _room(parts: Parts, state: State) -> str:
    """What `room_for` says of the saves to come."""
    train, learner = parts.config.train, parts.learner
    left = A_LONG_RUN if train.seconds else train.steps - state.step
    saves = -(-left // train.save_every) if train.save_every else min(left, 1)
    return room_for(parts.run, checkpoint.size(learner.model, learner.optimizer), train.keep, saves)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two trainings in one folder would tear each other's files, and through a link they would tear others'."""
    if fault := foreign(folder):
        raise UserError(f"{fault}; a run folder must hold its own files")
    kept = folder / ".lock"
    lock = FileLock(kept, timeout=0)
    made = [place for place in (folder, *folder.parents) if not there(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"another training is at work in {folder}; choose another folder with --run") from None
    except OSError as error:
        raise UserError(f"cannot use {folder} as a run folder: {error.strerror}; choose another with --run") from None
    try:
        yield
    finally:
        with suppress(OSError):  # of a training that was refused nothing stays
            if [*folder.iterdir()] == [kept]:
                kept.unlink()
                for place in made:
                    place.rmdir()
        lock.release()
