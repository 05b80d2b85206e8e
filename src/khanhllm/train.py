"""The training run: the only file that assembles everything.

    for each step:  get micro-batches -> forward, loss + balance, backward (x accumulation) -> clip, update -> log, save

A run lives in one folder: config.toml, tokenizer.json, training_log.csv, samples.txt, checkpoints/. Everything that
the future depends on is the weights, the optimizer's moments and a `State` of three numbers and the last expert load,
so a resumed run is the uninterrupted one, bit for bit (same machine, same torch).
"""

import gc
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from khanhllm import budget, checkpoint, objectives, optim, schedule
from khanhllm.config import Config, Sampling, UserError
from khanhllm.data.batches import Batch, batches
from khanhllm.data.belt import Belt, Starved
from khanhllm.data.maker import RECIPE
from khanhllm.data.prepare import ensure
from khanhllm.data.shards import MANIFEST, Shards
from khanhllm.evaluate import Score, score
from khanhllm.files import foreign, there
from khanhllm.generate import write
from khanhllm.log import Log
from khanhllm.machine.fit import fit
from khanhllm.machine.runtime import Machine, open_machine, out_of_memory
from khanhllm.machine.signals import Stop, stop_signals
from khanhllm.machine.weights import keep_in_bf16
from khanhllm.model import Transformer
from khanhllm.model.counts import active_parameters, flops_per_token, on_paper, total_parameters
from khanhllm.model.router import Routing, stack
from khanhllm.settings import read_toml, resolve, to_toml
from khanhllm.tokenizer import Tokenizer


@dataclass(frozen=True)
class State:
    """Where a run stands, but for weights and moments."""

    step: int
    """optimizer steps done"""
    cursor: int
    """rows trained on"""
    load_LE: Tensor
    """each expert's share of the load in the last step, for each mixture layer; stays on the device"""


@dataclass(frozen=True)
class Parts:
    """What a run is made of, once everything is open."""

    config: Config
    run: Path
    machine: Machine
    tokenizer: Tokenizer
    train: Shards | Belt
    validation: Shards
    model: Transformer
    optimizer: torch.optim.Optimizer
    flops_per_token: int


def run(config: Config, folder: Path, resume: bool = False) -> None:
    """Train until `config.train.steps`, or until a signal asks to stop.

    Raises UserError for what the user can put right, before any long work where that is possible.
    """
    refuse_to_overwrite(folder, resume)
    if config.train.micro_batch == "auto":
        config = budget.fitted(config, budget.here(open_machine(config.machine)))
    with _locked(folder):
        last = checkpoint.newest(folder, paper=on_paper(config.model)) if resume else None
        saved = checkpoint.read_state(last) if last else {}
        if last:
            _check_continuable(config, folder, saved)
        parts = assemble(config, folder, saved)
        state = _continue(parts, last, saved) if last else start(parts)
        with Log.open(folder, config, state.step, total_parameters(parts.model)) as log, stop_signals() as stop:
            parts.tokenizer.save(folder / "tokenizer.json")
            write_config(config, folder)
            checkpoint.reject_after(folder, state.step)
            for line in _introduction(parts, state):
                log.say(line)
            _loop(parts, state, log, stop)


def _loop(parts: Parts, state: State, log: Log, stop: Stop) -> None:
    train = parts.config.train
    rows = _rows(parts, state, stop)
    started = time.perf_counter()
    first, last = state.step + 1, False
    while not last:
        try:
            state, row = train_step(parts, state, rows)
        except (NoRows, Starved) as error:
            if state.step >= first:
                log.flush()
                _save(parts, state, log, must=True)
            if isinstance(error, Starved):
                raise Starved(f"{error} (saved at step {state.step}; to go on: --resume --run {parts.run})") from None
            break
        except (torch.OutOfMemoryError, RuntimeError) as error:
            parts = _with_smaller_micro_batches(parts, state, error, log)
            rows = _rows(parts, state, stop)
            continue
        if state.step == first:
            gc.freeze()  # what is alive now lives as long as the run: the garbage collector may pass it by
        last = state.step == train.steps or bool(stop.asked)
        if due(state.step, train.eval_every) or state.step == train.steps:
            row |= validate(parts, train.eval_tokens)
        log.add(row | {"memory_mb": parts.machine.peak_memory(), "seconds": time.perf_counter() - started})
        if due(state.step, train.save_every) or last:
            log.flush()
            _save(parts, state, log, must=last)
        if (due(state.step, train.sample_every) or state.step == train.steps) and train.sample_tokens:
            _write_sample(parts, state.step, log)
    if state.step < train.steps:
        log.say(f"stopped by {stop.asked}; to go on: khanhllm train --resume --run {parts.run}")


