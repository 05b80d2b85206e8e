"""Experts that learn together at first answer and learn as one dense layer does."""

import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from conftest import plain_machine, tiny
from khanhllm.data.batches import random_batches
from khanhllm.errors import UserError
from khanhllm.machine.owners import Owners
from khanhllm.model.moe import MoE
from khanhllm.model.tied import tie, tie_gradients
from khanhllm.runs.run import open_run
from khanhllm.settings import resolve
from khanhllm.training import run as training_run
from khanhllm.training.guard import Guard
from khanhllm.training.step import Learner, initial_model, train_step


def config(tied=0.5, steps=6, **settings):
    model = {"feedforward": "relu2", "experts": 6}
    train = {"steps": steps, "eval_tokens": 200, "sample_tokens": 0}
    optim = {"name": "muon", "lr": 0.01, "muon_lr": 0.02}
    own = {"model": model, "optim": optim, "train": train, "schedule": {"tied_experts": tied, "warmup": 1}}
    return resolve(tiny().model_dump(), own, settings)


def mixture(model):
    (layer,) = (module for module in model.modules() if isinstance(module, MoE))
    return layer


def copies(model):
    """Whether the experts are copies of two, and the router's rows of each copy are equal."""
    layer = mixture(model)
    stacks = [parameter.unflatten(0, (3, 2)) for parameter in layer.experts.parameters()]
    rows = layer.router.weight.unflatten(0, (3, 2))
    return [torch.equal(stack, stack[:1].expand_as(stack)) for stack in stacks] + [torch.equal(rows[:, 0], rows[:, 1])]


def test_tied_experts_answer_and_learn_as_one_dense_layer():
    """The dense layer, written out: half of what each of the first two experts says. The mean gradient over the three
    copies is a third of its gradient."""
    layer = mixture(initial_model(config())).double()
    up, down = (stack.detach()[:2].clone().requires_grad_() for stack in (layer.experts.up, layer.experts.down))
    x_BTD = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    dense_BTD = sum(F.relu(x_BTD @ up[k]) ** 2 @ down[k] for k in range(2)) / 2
    mixed_BTD, (routing,) = layer(x_BTD)
    assert torch.allclose(mixed_BTD, dense_BTD, rtol=1e-9)
    assert (routing.load_E > 0).sum() > 2  # more than one copy works
    for answer_BTD in (mixed_BTD, dense_BTD):
        answer_BTD.square().sum().backward()
    rows = layer.router.weight.grad.unflatten(0, (3, 2)) + torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).view(
        3, 1, 1
    )
    layer.router.weight.grad = rows.flatten(0, 1).clone()
    tie_gradients(layer)
    assert torch.allclose(layer.router.weight.grad.unflatten(0, (3, 2)), rows.mean(1, keepdim=True).expand_as(rows))
    for stack, reference in ((layer.experts.up, up), (layer.experts.down, down)):
        assert torch.allclose(stack.grad, reference.grad.repeat(3, 1, 1) / 3, rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"optim": {"name": "adamw"}}, {"machine": {"weights": "bf16"}}])
def test_copies_stay_equal_whatever_moves_them(settings):
    precision = "bf16" if "machine" in settings else "fp32"
    learner = Learner.new(config(**settings), replace(plain_machine(), precision=precision))
    state, batches = learner.start(), random_batches(learner.config, learner.machine.device)
    before = mixture(learner.model).experts.up.detach().clone()
    for _ in range(3):
        state, _ = train_step(learner, state, batches)
        assert all(copies(learner.model))
    assert not torch.equal(mixture(learner.model).experts.up, before)


def test_every_expert_of_the_first_copy_is_kept():
    model = initial_model(config(tied=0))
    before = [parameter.detach().clone() for parameter in mixture(model).parameters()]
    tie(model)
    router, *stacks = mixture(model).parameters()
    assert torch.equal(router[::2], before[0][::2])
    assert all(torch.equal(stack[:2], old[:2]) for stack, old in zip(stacks, before[1:], strict=True))


def test_the_biases_of_a_copy_become_equal_in_a_step_that_moves_them_apart():
    learner = Learner.new(config(model={"router_bias": True}), plain_machine())
    bias_E = mixture(learner.model).router.bias_E
    bias_E.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 2.0]))  # tokens go to the third and the sixth
    train_step(learner, learner.start(), random_batches(learner.config, learner.machine.device))
    assert torch.equal(bias_E[::2], bias_E[1::2]) and bias_E[0] > 0 > bias_E[2] - 1


