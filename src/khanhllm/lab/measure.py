"""Measure three real steps on random tokens in a fresh process, to compare a plan with them. A small model then takes
three more steps, in which the process keeps freed memory, for its speed.

python -m khanhllm.lab.measure < config.json > measurement.json
"""

import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, TypedDict

import psutil
import torch

from khanhllm import optim
from khanhllm.data.batches import random_batches
from khanhllm.errors import UserError
from khanhllm.machine.adapt import is_small
from khanhllm.machine.devices import Machine, keep_freed_memory, open_machine
from khanhllm.schema import Config
from khanhllm.settings import resolve
from khanhllm.training.step import Learner, train_step

STEPS = 3


class Measurement(TypedDict):
    """What real steps took: all in bytes, except the rate."""

    weights: int
    gradients: int
    optimizer: int
    peak: int
    """most at one time, above what the process held before the model was made; on CUDA, most allocated"""
    process: int
    """held before the model was made"""
    tokens_per_s: float
    """of the later steps; the first one warms up"""


def measure(config: Config) -> Measurement:
    """Run the steps in a process of their own. Raises UserError, with the reason, if they do not finish."""
    command = [sys.executable, "-m", "khanhllm.lab.measure"]
    result = subprocess.run(command, input=json.dumps(config.model_dump()).encode(), capture_output=True, check=False)
    if result.returncode:
        last = (result.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise UserError(f"the three steps did not finish: {last}")
    measured: Measurement = json.loads(result.stdout)
    return measured


def three_steps(config: Config) -> Measurement:
    """Run the steps in this process and measure them."""
    machine = open_machine(config.machine)
    machine.take_process()
    cuda = machine.device.type == "cuda"
    _warm_up(config, machine)
    gc.collect()
    process = psutil.Process().memory_info().rss
    learner = Learner.new(config, machine)
    keep_freed_memory(False)  # measure what a step needs, not what the process of a small model keeps to be faster
    model, optimizer = learner.model, learner.optimizer
    gradients: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: gradients.append(_gradient_bytes(model)))
    rates = [row["tokens_per_s"] for row in _steps(learner, STEPS)]
    peak = round(machine.peak_memory() * 1e6)
    if is_small(model):
        keep_freed_memory(True)  # as a training does
        rates = [row["tokens_per_s"] for row in _steps(learner, STEPS)]
    return Measurement(
        weights=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        gradients=gradients[-1],
        optimizer=optim.state_bytes(optimizer),
        peak=peak - (0 if cuda else process),
        process=process,
        tokens_per_s=statistics.median(rates[1:]),
    )


def _gradient_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)


def _warm_up(config: Config, machine: Machine) -> None:
    """Take one step of a tiny model of the same kind: the libraries that it loads count to the process."""
    small = {"pattern": "DM", "dim": 64, "heads": 2, "kv_heads": 0, "hidden": 64, "expert_hidden": 64, "context": 64}
    shape = {**small, "vocab_size": 512, "experts": 2, "experts_per_token": 1}
    whole = {"train": {"micro_batch": 1, "accumulation": 1}, "machine": {"expert_processes": 1}}
    tiny = resolve(config.model_dump(), {"model": shape}, whole)
    list(_steps(Learner.new(tiny, machine), 1))


def _steps(learner: Learner, steps: int) -> Iterator[dict[str, Any]]:
    state = learner.start()
    rows = random_batches(learner.config, learner.machine.device)
    for _ in range(steps):
        state, row = train_step(learner, state, rows)
        yield row


if __name__ == "__main__":
    print(json.dumps(three_steps(resolve(json.load(sys.stdin)))))