def _rows(parts: Parts, state: State, stop: Stop) -> Iterator[Batch]:
    train = parts.config.train
    return batches(parts.train, train.rows, train.seed, state.cursor, parts.machine.device, lambda: stop.asked)


class NoRows(Exception):
    """A signal asked to stop while the step was waiting for its rows."""


def _with_smaller_micro_batches(parts: Parts, state: State, error: RuntimeError, log: Log) -> Parts:
    """The answer to an error in a step: if memory ran out, the same step can be taken again in smaller pieces.

    Raises the error if it is another one, and UserError if there is nothing to cut or the update had begun.
    """
    if not out_of_memory(error):
        raise error
    config, rows = parts.config, parts.config.train.rows
    updating = parts.optimizer.param_groups[0]["step"] == state.step
    parts.optimizer.zero_grad(set_to_none=True)
    traceback.clear_frames(error.__traceback__)  # they hold the tensors of the step that failed
    parts.machine.give_back_memory()
    if rows == 1 or updating:
        told = budget.advice(config, budget.here(parts.machine))
        raise UserError(f"step {state.step + 1}: out of memory with a micro-batch of {rows}; {told}") from None
    smaller = budget.with_cut(config, max(cut for cut in budget.cuts(config, 2**62) if cut <= rows // 2))
    write_config(smaller, parts.run)
    log.say(f"step {state.step + 1}: out of memory; again with micro-batches of {smaller.train.rows} instead of {rows}")
    return replace(parts, config=smaller)


def train_step(parts: Parts, state: State, rows: Iterator[Batch]) -> tuple[State, dict[str, Any]]:
    """One optimizer step: its micro-batches forward and backward, one update. Returns the next state and what to log.

    Raises UserError, with the weights untouched, when the gradient is not finite.
    """
    config, optimizer = parts.config, parts.optimizer
    start = time.perf_counter()
    micro_batches = list(islice(rows, config.train.accumulation))
    if len(micro_batches) < config.train.accumulation:
        raise NoRows
    waited = time.perf_counter() - start
    load_LE = load_for_balance(parts, state, micro_batches)
    nll, routing_L = accumulate(parts, micro_batches, load_LE)
    grad_norm = torch.nn.utils.clip_grad_norm_(parts.model.parameters(), config.optim.clip or torch.inf)
    if not torch.isfinite(grad_norm):
        raise UserError(
            f"step {state.step + 1}: the gradient is not finite, so nothing was updated; "
            f"go on from the last checkpoint with --resume and a smaller --optim.lr (now {config.optim.lr:g})"
        )
    height = schedule.factor(state.step, config.train.steps, config.schedule)
    for group in optimizer.param_groups:
        group |= {"lr": group["peak_lr"] * height, "step": state.step}
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    share_LE = routing_L.load_E / routing_L.load_E.sum(-1, keepdim=True)
    following = State(state.step + 1, micro_batches[-1].cursor, share_LE)
    row = {
        "step": following.step,
        "tokens": following.cursor * config.model.context,
        "loss": nll / config.tokens_per_step,
        "lr": config.optim.lr * height,
        "grad_norm": grad_norm,
    }
    if share_LE.numel():
        balance_L = objectives.load_balance(routing_L.load_E, routing_L.prob_E)
        row |= {
            "balance": balance_L.mean(),
            "router_z": routing_L.z.mean() / config.tokens_per_step,
            "balance_per_layer": balance_L,
            "load_per_layer": share_LE,
        }
    took = time.perf_counter() - start
    rate = config.tokens_per_step / took
    peak = parts.machine.peak_flops
    mfu = rate * parts.flops_per_token / peak if peak else None
    return following, row | {"tokens_per_s": rate, "mfu": mfu, "waiting": waited / took}


def accumulate(parts: Parts, micro_batches: list[Batch], load_LE: Tensor) -> tuple[Tensor, Routing]:
    """Add the gradient of the step's loss to `.grad`, one micro-batch at a time (gradient accumulation).

    Returns the sum of token losses (nats) and the summed routing of all mixture layers, both without gradient.
    """
    config, weights = parts.config, parts.config.loss
    sums: list[Tensor] = []
    for batch in micro_batches:
        with parts.machine.autocast():
            nll_BT, routings = parts.model(batch.inputs_BT, batch.targets_BT)
        routing_L = stack(routings, like=load_LE)
        loss = objectives.share_of_step(
            nll_BT, routing_L.prob_E, routing_L.z, load_LE, config.tokens_per_step, weights.balance, weights.router_z
        )
        loss.backward()
        seen = [tensor.detach() for tensor in (nll_BT.sum(), *routing_L)]
        sums = [old + new for old, new in zip(sums, seen, strict=True)] if sums else seen
    return sums[0], Routing(*sums[1:])


def load_for_balance(parts: Parts, state: State, micro_batches: list[Batch]) -> Tensor:
    """(L, E): each expert's share of the load, over a whole step: the previous one, or this one counted beforehand."""
    if parts.config.loss.load == "previous" or not state.load_LE.numel():
        return state.load_LE
    counted = torch.zeros_like(state.load_LE)
    with torch.no_grad(), parts.machine.autocast():
        for batch in micro_batches:
            counted += stack(parts.model.trunk(batch.inputs_BT)[1], like=counted).load_E
    return counted / counted.sum(-1, keepdim=True)


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def validate(parts: Parts, tokens: int) -> Score:
    """Score the first `tokens` tokens of the validation documents, always the same ones."""
    windows = islice(parts.validation.windows(), -(-tokens // parts.config.model.context))
    rows = parts.config.train.rows
    return score(parts.model, windows, parts.tokenizer.token_bytes, parts.machine, rows)


def _write_sample(parts: Parts, step: int, log: Log) -> None:
    train = parts.config.train
    sampling = Sampling(tokens=train.sample_tokens, seed=train.seed + step)
    pieces = write(parts.model, parts.tokenizer, parts.machine, train.sample_prompt, sampling)
    text = train.sample_prompt + "".join(pieces)
    log.say(f"step {step} writes: {' '.join(text.split())[:300]}")
    try:
        with (parts.run / "samples.txt").open("a", encoding="utf-8", errors="replace") as file:
            file.write(f"--- step {step}\n{text}\n")
    except OSError as error:
        log.say(f"the sample could not be kept: {error}; training goes on")


def _save(parts: Parts, state: State, log: Log, must: bool) -> None:
    """Save, and let the run go on if that fails; but `must` is the last chance, so then the failure is the user's."""
    extra = {
        "cursor": state.cursor,
        "load": state.load_LE.tolist(),
        "data": parts.train.sha256,
        "folder": str(parts.train.folder.resolve()),
    }
    try:
        path = checkpoint.save(parts.run, state.step, parts.model, parts.optimizer, extra)
    except OSError as error:
        fault = f"step {state.step} could not be saved: {error}"
        if must:
            raise UserError(f"{fault}; the checkpoints before it are intact") from None
        log.say(f"{fault}; training goes on, the checkpoints before it are intact")
        return
    checkpoint.prune(parts.run, parts.config.train.keep)
    log.say(f"saved {path}")


def assemble(config: Config, folder: Path, saved: dict[str, Any]) -> Parts:
    """Open everything that the run needs. A resumed run takes the shards it has, wherever it is called from."""
    machine = open_machine(config.machine)
    data = Path(saved.get("folder", ""))
    own = {"source": str(data), "tokenizer": ""} if saved and there(data / MANIFEST) else {}
    needed = config.train.steps * config.tokens_per_step
    data = ensure(config.data.model_copy(update=own), config.model.vocab_size, needed)
    tokenizer = Tokenizer.load(data / "tokenizer.json")
    train: Shards | Belt = (
        Belt(data, config.model.context, config.data.ahead, config.data.disk, config.data.patience)
        if (data / RECIPE).exists()
        else Shards.open(data, "train", config.model.context)
    )
    validation = Shards.open(data, "validation", config.model.context)
    model = new_model(config, machine)
    return Parts(
        config=config,
        run=folder,
        machine=machine,
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        model=model,
        optimizer=optim.build(model, config.optim, config.train.seed),
        flops_per_token=flops_per_token(model),
    )


def new_model(config: Config, machine: Machine) -> Transformer:
    model = Transformer(config.model, config.loss.chunk)
    model.initialise(torch.Generator().manual_seed(config.train.seed))
    if config.machine.weights == "bf16":
        keep_in_bf16(model, config.machine.gradients)
    return fit(model.to(machine.device), machine, config.machine.checkpointing)


def start(parts: Parts) -> State:
    model = parts.config.model
    return State(0, 0, objectives.even_load(len(model.moe_layers), model.experts).to(parts.machine.device))


def _check_continuable(config: Config, folder: Path, saved: dict[str, Any]) -> None:
    """What a resumed run cannot change, refused before anything is opened."""
    kept = resolve(read_toml(folder / "config.toml"), where=str(folder / "config.toml"))
    if config.train.steps <= saved["step"]:
        raise UserError(f"{folder} has {saved['step']} steps already; to train on, give a larger --steps")
    fixed = [("model", config.model, kept.model), ("data", config.data, kept.data)]
    changed = [f"{name}.{key}" for name, new, old in fixed for key, value in new if value != getattr(old, key)]
    changed = [key for key in changed if key not in ("data.workers", "data.cache", "data.tokens")]
    changed += ["train.seed"] if config.train.seed != kept.train.seed else []
    if changed:
        raise UserError(f"{folder} was trained with another {changed[0]}; change it in a new run (--run)")


def _continue(parts: Parts, path: Path, saved: dict[str, Any]) -> State:
    """Bring weights, moments and state back from a checkpoint."""
    if saved["data"] != parts.train.sha256:
        raise UserError(f"{path} was trained on other shards than those in {parts.train.folder}; see data.* keys")
    checkpoint.load_model(path, parts.model)
    checkpoint.load_optimizer(path, parts.model, parts.optimizer, saved["optimizer"])
    even = start(parts).load_LE
    load_LE = torch.tensor([share for layer in saved["load"] for share in layer], device=even.device)
    if len(load_LE) != even.numel():
        raise UserError(f"{path / 'state.json'} has the load of other experts than this model's")
    return State(saved["step"], saved["cursor"], load_LE.view_as(even))


def _introduction(parts: Parts, state: State) -> Iterator[str]:
    config, model = parts.config, parts.model
    yield f"model: {total_parameters(model):,} parameters, {active_parameters(model):,} at work on each token"
    yield f"machine: {parts.machine.describe()}; optimizer: {optim.describe(parts.optimizer)}"
    yield (
        f"data: {parts.train.describe()}; "
        f"{config.tokens_per_step:,} a step ({config.train.accumulation} micro-batches of {config.train.rows})"
    )
    epochs = parts.train.laps(config.train.steps * config.tokens_per_step)
    if epochs > 1:
        yield f"the run reads its text {epochs:.1f} times"
    if state.step:
        yield f"resumed after step {state.step}"


def write_config(config: Config, folder: Path) -> None:
    """Replace the run's config.toml in one rename: half of one would be worse than an old one."""
    aside = folder / "config.tmp"
    try:
        aside.write_text(to_toml(config), encoding="utf-8")
        aside.replace(folder / "config.toml")
    except OSError as error:
        raise UserError(f"cannot write {folder / 'config.toml'}: {error.strerror}") from None


def refuse_to_overwrite(folder: Path, resume: bool) -> None:
    if not resume and (folder / "config.toml").exists():
        raise UserError(f"{folder} already holds a run; continue it with --resume, or choose another with --run")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two trainings in one folder would tear each other's files, and through a link they would tear others'."""
    if fault := foreign(folder):
        raise UserError(f"{fault}; a run folder must hold its own files")
    lock = FileLock(folder / ".lock", timeout=0)
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
        lock.release()
