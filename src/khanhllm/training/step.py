"""One optimizer step, and what it works on.

get micro-batches -> forward, loss + balance, backward (x accumulation) -> clip -> believe it? -> update
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from khanhllm import optim
from khanhllm.data.batches import Batch
from khanhllm.data.belt import Starved
from khanhllm.errors import UserError
from khanhllm.machine.adapt import adapt, is_small
from khanhllm.machine.devices import Machine, keep_freed_memory, out_of_memory
from khanhllm.machine.group import Lost
from khanhllm.machine.owners import Owners
from khanhllm.machine.parted import Parted
from khanhllm.model import Transformer, exchange, losses
from khanhllm.model.counts import flops_per_token
from khanhllm.model.exchange import Part
from khanhllm.model.router import Routing, move_biases, stack
from khanhllm.model.tied import tie, tie_gradients
from khanhllm.optim import schedule
from khanhllm.schema import Config
from khanhllm.training.guard import Guard


@dataclass(frozen=True)
class Learner:
    """A model and its optimizer, on a machine."""

    config: Config
    machine: Machine
    model: Transformer
    optimizer: torch.optim.Optimizer
    flops_per_token: int
    owners: Owners

    @classmethod
    def new(cls, config: Config, machine: Machine) -> "Learner":
        model = initial_model(config)
        keep_freed_memory(is_small(model))
        kind, group, flops = config.machine, machine.group, flops_per_token(model)
        cut = kind.split == "all" and not group.alone
        exchanges = exchange.spread(model, group.part, group.swap) if group.parts > 1 else ()
        model = adapt(model, machine, kind.checkpointing, kind.weights, kind.gradients, move=not cut)
        optimizer = optim.build(model, config.optim, config.train.seed)
        optim.refuse_torn_moments(optimizer, group.part.counts(model))
        if cut:
            from khanhllm.machine.sharded import Sharded  # only here, as its import takes a second

            owners: Owners = Sharded(model, machine)
        else:
            owners = Parted(model, machine, exchanges) if exchanges else Owners(model.parameters(), group)
        return cls(config, machine, model, optimizer, flops, owners)

    @property
    def part(self) -> Part:
        """The experts that this process holds."""
        return self.machine.group.part

    def restart(self) -> "State":
        """Bring back the weights that the run began with, without moments."""
        self.model.load_state_dict(self.part.weights(initial_model(self.config).state_dict()))
        self.optimizer.state.clear()
        return self.start()

    def start(self) -> "State":
        shape = self.config.model
        load_LE = losses.even_load(len(shape.moe_layers), shape.experts).to(self.machine.device)
        share = 0.0 if self.config.train.seconds else None
        return State(0, 0, load_LE, share=share, tied=bool(self.config.schedule.tied_experts))


def initial_model(config: Config) -> Transformer:
    """The model that a run of this config begins with: drawn in fp32 on the CPU, whatever machine it then goes to."""
    model = Transformer(config.model, config.loss.chunk)
    model.initialise(torch.Generator().manual_seed(config.train.seed))
    if config.schedule.tied_experts:
        tie(model)
    return model


@dataclass(frozen=True)
class State:
    """Where a run stands, but for weights and moments."""

    step: int
    """optimizer steps done"""
    cursor: int
    """rows trained on, or passed"""
    load_LE: Tensor
    """each expert's share of the load in the last step, for each mixture layer; stays on the device"""
    guard: Guard = field(default_factory=Guard)
    share: float | None = None
    """of the time that the run may take, used up so far; None where its steps are counted"""
    tied: bool = False
    """whether the experts still learn together (model/tied.py)"""


class NoRows(Exception):
    """A signal asked to stop while the step was waiting for its rows."""


def train_step(learner: Learner, state: State, batches: Iterator[Batch]) -> tuple[State, dict[str, Any]]:
    """One optimizer step: its micro-batches forward and backward, one update. Returns the next state and what to log.

    A step that the guard rejects leaves weights and moments as they are, and its row says why under "fault". So does a
    step in which no target counts, whose row has no loss. Raises NoRows if the batches end.
    """
    config, optimizer = learner.config, learner.optimizer
    started = time.perf_counter()
    micro_batches, waited, tokens, counted = _rows(learner, batches)
    following = replace(state, step=state.step + 1, cursor=state.cursor + config.train.rows_per_step)
    if not counted:
        return following, {"fault": ""} | _progress(config, following, counted)
    load_LE = load_for_balance(learner, state, micro_batches)
    sums: list[Tensor] = []
    with _all_or_none(learner):
        for batch in micro_batches:  # gradient accumulation: `.grad` adds up to the gradient of the step's loss
            rows, autocast = batch[:2], learner.machine.autocast()
            loss, nll, routing_L = losses.micro_batch_loss(
                learner.model, *rows, load_LE, tokens, config.loss, autocast, counted, batch.extras
            )
            loss.backward()  # type: ignore[no-untyped-call]
            sums = [old + new for old, new in zip(sums, (nll, *routing_L), strict=True)] if sums else [nll, *routing_L]
    nll, *routing = learner.machine.group.sum(*sums)
    routing_L = Routing(*routing)
    learner.owners.collect()
    if tied := _tied(state, config):
        tie_gradients(learner.model)
    grad_norm = learner.owners.clip(config.optim.clip or torch.inf)
    # our only wait for the device in a step, but for mixture layers: experts one by one on CUDA, and those on several
    # processes, wait in each; the 8-bit optimizers of bitsandbytes wait again, once for each parameter
    mean_nll, norm = torch.stack([nll.float() / counted, grad_norm.float()]).tolist()
    fault = state.guard.fault(mean_nll, norm, config.guard)
    factor = rate_factor(state, config)
    copies = config.model.experts // config.model.experts_per_token if tied else 1
    if not fault:
        for group in optimizer.param_groups:
            group |= {"lr": group["peak_lr"] * factor, "step": state.step, "copies": copies}
        learner.owners.update(optimizer)
        if config.model.router_bias:
            move_biases(learner.model, routing_L.load_E, config.loss.bias_rate)
        if tied:
            tie(learner.model)
    optimizer.zero_grad(set_to_none=True)
    following = replace(
        following,
        load_LE=state.load_LE if fault else _shares(routing_L.load_E),
        guard=state.guard.reject() if fault else state.guard.accept(mean_nll, state.cursor),
        tied=tied,
    )
    measured = {"loss": mean_nll, "lr": config.optim.lr * factor, "grad_norm": norm, "fault": fault}
    row = _progress(config, following, counted) | _speed(learner, time.perf_counter() - started, waited)
    return following, measured | row | _routed(routing_L, tokens)


