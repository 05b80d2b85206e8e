"""The candidates of a benchmark: our trainer, our dense twin, and Hugging Face's Qwen3-MoE of the same shape.

Each trains in a process of its own, with its own allocator, peak memory and failures, and takes a step on request. So
candidates can take turns, and whatever else the machine does affects all of them.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, Self

import torch

from khanhllm.data.batches import random_batches
from khanhllm.errors import UserError
from khanhllm.export.shape import check_stock, qwen3
from khanhllm.machine.devices import Machine, open_machine
from khanhllm.model.counts import flops_per_token, on_paper, total_parameters
from khanhllm.model.twin import dense_twin
from khanhllm.schema import Config, ModelConfig
from khanhllm.training.step import Learner, train_step

OURS, TWIN = ["ours", "ours compiled"], "dense twin"
HUGGING_FACE = [f"hf {experts}{compiled}" for compiled in ("", " compiled") for experts in ("eager", "grouped_mm")]
ENDED = "the system ended its process (too little memory?)"
Step = Callable[[], object]


@dataclass
class Candidate:
    """A process that trains one model. `flops` are for one token; `first_step` (seconds) includes compiling."""

    name: str
    connection: Connection
    process: Any
    parameters: int = 0
    flops: int = 0
    first_step: float = 0.0
    fault: str = ""
    """why it cannot take part, in a line"""

    @classmethod
    def enter(cls, name: str, config: Config) -> Self:
        """Start the process and wait for its first step."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, name, config), daemon=True)
        process.start()
        theirs.close()
        candidate = cls(name, ours, process)
        try:
            candidate.parameters, candidate.flops, candidate.first_step, candidate.fault = ours.recv()
        except EOFError:
            candidate.fault = ENDED
        return candidate

    def step(self) -> float:
        """Take one optimizer step. Returns its seconds. Raises UserError if the process is gone, as `leave` does."""
        return self._asked(True)

    def leave(self) -> float:
        """End the process. Returns its peak memory (MB)."""
        peak = self._asked(False)
        self.process.join()
        return peak

    def _asked(self, further: bool) -> float:
        try:
            self.connection.send(further)
            answer: float = self.connection.recv()
        except (EOFError, OSError):
            raise UserError(f"bench: {self.name}: {ENDED}") from None
        return answer


def _work(connection: Connection, name: str, config: Config) -> None:
    machine = open_machine(config.machine)
    machine.take_process()
    torch.manual_seed(0)
    if name.startswith("hf"):
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    try:
        step, parameters, flops = (_hugging_face if name.startswith("hf") else _ours)(name, config, machine)
        first = _timed(step, machine)
    except Exception as error:
        connection.send((0, 0, 0.0, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"))
        return
    connection.send((parameters, flops, first, ""))
    while connection.recv():
        connection.send(_timed(step, machine))
    connection.send(machine.peak_memory())


def _timed(step: Step, machine: Machine) -> float:
    started = time.perf_counter()
    step()
    machine.wait()
    return time.perf_counter() - started


def _ours(name: str, config: Config, machine: Machine) -> tuple[Step, int, int]:
    """The step that `khanhllm train` takes."""
    if name.startswith(TWIN):
        config = config.model_copy(update={"model": dense_twin(config.model)})
    machine = replace(machine, compile=name.endswith("compiled"))
    learner = Learner.new(config, machine)
    rows = random_batches(config, machine.device)
    state = learner.start()
    return lambda: train_step(learner, state, rows), total_parameters(learner.model), learner.flops_per_token


def _hugging_face(name: str, config: Config, machine: Machine) -> tuple[Step, int, int]:
    """transformers' Qwen3-MoE with its own balancing loss and fused AdamW."""
    from transformers import Qwen3MoeForCausalLM  # type: ignore[attr-defined]

    _, experts, *compiled = name.split()
    with torch.device(machine.device):
        model: Any = Qwen3MoeForCausalLM(as_qwen3_moe(config.model, experts))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rows = random_batches(config, machine.device)
    if compiled:
        model.compile(dynamic=False)

    def step() -> None:
        for _ in range(config.train.accumulation):
            inputs_BT, targets_BT = next(rows)[:2]
            with machine.autocast():
                out = model(input_ids=inputs_BT, labels=targets_BT, shift_labels=targets_BT)
            (out.loss / config.train.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, total_parameters(model), flops_per_token(on_paper(config.model))


def as_qwen3_moe(model: ModelConfig, experts: str) -> Any:
    """Our shape as a config of transformers, with its balancing loss. experts: their implementation of experts.

    Raises UserError for what Qwen3-MoE does not have.
    """
    from transformers import Qwen3MoeConfig  # type: ignore[attr-defined]

    without = "so the model of transformers cannot be measured beside it"
    check_stock(model, "Qwen3-MoE", without, router_bias=False)
    for key in ("feedforward", "value_embedding", "token_norm", "token_shift", "stream_scale"):
        if (value := getattr(model, key)) != ModelConfig.model_fields[key].default:
            raise UserError(f"model.{key} is {str(value).lower()}, which Qwen3-MoE cannot express, {without}")
    more: dict[str, Any] = {"output_router_logits": True, "router_aux_loss_coef": 0.01}
    more |= {"experts_implementation": experts, "attn_implementation": "sdpa"}
    return Qwen3MoeConfig(**qwen3(model), **more)
