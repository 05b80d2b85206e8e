"""Measures of a routing give the planted value for a planted router and the value of chance for a random one."""

import numpy as np
import pytest

from khanhllm.lab import routing

E, N = 8, 20_000
DICE = np.random.default_rng(1)
TOKENS = np.minimum(DICE.zipf(1.3, N), 400).astype(np.int64)  # as in text: few tokens are frequent, most are rare
PLANTED = TOKENS % E
RANDOM = DICE.integers(0, E, N)
PAIRS = np.stack([RANDOM, (RANDOM + DICE.integers(1, E, N)) % E], axis=1)


def near_chance(measure, spreads=6):
    return abs(measure.value - measure.chance) < spreads * max(measure.spread, 1e-3)


def test_shares_sum_to_one_and_follow_the_counts():
    shares = routing.shares(np.array([[0, 1], [0, 2]]), 4)
    assert shares.tolist() == [0.5, 0.25, 0.25, 0]
    assert routing.shares(PAIRS, E).sum() == pytest.approx(1)


def test_entropy_is_shannon_s():
    assert routing.entropy(np.array([3, 3, 3, 3, 0])) == pytest.approx(2)
    assert routing.entropy(np.array([5, 0])) == 0


def test_a_planted_router_is_known_and_a_random_one_is_not():
    assert routing.known(TOKENS, PLANTED, E).value == pytest.approx(1, abs=1e-9)
    assert near_chance(routing.known(TOKENS, RANDOM, E))
    half = np.where(np.arange(N) % 2, PLANTED, RANDOM)
    assert 0.1 < routing.known(TOKENS, half, E).value < 0.5


def test_what_few_tokens_seem_to_tell_is_taken_off():
    """Raw mutual information of a random router and a position seen ten times is not small."""
    position = np.arange(N) % (N // 10)
    assert routing.information(routing.table(position, RANDOM, E)) > 0.3
    assert near_chance(routing.known(position, RANDOM, E))


def test_one_expert_for_all_leaves_nothing_to_know():
    assert routing.known(TOKENS, np.zeros(N, np.int64), E) == (0, 0, 0)


def test_a_token_that_always_goes_to_one_expert():
    assert routing.faithful(TOKENS, PLANTED, E).value == 1
    random = routing.faithful(TOKENS, RANDOM, E)
    assert near_chance(random) and random.chance > 1 / E, "the favourite of a rare token is luck"
    assert routing.faithful(np.arange(50), np.zeros(50, np.int64), E) is None


def test_pairs_that_go_together():
    planted = routing.together(np.stack([PLANTED, (PLANTED + 1) % E], axis=1), E)
    assert [planted[e, (e + 1) % E] for e in range(E)] == pytest.approx(
        [np.mean(e == PLANTED) / (np.mean(e == PLANTED) + np.mean((e - 1) % E == PLANTED)) for e in range(E)]
    )
    assert planted.sum(1) == pytest.approx(np.ones(E)), "K - 1 others for each token"
    random = routing.together(PAIRS, E)
    assert random[~np.eye(E, dtype=bool)] == pytest.approx(np.full(E * E - E, 1 / (E - 1)), abs=0.02)


def test_the_same_expert_again():
    all_WT = np.ones((E, 10), bool)
    assert routing.repetition(np.repeat(np.arange(E), 10).reshape(E, 10), E, all_WT) == (1, pytest.approx(1 / E), 0)
    random = routing.repetition(RANDOM.reshape(100, -1), E, np.ones((100, RANDOM.size // 100), bool))
    assert random.value == pytest.approx(random.chance, abs=0.01)


def test_checkpoints_that_agree():
    assert routing.overlap(PAIRS, PAIRS[:, ::-1], E).value == 1, "whichever was first"
    random = routing.overlap(PAIRS, DICE.permutation(PAIRS), E)
    assert random.value == pytest.approx(random.chance, abs=0.01) and random.chance == pytest.approx(2 / E, abs=0.01)


def test_an_expert_likes_what_it_gets_more_of():
    liked = routing.likes(TOKENS, PLANTED, E)
    assert all(token % E == expert for expert, tokens in enumerate(liked) for token in tokens)
    assert liked[1][0] == 1, "the most frequent token first"
    counts = np.bincount(TOKENS)
    assert all(counts[token] >= routing.OFTEN for tokens in liked for token in tokens)
    rare = routing.likes(np.arange(N), RANDOM, E)
    assert rare == [[]] * E


def test_kinds_of_text_that_an_expert_gets_more_of():
    kinds = DICE.integers(0, 3, N)
    even = routing.lifts(kinds, PAIRS, E, 4)
    assert even[:3] == pytest.approx(np.ones((3, E)), abs=0.1) and np.isnan(even[3]).all()
    planted = routing.lifts(kinds, np.where(kinds == 0, 0, 1 + RANDOM % (E - 1))[:, None], E, 3)
    assert planted[0, 0] == pytest.approx(3, abs=0.1) and planted[1:, 0].tolist() == [0, 0]
