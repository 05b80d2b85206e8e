"""Faults of the arithmetic: a number that is not finite, somewhere in the gradient of one micro-batch."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf, nan

import torch
from torch import Tensor

from khanhllm.chaos.arena import Arena
from khanhllm.data.batches import random_batches
from khanhllm.machine.devices import open_machine
from khanhllm.training.step import Learner, State, train_step

OPTIMIZERS = ("adamw", "adamw8bit", "muon", "muon8bit")


def not_finite(arena: Arena, chance: random.Random) -> Iterator[str]:
    """Put NaN or infinity into one element of one gradient: no bit of weights and moments may change."""
    learners = [_learner(arena, name) for name in OPTIMIZERS]
    while True:
        learner, state = chance.choice(learners)
        parameter = chance.choice(list(learner.model.parameters()))
        place, bad = chance.randrange(parameter.numel()), chance.choice([nan, inf, -inf])
        micro_batch = chance.randrange(learner.config.train.accumulation)
        before = everything(learner)
        with spoiled(parameter, place, bad, micro_batch):
            _, row = train_step(learner, state, random_batches(learner.config, learner.machine.device))
        same = all(torch.equal(old, new) for old, new in zip(before, everything(learner), strict=True))
        yield "" if row["fault"] and same else f"{bad} reached the state of {type(learner.optimizer).__name__}"


def _learner(arena: Arena, optimizer: str) -> tuple[Learner, State]:
    config = arena.config(optim={"name": optimizer}, model={"dim": 64})  # 8 bits begin at 4,096 weights
    learner = Learner.new(config, open_machine(config.machine))
    state, _ = train_step(learner, learner.start(), random_batches(config, learner.machine.device))
    return learner, state


@contextmanager
def spoiled(parameter: Tensor, place: int, bad: float, micro_batch: int) -> Iterator[None]:
    """Within this context, set element `place` of the parameter's gradient to `bad` in micro-batch `micro_batch`."""
    seen = 0

    def spoil(grad: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        if seen == micro_batch + 1:
            grad = grad.clone()
            grad.view(-1)[place] = bad
        return grad

    hook = parameter.register_hook(spoil)
    try:
        yield
    finally:
        hook.remove()


def everything(learner: Learner) -> list[Tensor]:
    """Copies of all weights and moments."""
    moments = [value for state in learner.optimizer.state.values() for value in state.values()]
    return [t.clone() for t in (*learner.model.state_dict().values(), *moments) if isinstance(t, Tensor)]
