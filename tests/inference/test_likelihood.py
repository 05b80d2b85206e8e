"""The likelihood of a continuation is that of the plain formula, whatever it is batched with."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import build, plain_machine, tiny
from khanhllm.data.tokenizer import train_tokenizer
from khanhllm.inference import likelihood
from khanhllm.inference.likelihood import encode, log_likelihoods

SHAPES = {
    "modern": {},
    "classic": {"style": "classic"},
    "all parts": {"value_embedding": True, "pair_embedding": 64, "embedding_skip": True, "router_bias": True},
    "token shift": {"token_shift": True, "token_norm": True},
}
MODELS = {name: build(tiny(**shape)) for name, shape in SHAPES.items()}
CONTEXT = 32
IDS = st.lists(st.integers(0, 299), min_size=0, max_size=2 * CONTEXT)
TEXT = "The cat sat on the mat. The dog saw the cat and the cat saw the dog.\n"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 3], 290)


@torch.no_grad()
def plain(model, before, after):
    """log p of what the model sees of a pair, whether it is greedy, how many tokens that is: one pair, no padding."""
    ids = torch.tensor((before + after)[-CONTEXT - 1 :])
    count = min(len(after), len(ids) - 1)
    if not count:
        return 0.0, True, 0
    logits_CV = model.logits(ids[None, :-1])[0, -count:].double()
    log = logits_CV.log_softmax(-1).gather(1, ids[-count:, None]).sum()
    return float(log), bool((logits_CV.argmax(-1) == ids[-count:]).all()), count


@pytest.mark.parametrize("name", SHAPES)
@given(pairs=st.lists(st.tuples(IDS.map(lambda ids: [0, *ids]), IDS), min_size=1, max_size=8), rows=st.integers(1, 200))
@settings(deadline=None, max_examples=30)
def test_batches_padding_and_shared_beginnings_change_nothing(name, pairs, rows):
    model, pairs = MODELS[name], [*pairs, (pairs[0][0], [*pairs[0][1][:-1], 7])]  # reads what the first one reads
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood, "ROWS_OF_TOKENS", rows)
        patch.setattr(likelihood, "CHUNK", 5)
        found = log_likelihoods(model, pairs, plain_machine())
    for (before, after), one in zip(pairs, found, strict=True):
        log, greedy, count = plain(model, before, after)
        assert one.log == pytest.approx(log, abs=1e-4) and (one.greedy, one.tokens) == (greedy, count)
        assert one.cut == max(0, len(before) + len(after) - CONTEXT - 1)


def test_pairs_that_read_the_same_are_read_once(monkeypatch):
    model, rows = MODELS["modern"], []
    trunk = model.trunk
    monkeypatch.setattr(model, "trunk", lambda ids, *more: rows.append(len(ids)) or trunk(ids, *more))
    log_likelihoods(model, [([0, 5, 6], [letter]) for letter in range(40, 60)], plain_machine())
    assert rows == [1]


def test_the_likeliest_token_is_greedy_and_no_other(tokenizer):
    model, before = MODELS["modern"], [tokenizer.end_of_text, 5, 6, 7]
    best = int(model.logits(torch.tensor([before]))[0, -1].argmax())
    found = log_likelihoods(model, [(before, [best]), (before, [best ^ 1])], plain_machine())
    assert [one.greedy for one in found] == [True, False]


def test_a_context_begins_after_an_end_of_text_and_keeps_no_blank_at_its_end(tokenizer):
    end = tokenizer.end_of_text
    assert encode(tokenizer, "", "The cat") == ([end], tokenizer.encode("The cat"))
    blank, none = encode(tokenizer, "The ", "cat"), encode(tokenizer, "The", " cat")
    assert blank == none == ([end, *tokenizer.encode("The")], tokenizer.encode(" cat"))
    before, after = encode(tokenizer, "The c", "at sat")
    assert before == [end, *tokenizer.encode("The c")]
    assert after == tokenizer.encode("The cat sat")[len(before) - 1 :], "encoded as one text, then parted"
