"""The laws that `khanhllm doctor` checks, on both styles; and for each law a broken model that it must catch."""

import pytest
import torch

from conftest import build, tiny
from khanhllm.lab import doctor
from khanhllm.machine import adapt
from khanhllm.model import attention, moe, router
from khanhllm.model.experts import LOOP

SHAPES = {"classic": {}, "modern": {}, "grouped-query": {"kv_heads": 2}, "all-dense": {"pattern": "DD"}}


@pytest.fixture(params=SHAPES)
def model(request):
    return build(tiny("classic" if request.param == "classic" else "modern", **SHAPES[request.param]))


@pytest.mark.parametrize("law", [doctor.first_loss_is_chance, *doctor.LAWS], ids=lambda law: law.__name__)
def test_law_holds(law, model):
    finding = law(model)
    assert finding.kept, finding.measured


@pytest.mark.parametrize("style", ["classic", "modern"])
@pytest.mark.parametrize("law", doctor.MIXTURE_LAWS, ids=lambda law: law.__name__)
def test_mixture_law_holds(law, style):
    finding = law(build(tiny(style)))
    assert finding.kept, finding.measured


def test_a_missing_mask_is_caught(monkeypatch):
    monkeypatch.setattr(attention, "_causal", lambda *_: (None, False))
    assert not doctor.future_has_no_gradient(build(tiny())).kept


def test_a_top_left_mask_over_a_cache_is_caught(monkeypatch):
    monkeypatch.setattr(attention, "_causal", lambda *_: (None, True))
    assert not doctor.cache_changes_nothing(build(tiny())).kept


def test_positions_that_restart_at_the_cache_are_caught():
    model = build(tiny())
    model.blocks[0].attention.rope.forward = lambda x, start: type(model.blocks[0].attention.rope).forward(
        model.blocks[0].attention.rope, x, 0
    )
    assert not doctor.cache_changes_nothing(model).kept


def test_a_backend_that_forgets_the_order_of_experts_is_caught(monkeypatch):
    def backwards(x_NI, weight_EIO, end_E):
        return LOOP.grouped_mm(x_NI, weight_EIO.flip(0), end_E)

    monkeypatch.setattr(doctor, "GROUPED", LOOP._replace(grouped_mm=backwards))
    assert not doctor.backends_agree(build(tiny())).kept


def test_a_router_asked_twice_is_caught(monkeypatch):
    """If the whole mixture layer were rebuilt and the second routing fell otherwise, gradients would change."""
    honest = moe.MoE.answer
    calls = []

    def wobbling(self, x_TD, choice, load_E):
        calls.append(1)
        if len(calls) > 4:  # two plain passes and two of selective come first
            choice = router.Choice(choice.expert_TK.flip(-1), choice.weight_TK)
        return honest(self, x_TD, choice, load_E)

    monkeypatch.setattr(moe.MoE, "answer", wobbling)
    model = build(tiny())
    assert not doctor.rebuilt_activations_change_nothing(model).kept


def test_a_parameter_without_gradient_is_caught():
    model = build(tiny())
    model.blocks[1].feedforward.router.weight.requires_grad_(False)
    finding = doctor.learns_one_batch(model)
    assert not finding.kept
    assert "router" in finding.advice


def test_a_starving_expert_is_caught():
    model = build(tiny())
    with torch.no_grad():
        model.blocks[1].feedforward.router.weight.mul_(0)  # ties go to the first experts
    assert not doctor.experts_share_the_work(model).kept


def test_a_wild_start_is_caught():
    model = build(tiny())
    with torch.no_grad():
        model.head.weight.mul_(30)
    assert not doctor.first_loss_is_chance(model).kept


def test_rebuilding_really_happens(monkeypatch, machine):
    """Full checkpointing runs the experts a second time, in the backward pass; the router only once."""
    asked = {"answer": 0, "router": 0}
    honest_answer, honest_router = moe.MoE.answer, router.Router.forward
    monkeypatch.setattr(moe.MoE, "answer", lambda *a: asked.update(answer=asked["answer"] + 1) or honest_answer(*a))
    monkeypatch.setattr(
        router.Router, "forward", lambda *a: asked.update(router=asked["router"] + 1) or honest_router(*a)
    )
    model = adapt.adapt(build(tiny()), machine, "full")
    doctor._gradients(model)
    assert asked == {"answer": 2, "router": 1}
