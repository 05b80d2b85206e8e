"""The step on paper against the step itself: what must be exact is exact, and the trace reads what really lived."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses import FakeTensorMode

from conftest import build, plain_machine, tiny
from khanhllm import optim
from khanhllm.data.batches import random_batches
from khanhllm.lab import measure
from khanhllm.model.counts import flops_per_token
from khanhllm.model.losses import micro_batch_loss, token_nll
from khanhllm.planning.simulation import MemoryTrace, simulate_step
from khanhllm.schema import LossConfig
from khanhllm.settings import resolve
from khanhllm.training.step import Learner

KINDS = [
    {"optim": {"name": "adamw"}},
    {"optim": {"name": "adamw8bit"}, "model": {"dim": 64, "hidden": 128}},
    {"optim": {"name": "muon"}},
    {"optim": {"name": "muon8bit"}, "model": {"dim": 64, "hidden": 128}},
    {"optim": {"name": "adamw8bit"}, "machine": {"weights": "bf16", "gradients": "bf16"}},
    {"machine": {"weights": "bf16"}, "train": {"accumulation": 2}},
]


IDS = ["adamw", "adamw8bit", "muon", "muon8bit", "bf16", "bf16-fp32-gradients"]


@pytest.mark.parametrize("settings", KINDS, ids=IDS)
def test_weights_gradients_and_state_are_exact(settings):
    config = resolve(tiny().model_dump(), settings)
    precision = "bf16" if config.machine.weights == "bf16" else "fp32"
    foreseen = simulate_step(config, precision, "cpu")
    machine = dataclasses.replace(plain_machine(), precision=precision)
    learner = Learner.new(config, machine)
    seen = []
    learner.optimizer.register_step_pre_hook(lambda *_: seen.append(measure._gradient_bytes(learner.model)))
    list(measure._steps(learner, 1))
    real = [*learner.model.parameters(), *learner.model.buffers()]
    assert foreseen.weights == sum(tensor.nbytes for tensor in real)
    assert foreseen.gradients == seen[0]
    assert foreseen.optimizer == optim.state_bytes(learner.optimizer)


def test_a_process_with_a_part_of_the_experts_holds_less():
    config = resolve(tiny().model_dump(), {"model": {"experts": 8}, "train": {"accumulation": 2}})
    apart = resolve(config.model_dump(), {"machine": {"expert_processes": 4}})
    whole, part = (simulate_step(each, "fp32", "cpu") for each in (config, apart))
    stacks = 3 * 8 * 32 * 32 * 4
    assert whole.weights - part.weights == stacks * 3 // 4 == whole.gradients - part.gradients
    assert part.peak < whole.peak


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("style", ["classic", "modern"])
def test_the_peak_of_a_backward_pass_is_that_of_real_tensors(style, checkpointing):
    """The same trace over a real micro-batch: the code that trains, not the copy that `simulate_step` has."""
    config = resolve(tiny(style).model_dump(), {"machine": {"checkpointing": checkpointing}})
    foreseen = simulate_step(config, "fp32", "cpu", update=False)
    learner = Learner.new(config, plain_machine())
    batch = next(random_batches(config, learner.machine.device))
    trace = MemoryTrace(config.model.vocab_size, cpu=True)
    with trace:
        trace.name("weights", [*learner.model.parameters(), *learner.model.buffers()])
        start = len(trace.events)
        load_LE, tokens = learner.start().load_LE, config.tokens_per_step
        micro_batch_loss(learner.model, *batch[:2], load_LE, tokens, config.loss, nullcontext())[0].backward()
    real = sum(trace.fullest(start, len(trace.events)).values())
    assert abs((foreseen.peak - foreseen.optimizer) / real - 1) < 0.02


def test_rebuilding_saves_memory_and_costs_arithmetic():
    kinds = [resolve(tiny(context=256).model_dump(), {"machine": {"checkpointing": k}}) for k in ("none", "full")]
    none, full = (simulate_step(config, "fp32", "cpu", update=False) for config in kinds)
    assert full.peak < none.peak
    assert full.flops > none.flops


def test_the_mask_of_documents_is_counted_once():
    with_mask = resolve(tiny(context=256, pattern="DMDM").model_dump(), {"train": {"document_mask": True}})
    without = tiny(context=256, pattern="DMDM")
    peaks = [simulate_step(config, "fp32", "cpu", update=False).peak for config in (with_mask, without)]
    mask = 4 * without.train.rows * 256**2
    assert mask <= peaks[0] - peaks[1] < 2 * mask


def test_the_arithmetic_is_that_of_the_formula():
    config = tiny()
    model = build(config)
    norms = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    tokens = config.tokens_per_step
    # in the backward pass attention makes its scores again: 14 instead of 12 products
    again = 2 * len(model.blocks) * config.model.dim * config.model.context
    exact = flops_per_token(model) - 6 * norms + again
    assert simulate_step(config, "fp32", "cpu", update=False).flops / tokens == exact
    assert simulate_step(config, "fp32", "cpu").flops / tokens == exact  # an update comes once a step


def test_the_head_never_takes_as_much_as_its_logits():
    """8 rows of 2,048 tokens, a vocabulary of 50,000, width 1,024: below 0.4 GB, where all logits would be 3.3 GB."""
    fake, trace = FakeTensorMode(), MemoryTrace(50_000, cpu=True)
    with fake:
        x, weight = (torch.empty(size, 1024, requires_grad=True) for size in (16_384, 50_000))
        targets = torch.zeros(16_384, dtype=torch.int64)
    with fake, trace:
        trace.name("weights", [x, weight, targets])
        start = len(trace.events)
        token_nll(x, weight, targets, LossConfig().chunk).sum().backward()
    peak = trace.fullest(start, len(trace.events))
    assert sum(peak.values()) - peak["weights"] < 400_000_000
