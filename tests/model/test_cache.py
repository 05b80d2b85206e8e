"""Texts of different lengths in one cache: each is continued as if it were alone."""

import pytest
import torch

from conftest import build, tiny

STYLES = {
    "classic": ("classic", {}),
    "modern": ("modern", {}),
    "everything": (
        "modern",
        {
            "pattern": "DMDM",
            "kv_heads": 2,
            "feedforward": "relu2",
            "value_embedding": True,
            "embedding_skip": True,
            "pair_embedding": 512,
            "token_shift": True,
            "router_bias": True,
        },
    ),
    "one expert": ("modern", {"experts_per_token": 1}),
}
PROMPTS = [[7], [5, 17, 200, 3], list(range(40, 60)), [9, 9], [1, 2, 3, 4, 5, 6, 7]]
STEPS = 8


def model_of(name):
    style, shape = STYLES[name]
    model = build(tiny(style, **shape))
    with torch.no_grad():  # nothing that a forward reads is zero, as parts of a fresh model are
        for weight in [*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("bias_E"))]:
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    return model


def greedy(model, rows):
    """Each prompt continued in the given row of one cache, all together: the logits of each step, by prompt."""
    cache = model.new_text_cache(max(rows) + 1)
    said = []
    for row, ids in zip(rows, PROMPTS, strict=False):
        said.append([model.next_logits(torch.tensor([ids]), cache.one(row))[0]])
        cache.ids[row] = list(ids)
    for _ in range(STEPS):
        new = [int(logits[-1].argmax()) for logits in said]
        logits_BV = model.next_logits(torch.tensor(new)[:, None], cache.several(rows))
        for row, token, logits, more in zip(rows, new, said, logits_BV, strict=True):
            cache.ids[row].append(token)
            logits.append(more)
    return [torch.stack(logits) for logits in said]


def alone(model, ids):
    ids, said = list(ids), []
    for _ in range(STEPS + 1):
        said.append(model.logits(torch.tensor([ids]))[0, -1])
        ids.append(int(said[-1].argmax()))
    return torch.stack(said)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [6, 0, 3, 2, 5]], ids=["all", "some"])
@torch.no_grad()
def test_a_ragged_batch_continues_each_text_as_if_it_were_alone(style, rows):
    model = model_of(style)
    for ids, together in zip(PROMPTS, greedy(model, rows), strict=True):
        torch.testing.assert_close(together, alone(model, ids), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_memory_that_is_not_cleared_reaches_no_row(monkeypatch):
    """A place that a shorter row has not filled has weight 0, and 0 times NaN is NaN."""
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real(*a, **k).fill_(torch.nan))
    model = model_of("modern")
    assert all(torch.isfinite(logits).all() for logits in greedy(model, [0, 1, 2, 3, 4]))


@torch.no_grad()
def test_a_copied_beginning_and_a_cleared_row():
    model = model_of("everything")
    cache = model.new_text_cache(2)
    model.next_logits(torch.tensor([PROMPTS[4]]), cache.one(1))
    cache.ids[1] = PROMPTS[4]
    cache.copy(1, 0, 3)
    assert cache.ids[0] == PROMPTS[4][:3]
    rest = model.next_logits(torch.tensor([[200, 100]]), cache.one(0))
    torch.testing.assert_close(rest[0], model.logits(torch.tensor([[1, 2, 3, 200, 100]]))[0, -1], atol=1e-5, rtol=1e-5)
    cache.layers[0].key_BHTd[1] = torch.nan
    cache.clear(1)
    assert cache.ids[1] == [] and all(not tensor[1].any() for layer in cache.layers for tensor in layer.tensors)


@torch.no_grad()
def test_a_row_that_begins_with_others_that_go_on():
    model = model_of("everything")
    cache = model.new_text_cache(2)
    model.next_logits(torch.tensor([PROMPTS[4]]), cache.one(0))
    cache.ids[0] = list(PROMPTS[4])
    for layer in cache.layers:
        for tensor in layer.tensors:
            tensor[1, :, -1] = 9.0  # what was there before
    together = model.next_logits(torch.tensor([[200], [7]]), cache.several([0, 1]))
    for ids, logits in zip(([*PROMPTS[4], 200], [7]), together, strict=True):
        torch.testing.assert_close(logits, model.logits(torch.tensor([ids]))[0, -1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_ragged_batch_in_bf16():
    """Under autocast keys come in another type than the cache has."""
    model = model_of("modern")
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.isfinite(logits).all() for logits in greedy(model, [0, 1, 2, 3, 4]))


@pytest.mark.parametrize("style", STYLES)
@torch.no_grad()
def test_closed_experts_are_those_of_one_row_alone(style):
    """A row without closed experts answers what it answers in a batch where nobody has any."""
    model = model_of(style)
    ids_BT = torch.tensor([[5, 17, 200, 3], [5, 17, 200, 3]])
    free = model.logits(ids_BT)
    none, last = torch.zeros(2, 4, dtype=torch.bool), model.config.moe_layers[-1]

    def closing(*experts):
        closed = none.clone()
        closed[1, list(experts)] = True
        return model.head.logits(model.trunk(ids_BT, None, {last: closed})[0])

    assert torch.equal(closing(), free)
    for experts in ([0], [1, 2], [0, 1, 2], [0, 1, 2, 3]):
        some = closing(*experts)
        torch.testing.assert_close(some[0], free[0], atol=1e-5, rtol=1e-5)
        assert torch.isfinite(some).all()
    shut = closing(0, 1, 2, 3)[1]
    assert not torch.allclose(shut, free[1], atol=1e-4)
    model.blocks[last].feedforward.experts.down.zero_()
    if style == "classic":
        model.blocks[last].feedforward.experts.down_bias.zero_()
    torch.testing.assert_close(closing()[1], shut)


@pytest.mark.parametrize("style", ["modern", "everything"])
@torch.no_grad()
def test_the_open_experts_share_the_weight(style):
    router = model_of(style).blocks[1].feedforward.router
    if router.bias_E is not None:
        router.bias_E.add_(torch.tensor([5.0, 5.0, 0.0, 5.0]))
    x_TD = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    for experts in ([0], [1, 3]):
        closed_TE = torch.zeros(6, 4, dtype=torch.bool)
        closed_TE[:, experts] = True
        (expert_TK, weight_TK), _ = router(x_TD, closed_TE)
        assert not torch.isin(expert_TK, torch.tensor(experts)).any()
        torch.testing.assert_close(weight_TK.sum(-1), torch.ones(6))
