"""What `fit` does to a model changes how it is computed, never what. Compiled without code generation, so that no C++
compiler is needed: what the compiler is given, whole graphs and how often, is the same."""

import dataclasses
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from conftest import build, plain_machine, tiny
from khanhllm.data.batches import batch_of
from khanhllm.data.counting import Reading
from khanhllm.machine import adapt as fit_module
from khanhllm.machine.adapt import adapt

G = torch.Generator().manual_seed(4)


def gradients(model, ids):
    nll, (first, second) = model(ids[:, :-1], ids[:, 1:])
    (nll.sum() + first.prob_E.square().sum() + second.z).backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return found, second.load_E


@pytest.fixture
def compiling(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield dataclasses.replace(plain_machine(), compile=True)
    torch._dynamo.reset()


def test_without_gradients_nothing_is_compiled(compiling):
    """Validation and generation have a new shape each time."""
    fitted = adapt(build(tiny()), compiling, "full")
    with torch.no_grad():
        fitted.logits(torch.zeros(1, 9, dtype=torch.long))
    assert not counters["stats"]["unique_graphs"]


def near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Within the rounding of fp32 sums in another order."""
    return torch.allclose(ours, theirs, atol=1e-5 * max(1.0, theirs.abs().max().item()))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("style", ["classic", "modern"])
def test_blocks_compile_whole_and_once(style, checkpointing, compiling):
    """No graph break, and another routing does not compile again."""
    fitted = adapt(build(tiny(style, pattern="DMDM")), compiling, checkpointing)
    batches = torch.randint(300, (3, 2, 33), generator=G)
    loads = []
    for number, ids in enumerate(batches):
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            ours, load = gradients(fitted, ids)
        loads.append(load)
        theirs, same = gradients(build(tiny(style, pattern="DMDM")), ids)
        assert torch.equal(load, same)
        for a, b in zip(ours, theirs, strict=True):
            assert near(a, b)
    assert not torch.equal(loads[0], loads[1])
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # of four blocks


@pytest.mark.slow
@pytest.mark.parametrize("style", ["classic", "modern"])
def test_blocks_compile_whole_and_once_with_a_document_mask(style, compiling):
    fitted, plain = (build(tiny(style, pattern="DMDM")) for _ in range(2))
    fitted = adapt(fitted, compiling)
    for number in range(3):
        ids = torch.randint(0, 20, (2, 33), generator=G).numpy()
        batch = batch_of(ids, reading=Reading(0, None, document_mask=True))
        found = []
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            for model in (fitted, plain):
                nll, routings = model(*batch[:2], *batch.extras)
                (nll.sum() + routings[1].prob_E.square().sum()).backward()
                found.append([routings[1].load_E, *(parameter.grad for parameter in model.parameters())])
                model.zero_grad()
        for ours, theirs in zip(*found, strict=True):
            assert near(ours, theirs)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # of four blocks


def test_without_gradients_nothing_is_compiled_or_recomputed(compiling, monkeypatch):
    """Generation and validation have many shapes, each of which would be compiled."""
    monkeypatch.setattr(fit_module, "checkpoint", lambda *_, **__: pytest.fail("recomputed"))
    fitted = adapt(build(tiny()), compiling, "full")
    with torch.no_grad():
        fitted.logits(torch.ones(1, 5, dtype=torch.long))
    assert not counters["stats"]["unique_graphs"]