@pytest.mark.parametrize(("tied", "together"), [(0.5, 3), (1.0, 6), (0.01, 1), (0.0, 0)])
def test_experts_stay_copies_for_a_share_of_the_run_and_then_part(tied, together):
    learner = Learner.new(config(tied), plain_machine())
    state, batches = learner.start(), random_batches(learner.config, learner.machine.device)
    for step in range(6):
        assert all(copies(learner.model)) is (step <= together and tied > 0)
        state, _ = train_step(learner, state, batches)
    assert any(copies(learner.model)) is (tied == 1)


@pytest.mark.parametrize(("share", "tied"), [(0.0, True), (0.49, True), (0.5, False)])
def test_a_run_that_is_given_its_time_counts_its_time(share, tied):
    learner = Learner.new(config(train={"seconds": 60, "steps": 10**6}), plain_machine())
    state = replace(learner.start(), share=share)
    state, _ = train_step(learner, state, random_batches(learner.config, learner.machine.device))
    assert state.tied is tied
    assert all(copies(learner.model)) is tied


def test_a_restart_begins_with_copies():
    learner = Learner.new(config(), plain_machine())
    apart = replace(learner.start(), tied=False)
    train_step(learner, apart, random_batches(learner.config, learner.machine.device))
    assert learner.restart().tied
    assert all(copies(learner.model))


def in_pieces(corpus, tmp_path, **train):
    data = {"source": str(corpus), "cache": str(tmp_path / "cache"), "validation": 0.2, "workers": 1}
    return config(data=data, train={"save_every": 2, "keep": 9, **train}, optim={"expert_every": 2})


def test_a_resumed_run_goes_on_with_tied_experts(corpus, tmp_path):
    training_run.train(in_pieces(corpus, tmp_path), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "pieces")
    for late in ("step-0000004", "step-0000006"):
        shutil.rmtree(tmp_path / "pieces" / "checkpoints" / late)
    training_run.train(in_pieces(corpus, tmp_path), tmp_path / "pieces", resume=True)
    one, other = (open_run(tmp_path / name).model.state_dict() for name in ("whole", "pieces"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_experts_that_parted_stay_apart_in_a_longer_run(corpus, tmp_path, monkeypatch):
    """Of 16 steps they would learn together for 8."""
    training_run.train(in_pieces(corpus, tmp_path), tmp_path / "run")
    seen = []

    def watched(learner, state, rows):
        seen.append(state.tied)
        return train_step(learner, state, rows)

    monkeypatch.setattr(training_run, "train_step", watched)
    training_run.train(in_pieces(corpus, tmp_path, steps=16), tmp_path / "run", resume=True)
    assert seen == [False] * 10
    learner = Learner.new(config(), plain_machine())
    apart = replace(learner.start(), tied=False)
    train_step(learner, apart, random_batches(learner.config, learner.machine.device))
    assert not any(copies(learner.model))


def test_a_run_says_if_it_is_to_tie_experts_that_have_parted(corpus, tmp_path, capsys):
    def said(**schedule):
        longer = resolve(in_pieces(corpus, tmp_path, steps=next(lengths)).model_dump(), {"schedule": schedule})
        training_run.train(longer, tmp_path / "run", resume=True)
        return "changes nothing: experts that have learned apart" in capsys.readouterr().out

    lengths = iter((2, 4, 6, 8, 10))
    assert not said(tied_experts=1) and not said(tied_experts=0.9)  # still tied
    assert not said(tied_experts=0)
    assert said(tied_experts=0.9) and not said(tied_experts=0.9)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": {"experts": 5}}, "tied experts need experts_per_token to divide experts"),
        ({"machine": {"split": "all"}}, "no tied experts with split = all"),
        ({"machine": {"expert_processes": 2}}, "no tied experts with .*expert_processes"),
    ],
)
def test_what_cannot_be_tied_is_refused(settings, says):
    with pytest.raises(UserError, match=f"{says}.* set schedule.tied_experts to 0$"):
        config(**settings)
    config(tied=0, **settings)


def test_a_dense_model_has_nothing_to_tie():
    config(model={"pattern": "DD", "experts": 5}, machine={"split": "all"})


def test_a_rejected_step_leaves_experts_tied(monkeypatch):
    learner = Learner.new(config(), plain_machine())
    monkeypatch.setattr(Guard, "fault", lambda *_: "far above")
    state, row = train_step(learner, learner.start(), random_batches(learner.config, learner.machine.device))
    assert row["fault"] and state.tied


def test_gradients_are_tied_before_their_norm_is_taken(monkeypatch):
    learner, clip = Learner.new(config(), plain_machine()), Owners.clip

    def checked(owners, longest):
        stack = mixture(learner.model).experts.up.grad.unflatten(0, (3, 2))
        assert torch.equal(stack, stack[:1].expand_as(stack))
        return clip(owners, longest)

    monkeypatch.setattr(Owners, "clip", checked)
    train_step(learner, learner.start(), random_batches(learner.config, learner.machine.device))