def _rows(learner: Learner, batches: Iterator[Batch]) -> tuple[list[Batch], float, int, int]:
    """This process's micro-batches of a step, and how long it waited for them (seconds); the tokens, and the targets
    that count, of the whole step. Raises on all alike if this or another process gets none: Starved if an error keeps
    one from its rows, else NoRows."""
    group, fault, started = learner.machine.group, None, time.perf_counter()
    share, found = sum(group.turns(learner.config.train.accumulation)), []
    try:
        found = list(islice(batches, share))
    except (UserError, OSError) as error:  # whatever it is, the run saves what it has
        fault = error if isinstance(error, Starved) else Starved(str(error), getattr(error, "exit_code", 2))
    waited, lacks = time.perf_counter() - started, len(found) < share
    if lacks:
        group.call_off()
    sizes = (sum(getattr(batch, kind) for batch in found) for kind in ("tokens", "counted"))
    lacking, tokens, counted = (int(sum(numbers)) for numbers in zip(*group.exchange(lacks, *sizes), strict=True))
    if lacking:
        told = group.heard([str(fault), fault.exit_code] if fault else None)
        raise next((Starved(*said) for said in told if said), NoRows)
    return found, waited, tokens, counted


@contextmanager
def _all_or_none(learner: Learner) -> Iterator[None]:
    """Around what each process computes by itself: if memory ran out on one, or torch.compile failed, that is raised
    on all, so that all take the same step again."""
    fault, machine, owners = None, learner.machine, learner.owners
    try:
        yield
    except RuntimeError as error:
        if end := owners.final(error, learner.config.train):
            raise end from None
        fault = error
    full = isinstance(fault, RuntimeError) and out_of_memory(fault)
    faults = machine.group.exchange(full, fault is not None)
    if fault:
        raise fault
    if any(full for full, _ in faults):
        raise torch.OutOfMemoryError("memory ran out on another process")
    if any(failed for _, failed in faults):
        if machine.compile:
            raise torch._dynamo.exc.TorchDynamoException("it fails on another process")
        raise Lost("another process has failed; --resume goes on from the last checkpoint")


def _progress(config: Config, state: State, counted: int) -> dict[str, Any]:
    """How far the run has come with the step that led to `state`."""
    tokens = state.cursor * config.model.context
    return {"step": state.step, "tokens": tokens, "counted": counted, "rejected": state.guard.rejected}


def _speed(learner: Learner, took: float, waited: float) -> dict[str, Any]:
    """took, waited: seconds."""
    rate, peak = learner.config.tokens_per_step / took, learner.machine.peak_flops
    mfu = rate * learner.flops_per_token / (peak * learner.machine.group.size) if peak else None
    return {"tokens_per_s": rate, "mfu": mfu, "waiting": waited / took}


def _routed(routing_L: Routing, tokens: int) -> dict[str, Any]:
    """What a step's routing of so many tokens was like; nothing for a dense model."""
    share_LE = _shares(routing_L.load_E)
    if not share_LE.numel():
        return {}
    balance_L = losses.load_balance(routing_L.load_E, routing_L.prob_E)
    return {
        "balance": balance_L.mean(),
        "router_z": routing_L.z.mean() / tokens,
        "max_violation": share_LE.max() * share_LE.shape[1] - 1,
        "least_share": share_LE.min(),
        "balance_per_layer": balance_L,
        "load_per_layer": share_LE,
    }


def _shares(load_LE: Tensor) -> Tensor:
    """(L, E): each expert's share of its layer's load."""
    return load_LE / load_LE.sum(-1, keepdim=True)


def rate_factor(state: State, config: Config) -> float:
    """Share of the peak learning rate for the step that follows."""
    if state.share is None:
        return schedule.factor(state.step, config.train.steps, config.schedule)
    return schedule.factor_at(state.share, state.step, config.schedule)


def _tied(state: State, config: Config) -> bool:
    """Whether the experts still learn together in the step that follows."""
    progress = state.step / config.train.steps if state.share is None else state.share
    return state.tied and progress < config.schedule.tied_experts


def load_for_balance(learner: Learner, state: State, micro_batches: list[Batch]) -> Tensor:
    """(L, E): each expert's share of the load, over a whole step: the previous one, or this one counted beforehand."""
    if learner.config.loss.load == "previous" or not state.load_LE.numel():
        return state.load_LE
    total_LE = torch.zeros_like(state.load_LE)
    with _all_or_none(learner), torch.no_grad(), learner.machine.autocast():
        for batch in micro_batches:
            _, routings = learner.model.trunk(batch.inputs_BT, place_BT=batch.place_BT, padding_BT=batch.padding_BT)
            total_LE += stack(routings, like=total_LE).load_E
    return _shares(*learner.machine.group.sum(total_LE))
