"""Experts on several processes answer as those of one process do. Threads stand for the processes here."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from threading import Barrier

import pytest
import torch

from conftest import build, plain_machine, tiny
from khanhllm.machine.adapt import adapt
from khanhllm.model.exchange import Part, lead, serve, spread
from khanhllm.model.router import Choice, count

G = torch.Generator().manual_seed(7)


def at_once(size, work):
    """What `work(rank, swap)` returns on each of so many threads, which swap rows with each other."""
    table, barrier = [[] for _ in range(size)], Barrier(size, timeout=60)

    def swapping(rank):
        def swap(rows, sent, came):
            assert len(rows) == sum(sent)
            table[rank] = rows.detach().split(sent)
            barrier.wait()
            arrived = [parts[rank] for parts in table]
            barrier.wait()
            assert [len(part) for part in arrived] == came and len({part.dtype for part in arrived}) == 1
            return torch.cat(arrived)

        try:
            return work(rank, swap)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(swapping, range(size)))


def part_of(model, rank, size, swap):
    model = deepcopy(model)
    return model, spread(model, Part(rank, size), swap)


STYLES = {"classic": {"style": "classic"}, "modern": {}, "relu2": {"feedforward": "relu2"}}
AMONG = {"any": range(8), "all to the last": (6, 7), "none to the first": range(2, 8), "one expert": (5,)}


def not_empty(_experts, given):
    """As some kernels cannot bear it."""
    assert len(given[0])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("route", AMONG)
def test_forward_and_gradients_are_those_of_the_whole(style, route):
    size, tokens, among = 4, (9, 5, 1, 7), torch.tensor(AMONG[route])
    model = build(tiny(experts=8, **STYLES[style])).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5, generator=G)  # biases too
    kept = min(2, len(among))
    expert_TK = torch.stack([among[torch.randperm(len(among), generator=G)[:kept]] for _ in range(sum(tokens))])
    x_TD, weight_TK, slope_TD = (
        torch.randn(sum(tokens), width, generator=G, dtype=torch.float64) for width in (32, kept, 32)
    )

    def answered(layer, rows):
        x, weight = (tensor.split(tokens)[rows] if rows is not None else tensor for tensor in (x_TD, weight_TK))
        expert, slope = (tensor.split(tokens)[rows] if rows is not None else tensor for tensor in (expert_TK, slope_TD))
        x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = layer.answer(x, Choice(expert, weight), count(expert, 8))
        (y * slope).sum().backward()
        stacks = [torch.zeros_like(p) if p.grad is None else p.grad for p in layer.experts.parameters()]
        return [y.detach(), x.grad, weight.grad], stacks

    def apart(rank, swap):
        mine, _ = part_of(model, rank, size, swap)
        mine.blocks[1].feedforward.experts.register_forward_pre_hook(not_empty)
        stacks = [*mine.blocks[1].feedforward.experts.parameters()]
        assert all(len(stack) == 2 and stack.untyped_storage().nbytes() == stack.nbytes for stack in stacks)
        return answered(mine.blocks[1].feedforward, rank)

    whole = answered(model.blocks[1].feedforward, None)
    parts = zip(*at_once(size, apart), strict=True)
    for ours, theirs in zip(parts, whole, strict=True):
        for pieces, tensor in zip(zip(*ours, strict=True), theirs, strict=True):
            assert torch.allclose(torch.cat(pieces), tensor, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_whole_model_too(checkpointing):
    model = build(tiny(pattern="MDM", router_bias=True))
    ids = torch.randint(300, (4, 17), generator=G)

    def gradients(model, ids):
        adapt(model, plain_machine(), checkpointing)
        nll, routings = model(ids[:, :-1], ids[:, 1:])
        (nll.sum() + sum(routing.z for routing in routings)).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    whole = gradients(deepcopy(model), ids)
    parts = at_once(2, lambda rank, swap: gradients(part_of(model, rank, 2, swap)[0], ids.chunk(2)[rank]))
    for name, gradient in whole.items():
        here, there = (part[name] for part in parts)
        joined = torch.cat([here, there]) if Part(0, 2).cuts(name) else here + there
        assert torch.allclose(joined, gradient, rtol=1e-4, atol=1e-5), name


def test_one_calls_the_model_while_the_others_serve():
    model = build(tiny(pattern="MDM"))
    ids = torch.randint(300, (2, 9), generator=G)

    def fail():
        model.new_cache()
        raise ValueError("midway")

    def work(rank, swap):
        mine, exchanges = part_of(model, rank, 2, swap)
        if rank:
            return [serve(exchanges) for _ in range(3)]
        with torch.inference_mode():
            logits = lead(exchanges, lambda: mine.logits(ids))
            with pytest.raises(ValueError, match="midway"):
                lead(exchanges, fail)

            def step_by_step():
                cache = mine.new_cache(2)
                return torch.cat([mine.logits(ids[:, at : at + 1], cache) for at in range(9)], dim=1)

            return logits, lead(exchanges, step_by_step)

    ours, _ = at_once(2, work)
    with torch.no_grad():
        for logits in ours:
            assert torch.allclose(logits, model.logits(ids), atol=1e-5)


def test_bf16_travels_as_bf16():
    model = build(tiny())
    machine = replace(plain_machine(), precision="bf16")
    ids = torch.randint(300, (4, 17), generator=G)

    def loss(model, ids):
        with machine.autocast():
            nll, _ = model(ids[:, :-1], ids[:, 1:])
        nll.sum().backward()
        return nll.sum().item()

    def work(rank, swap):
        mine, exchanges = part_of(model, rank, 2, swap)
        found = loss(mine, ids.chunk(2)[rank])
        with machine.autocast(), torch.no_grad():
            lead(exchanges, lambda: mine.logits(ids)) if rank == 0 else serve(exchanges)
        return found

    assert sum(at_once(2, work)) == pytest.approx(loss(model, ids), rel=1e-3)


def test_parts_make_the_whole():
    model = build(tiny(style="classic"))
    state, parts = model.state_dict(), [Part(nth, 4).weights(model.state_dict()) for nth in range(4)]
    for name, tensor in state.items():
        cut = Part(0, 4).cuts(name)
        assert cut == (".experts." in name)
        assert torch.equal(torch.cat([part[name] for part in parts]) if cut else parts[2][name], tensor)
    mine, _ = part_of(model, 1, 4, None)
    assert Part(1, 4).shapes(mine) == Part().shapes(model)
    assert set(Part(1, 4).counts(mine)) == set(mine.blocks[1].feedforward.experts.parameters())
    assert not Part().counts(model) and not Part().cuts("blocks.1.feedforward.experts.up")
