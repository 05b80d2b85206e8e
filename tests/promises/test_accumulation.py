"""One step is one step, however it is cut: 1x8, 2x4 and 8x1 micro-batches give the same gradient, balance included."""

from math import log
from types import SimpleNamespace

import pytest
import torch

from conftest import build, plain_machine, tiny
from khanhllm.data.batches import Batch, random_batches
from khanhllm.machine.group import ALONE
from khanhllm.machine.owners import Owners
from khanhllm.model import losses
from khanhllm.settings import resolve
from khanhllm.training import step
from khanhllm.training.step import Learner

ROWS, CONTEXT = 8, 32
GENERATOR = torch.Generator().manual_seed(3)
IDS = torch.randint(300, (ROWS, CONTEXT + 1), generator=GENERATOR)
LAST_LOAD = torch.tensor([[0.4, 0.3, 0.2, 0.1]])


def gradient(
    micro_batch: int, load: str, balance: float = 0.3, style: str = "modern", pattern: str = "DM"
) -> list[torch.Tensor]:
    settings = {
        "train": {"micro_batch": micro_batch, "accumulation": ROWS // micro_batch},
        "loss": {"load": load, "balance": balance, "router_z": 0.1, "chunk": 40},
        "optim": {"clip": 0},
    }
    config = resolve(tiny(style, pattern=pattern).model_dump(), settings)
    model = build(config).double()
    found: list[torch.Tensor] = []
    optimizer = SimpleNamespace(
        param_groups=[],
        step=lambda: found.extend(parameter.grad for parameter in model.parameters()),
        zero_grad=lambda set_to_none: None,
    )
    owners = Owners(model.parameters(), ALONE)
    parts = SimpleNamespace(
        config=config, model=model, machine=plain_machine(), optimizer=optimizer, flops_per_token=1, owners=owners
    )
    batches = [Batch(rows[:, :-1], rows[:, 1:], 0) for rows in IDS.split(micro_batch)]
    step.train_step(parts, step.State(0, 0, LAST_LOAD.expand(pattern.count("M"), 4)), iter(batches))
    return found


def farthest(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    scale = max(tensor.abs().max().item() for tensor in theirs)
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)) / scale


@pytest.mark.parametrize("style", ["classic", "modern"])
@pytest.mark.parametrize("load", ["previous", "current"])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_accumulated_equals_whole(micro_batch, load, style):
    # The router computes in fp32 whatever the rest does, hence not 1e-15.
    assert farthest(gradient(micro_batch, load, style=style), gradient(ROWS, load, style=style)) < 1e-6


@pytest.mark.parametrize("pattern", ["DM", "DMM", "MMM"])
def test_the_gradient_is_that_of_the_formula_of_one_batch(pattern):
    """load = "current" is Switch's formula over all tokens of the step, summed over layers, differentiated by
    autograd."""
    model = build(tiny(pattern=pattern)).double()
    nll, routings = model(IDS[:, :-1], IDS[:, 1:])
    loss = nll.mean()
    for routing in routings:
        loss = loss + 0.3 * losses.load_balance(routing.load_E, routing.prob_E) + 0.1 * routing.z / nll.numel()
    loss.backward()
    assert (
        farthest(gradient(2, "current", pattern=pattern), [parameter.grad for parameter in model.parameters()]) < 1e-6
    )


def test_balance_reaches_the_router_and_the_load_matters():
    router = [name for name, _ in build(tiny()).named_parameters()].index("blocks.1.feedforward.router.weight")
    without, previous, current = (
        gradient(2, load, balance)[router] for load, balance in (("previous", 0), ("previous", 1), ("current", 1))
    )
    assert (without - previous).abs().max() > 1e-4
    assert (previous - current).abs().max() > 1e-4


def test_a_step_moves_the_router_s_biases_against_its_load():
    learner = Learner.new(tiny(router_bias=True, pattern="DMM"), plain_machine())
    _, row = step.train_step(learner, learner.start(), random_batches(learner.config, learner.machine.device))
    for block, load_E in zip(learner.model.blocks[1:], row["load_per_layer"], strict=True):
        expected = learner.config.loss.bias_rate * (0.25 - load_E).sign()
        assert torch.allclose(block.feedforward.router.bias_E, expected)
        assert block.feedforward.router.bias_E.any()


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_the_log_knows_the_uneven_load_of_the_whole_step(micro_batch):
    """All tokens sent to the same 2 of 4 experts: they work twice as much as at an even load, the others not at all."""
    settings = {"model": {"router_bias": True}, "train": {"micro_batch": micro_batch, "accumulation": 4 // micro_batch}}
    learner = Learner.new(resolve(tiny().model_dump(), settings), plain_machine())
    for name, buffer in learner.model.named_buffers():
        if name.endswith("bias_E"):
            buffer[:2] = 10.0
    _, row = step.train_step(learner, learner.start(), random_batches(learner.config, learner.machine.device))
    assert (row["max_violation"].item(), row["least_share"].item()) == (1.0, 0.0)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_the_log_has_router_z_per_token(micro_batch):
    """A router whose scores are all zero has a z of ln(experts) squared at every token."""
    settings = {"train": {"micro_batch": micro_batch, "accumulation": 4 // micro_batch}}
    learner = Learner.new(resolve(tiny().model_dump(), settings), plain_machine())
    learner.model.blocks[1].feedforward.router.weight.data.zero_()
    _, row = step.train_step(learner, learner.start(), random_batches(learner.config, learner.machine.device))
    assert row["router_z"].item() == pytest.approx(log(4) ** 2, rel=1e-5)
