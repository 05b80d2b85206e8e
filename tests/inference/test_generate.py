import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import build, plain_machine, tiny
from khanhllm.inference.generate import continuation
from khanhllm.inference.sample import choose
from khanhllm.schema import Sampling

LOGITS = torch.tensor([0.0, 3.0, 2.0, 1.0, -1.0])


def drawn(sampling, times=300):
    generator = torch.Generator().manual_seed(0)
    return {choose(LOGITS, sampling, generator) for _ in range(times)}


def test_what_the_settings_leave():
    assert drawn(Sampling(temperature=0)) == {1}
    assert drawn(Sampling(temperature=1, min_p=0)) == {0, 1, 2, 3, 4}
    assert drawn(Sampling(temperature=1, min_p=0, top_k=2)) == {1, 2}
    assert drawn(Sampling(temperature=1, min_p=0, top_p=0.6)) == {1}  # the first alone has 0.63
    assert drawn(Sampling(temperature=1, min_p=0, top_p=0.7)) == {1, 2}
    assert drawn(Sampling(temperature=1, min_p=0.3)) == {1, 2}


def test_the_temperature_divides_the_logits():
    """Two tokens a logit apart are drawn as often as exp(1 / temperature) says."""
    for temperature in (0.5, 1.0, 2.0):
        sampling = Sampling(temperature=temperature, min_p=0)
        dice = torch.Generator().manual_seed(0)
        draws = [choose(torch.tensor([1.0, 0.0]), sampling, dice) for _ in range(2000)]
        expected = 1 / (1 + 2.718281828 ** (1 / temperature))
        assert abs(sum(draws) / 2000 - expected) < 0.035  # three standard deviations


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=20), st.builds(Sampling))
def test_always_one_of_the_tokens(logits, sampling):
    assert 0 <= choose(torch.tensor(logits), sampling, torch.Generator()) < len(logits)


def test_a_temperature_next_to_nothing_is_none():
    for temperature in (1e-46, 1e-30, 9e-7):
        assert drawn(Sampling(temperature=temperature), times=3) == {1}


def test_greedy_with_the_cache_is_greedy_without():
    model, machine = build(tiny()), plain_machine()
    ids = [5, 17, 200, 3]
    for token in continuation(model, ids, Sampling(tokens=20, temperature=0), machine, 300):
        with torch.no_grad():
            assert token == model.logits(torch.tensor([ids]))[0, -1].argmax()
        ids = [*ids, token]


def test_goes_on_past_the_context_and_takes_any_prompt():
    model, machine = build(tiny("classic")), plain_machine()
    for prompt in ([1], list(range(31)), list(range(32)), list(range(200))):
        tokens = list(continuation(model, prompt, Sampling(tokens=80), machine, 300))
        assert len(tokens) == 80


def test_never_a_token_that_the_tokenizer_lacks():
    tokens = list(continuation(build(tiny()), [1], Sampling(tokens=100, temperature=5, min_p=0), plain_machine(), 50))
    assert max(tokens) < 50


def test_the_same_seed_writes_the_same():
    model, machine = build(tiny()), plain_machine()
    first, second, other = (
        list(continuation(model, [1], Sampling(tokens=20, temperature=2, seed=seed), machine, 300))
        for seed in (1, 1, 2)
    )
    assert first == second != other


def test_a_cache_holds_no_more_than_the_context():
    model = build(tiny())
    cache = model.new_cache()
    with torch.no_grad(), pytest.raises(ValueError, match="33 positions"):
        for length in (32, 1):
            model.logits(torch.ones(1, length, dtype=torch.long), cache)
