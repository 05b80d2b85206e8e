"""One optimizer step, and what it works on.

get micro-batches -> forward, loss + balance, backward (x accumulation) -> clip -> believe it? -> update
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from khanhllm import optim
from khanhllm.data.batches import Batch
from khanhllm.machine.devices import Machine
from khanhllm.machine.fit import fit
from khanhllm.machine.precision import keep_in_bf16
from khanhllm.model import Transformer, objectives
from khanhllm.model.counts import flops_per_token
from khanhllm.model.router import Routing, move_biases, stack
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

    @classmethod
    def new(cls, config: Config, machine: Machine) -> "Learner":
        model = Transformer(config.model, config.loss.chunk)
        model.initialise(torch.Generator().manual_seed(config.train.seed))
        if config.machine.weights == "bf16":
            keep_in_bf16(model, config.machine.gradients)
        model = fit(model.to(machine.device), machine, config.machine.checkpointing)
        optimizer = optim.build(model, config.optim, config.train.seed)
        return cls(config, machine, model, optimizer, flops_per_token(model))

    def start(self) -> "State":
        shape = self.config.model
        load_LE = objectives.even_load(len(shape.moe_layers), shape.experts).to(self.machine.device)
        return State(0, 0, load_LE, share=0.0 if self.config.train.seconds else None)


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


class NoRows(Exception):
    """A signal asked to stop while the step was waiting for its rows."""


def train_step(learner: Learner, state: State, rows: Iterator[Batch]) -> tuple[State, dict[str, Any]]:
    """One optimizer step: its micro-batches forward and backward, one update. Returns the next state and what to log.

    A step that the guard rejects leaves weights and moments as they are, and its row says why under "fault".
    """
    config, optimizer = learner.config, learner.optimizer
    start = time.perf_counter()
    micro_batches = list(islice(rows, config.train.accumulation))
    if len(micro_batches) < config.train.accumulation:
        raise NoRows
    waited = time.perf_counter() - start
    nll, routing_L = accumulate(learner, micro_batches, load_for_balance(learner, state, micro_batches))
    grad_norm = torch.nn.utils.clip_grad_norm_(learner.model.parameters(), config.optim.clip or torch.inf)
    # the only place in a step that waits for the device
    loss, norm = torch.stack([nll.float() / config.tokens_per_step, grad_norm.float()]).tolist()
    fault = state.guard.fault(loss, norm, config.guard)
    height = _height(state, config)
    if not fault:
        for group in optimizer.param_groups:
            group |= {"lr": group["peak_lr"] * height, "step": state.step}
        optimizer.step()
        if config.model.router_bias:
            move_biases(learner.model, routing_L.load_E, config.loss.bias_rate)
    optimizer.zero_grad(set_to_none=True)

    share_LE = routing_L.load_E / routing_L.load_E.sum(-1, keepdim=True)
    following = State(
        step=state.step + 1,
        cursor=micro_batches[-1].cursor,
        load_LE=state.load_LE if fault else share_LE,
        guard=state.guard.reject() if fault else state.guard.accept(loss),
        share=state.share,
    )
    row = {
        "step": following.step,
        "tokens": following.cursor * config.model.context,
        "loss": loss,
        "lr": config.optim.lr * height,
        "grad_norm": norm,
        "rejected": following.guard.rejected,
        "fault": fault,
    }
    if share_LE.numel():
        balance_L = objectives.load_balance(routing_L.load_E, routing_L.prob_E)
        row |= {
            "balance": balance_L.mean(),
            "router_z": routing_L.z.mean() / config.tokens_per_step,
            "max_violation": share_LE.max() * share_LE.shape[1] - 1,
            "least_share": share_LE.min(),
            "balance_per_layer": balance_L,
            "load_per_layer": share_LE,
        }
    took = time.perf_counter() - start
    rate = config.tokens_per_step / took
    peak = learner.machine.peak_flops
    mfu = rate * learner.flops_per_token / peak if peak else None
    return following, row | {"tokens_per_s": rate, "mfu": mfu, "waiting": waited / took}


def _height(state: State, config: Config) -> float:
    """Share of the peak learning rate for the step that follows."""
    if state.share is None:
        return schedule.factor(state.step, config.train.steps, config.schedule)
    return schedule.factor_at(state.share, state.step, config.schedule)


def accumulate(learner: Learner, micro_batches: list[Batch], load_LE: Tensor) -> tuple[Tensor, Routing]:
    """Add the gradient of the step's loss to `.grad`, one micro-batch at a time (gradient accumulation).

    Returns the sum of token losses (nats) and the summed routing of all mixture layers, both without gradient.
    """
    config, weights = learner.config, learner.config.loss
    sums: list[Tensor] = []
    for batch in micro_batches:
        with learner.machine.autocast():
            nll_BT, routings = learner.model(batch.inputs_BT, batch.targets_BT)
        routing_L = stack(routings, like=load_LE)
        loss = objectives.share_of_step(
            nll_BT, routing_L.prob_E, routing_L.z, load_LE, config.tokens_per_step, weights.balance, weights.router_z
        )
        loss.backward()
        seen = [tensor.detach() for tensor in (nll_BT.sum(), *routing_L)]
        sums = [old + new for old, new in zip(sums, seen, strict=True)] if sums else seen
    return sums[0], Routing(*sums[1:])


def load_for_balance(learner: Learner, state: State, micro_batches: list[Batch]) -> Tensor:
    """(L, E): each expert's share of the load, over a whole step: the previous one, or this one counted beforehand."""
    if learner.config.loss.load == "previous" or not state.load_LE.numel():
        return state.load_LE
    counted = torch.zeros_like(state.load_LE)
    with torch.no_grad(), learner.machine.autocast():
        for batch in micro_batches:
            counted += stack(learner.model.trunk(batch.inputs_BT)[1], like=counted).load_E
    return counted / counted.sum(-1, keepdim=True)
