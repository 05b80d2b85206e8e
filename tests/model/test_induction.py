"""With `induction_head` a model looks, before any training, where an induction head looks."""

import math

import pytest
import torch

from conftest import build, tiny
from khanhllm.errors import UserError

SHAPE = {"dim": 64, "heads": 4, "pattern": "DMD", "context": 64}
SHAPES = pytest.mark.parametrize(
    "shape", [{}, {"kv_heads": 2}, {"heads": 2}, {"pattern": "MM", "embedding_skip": True, "value_embedding": True}]
)


def attended(attention, x):
    """The share of each position in what the first head of `attention` reads, (T, T), from the definition."""
    size = attention.head_dim
    query, key = (
        attention.rope(norm((x @ matrix.weight[:size].T).view(1, 1, -1, size)))[0, 0]
        for norm, matrix in ((attention.query_norm, attention.query), (attention.key_norm, attention.key))
    )
    scores = query @ key.T / size**0.5
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)


@torch.no_grad()
def looks(model, ids):
    """What the first heads of the first two layers attend to."""
    found = []
    for block in model.blocks[:2]:
        block.attention.register_forward_pre_hook(lambda its, given: found.append(attended(its, given[0])))
    model(ids)
    return found


@SHAPES
def test_the_first_layer_looks_at_the_token_before(shape):
    ids = torch.randint(300, (1, 64), generator=torch.Generator().manual_seed(1))
    model = build(tiny(**SHAPE | shape | {"induction_head": True}))
    first, _ = looks(model, ids)
    assert first.diagonal(-1).mean() > 0.4
    assert (first.argmax(-1)[1:] == torch.arange(63)).float().mean() > 0.8


@SHAPES
def test_the_second_layer_finds_what_followed_the_same_token(shape):
    text = torch.randperm(300, generator=torch.Generator().manual_seed(1))[None, :12]
    ids = torch.cat((text, text), dim=1)
    _, second = looks(build(tiny(**SHAPE | shape | {"induction_head": True})), ids)
    found = second.diagonal(-11)[1:].mean()  # from each token to the one after its twin
    _, without = looks(build(tiny(**SHAPE | shape)), ids)
    assert found > 2.5 * without.diagonal(-11)[1:].mean()


def test_a_model_with_it_learns_to_repeat_sooner():
    def nats(with_it):
        """Of the second time that a text is read, after 40 steps of rows that begin with one at any place."""
        model = build(tiny(**SHAPE | {"pattern": "DD", "induction_head": with_it}))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        generator = torch.Generator().manual_seed(0)
        for _ in range(40):
            ids = torch.randint(128, (16, 49), generator=generator)
            start = torch.randint(17, (16, 1), generator=generator) + torch.arange(16)
            ids[:, 33:] = ids.gather(1, start)
            loss = model(ids[:, :-1], ids[:, 1:])[0][:, 33:].mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    assert nats(True) < 2
    assert nats(False) > 4.5


def test_only_the_two_heads_and_the_tokens_begin_otherwise():
    without, with_it = (build(tiny(**SHAPE, induction_head=given)).state_dict() for given in (False, True))
    other = {name for name in without if not torch.equal(without[name], with_it[name])}
    heads = {f"blocks.{layer}.attention.{part}.weight" for layer in (0, 1) for part in ("query", "key", "value", "out")}
    norms = {f"blocks.0.attention.{part}_norm.weight" for part in ("query", "key")}
    assert other == heads | norms | {"embedding.token.weight", "head.weight"}
    assert all((with_it[name] > 1).float().mean() == 0.5 for name in norms)  # the features that turn fast
    for name in heads:
        kept = (slice(None), slice(16, None)) if ".out." in name else slice(16, None)
        assert torch.equal(without[name][kept], with_it[name][kept])


@SHAPES
def test_the_first_loss_is_that_of_a_guess(shape):
    ids = torch.randint(300, (4, 64), generator=torch.Generator().manual_seed(1))
    wide = {"dim": 512} | shape
    nll = build(tiny(**SHAPE | wide | {"induction_head": True}))(ids[:, :-1], ids[:, 1:])[0]
    assert abs(nll.mean() - math.log(300)) < 0.2


@pytest.mark.parametrize("shape", [{"pattern": "M"}, {"heads": 1}, {"zero_out": True}])
def test_what_it_needs(shape):
    with pytest.raises(UserError, match="induction_head needs two layers, two heads"):
        tiny(**SHAPE | shape, induction_head=True)


def test_the_classic_style_has_none():
    with pytest.raises(UserError, match="choices of style modern: induction_head"):
        tiny(**SHAPE, style="classic", induction_head=True)
