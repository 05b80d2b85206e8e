"""What a routing tells, as pure functions of which expert each token went to. Each measure comes with its value by
chance, because a number alone says nothing: shares of eight experts repeat by luck, and a rare token has gone to one
expert only because it was seen once.

Where chance has no formula, shuffling has: the experts of a layer are dealt out again among its tokens, which keeps how
often each was chosen and forgets for what. Letters: N tokens, K experts for each, best first, E experts in the layer;
`first_N` is each token's best.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float64]

SHUFFLES = 4
OFTEN = 20
"""how often a token must be seen before its experts are spoken of"""


class Measure(NamedTuple):
    """A measured number and what it would be by chance."""

    value: float
    chance: float
    spread: float = 0.0
    """standard deviation of the value under shuffling; 0 where chance has a formula"""


def shares(expert_NK: Ints, experts: int) -> Floats:
    """Each expert's share of the token-expert pairs (Shazeer et al. 2017, arXiv 1701.06538): (E,), sums to 1."""
    return np.bincount(expert_NK.ravel(), minlength=experts) / expert_NK.size


def entropy(counts: Ints | Floats) -> float:
    """Shannon's entropy of counts (bits)."""
    known = counts[counts > 0] / counts.sum()
    return float(-(known * np.log2(known)).sum())


def table(x_N: Ints, first_N: Ints, experts: int) -> Ints:
    """How often each value of x, in rising order, met each expert: (X, E)."""
    values, x_N = np.unique(x_N, return_inverse=True)
    flat = np.bincount(x_N.astype(np.int64) * experts + first_N, minlength=len(values) * experts)
    return flat.reshape(len(values), experts)


def information(table_XE: Ints) -> float:
    """Mutual information of the two (bits), raw: above 0 for few tokens even where there is none."""
    return entropy(table_XE.sum(1)) + entropy(table_XE.sum(0)) - entropy(table_XE.ravel())


def known(x_N: Ints, first_N: Ints, experts: int) -> Measure:
    """How much of the choice of expert is known once x is: 0 nothing, 1 all of it.

    Mutual information less that of shuffled experts, as a share of what there is to know (adjusted mutual information,
    Vinh, Epps and Bailey 2010). x may be the token itself: nearly all of the choice in OpenMoE (Xue et al. 2024,
    arXiv 2402.01739).
    """
    whole = entropy(np.bincount(first_N, minlength=experts))
    raw = information(table(x_N, first_N, experts))
    lucky = np.array([information(table(x_N, dealt, experts)) for dealt in _shuffled(first_N)])
    left = whole - lucky.mean()
    if left < 1e-9:  # one expert takes all, or every token is another: nothing can be learned
        return Measure(0.0, 0.0)
    return Measure(float((raw - lucky.mean()) / left), 0.0, float(lucky.std(ddof=1) / left))


def faithful(x_N: Ints, first_N: Ints, experts: int) -> Measure | None:
    """Vocabulary specialisation (OLMoE, Muennighoff et al. 2024, arXiv 2409.02060, section 5): how much of a token goes
    to its favourite expert, the mean over tokens seen often. None if there are none."""

    def value(first_N: Ints) -> float:
        table_XE = table(x_N, first_N, experts)
        seen_X = table_XE.sum(1)
        often = seen_X >= OFTEN
        return float((table_XE.max(1)[often] / seen_X[often]).mean()) if often.any() else np.nan

    lucky = np.array([value(dealt) for dealt in _shuffled(first_N)])
    found = Measure(value(first_N), float(lucky.mean()), float(lucky.std(ddof=1)))
    return None if np.isnan(found.value) else found


def together(expert_NK: Ints, experts: int) -> Floats:
    """Co-activation (OLMoE): of the tokens of expert e, the share that also went to f: (E, E), 0 on the diagonal. By
    chance (K - 1) / (E - 1)."""
    chosen_NE = np.zeros((len(expert_NK), experts), np.float32)
    np.put_along_axis(chosen_NE, expert_NK.astype(np.int64), 1, axis=1)
    both_EE = (chosen_NE.T @ chosen_NE).astype(np.float64)
    alone_E = both_EE.diagonal().copy()
    np.fill_diagonal(both_EE, 0)
    return both_EE / np.maximum(alone_E, 1)[:, None]


def repetition(first_WT: Ints, experts: int, text_WT: npt.NDArray[np.bool_]) -> Measure:
    """How often the next token goes to the same expert (Mixtral, Jiang et al. 2024, arXiv 2401.04088, section 5).
    text_WT: the tokens that are looked at."""
    same = float((first_WT[:, 1:] == first_WT[:, :-1])[text_WT[:, 1:]].mean())
    return Measure(same, float((shares(first_WT[text_WT], experts) ** 2).sum()))


def overlap(one_NK: Ints, other_NK: Ints, experts: int) -> Measure:
    """Router saturation (OLMoE): the share of a token's experts that two checkpoints agree on. By chance, what two
    routers with these shares agree on: K / E if they are even."""
    agree = float((one_NK[:, :, None] == other_NK[:, None, :]).any(2).mean())
    return Measure(agree, float(one_NK.shape[1] * (shares(one_NK, experts) * shares(other_NK, experts)).sum()))


def likes(x_N: Ints, first_N: Ints, experts: int, most: int = 6) -> list[list[int]]:
    """The values of x that each expert gets more of than its share, those first that say most about it: the order is
    count x log(lift), so that neither rare nor common ones crowd out the rest."""
    values, table_XE = np.unique(x_N), table(x_N, first_N, experts)
    seen_X1, even_E = table_XE.sum(1, keepdims=True), table_XE.sum(0) / len(x_N)
    lift_XE = table_XE / seen_X1 / np.maximum(even_E, 1e-12)
    weight_XE = np.where((seen_X1 >= OFTEN) & (lift_XE > 1), table_XE * np.log(np.maximum(lift_XE, 1)), 0)
    order_XE = (-weight_XE).argsort(axis=0, kind="stable")[:most]
    return [[int(values[x]) for x in order_XE[:, e] if weight_XE[x, e] > 0] for e in range(experts)]


def lifts(x_N: Ints, expert_NK: Ints, experts: int, kinds: int) -> Floats:
    """Domain specialisation (OLMoE): of the pairs of kind x, the share that went to each expert, as a multiple of that
    expert's share of all. (X, E); 1 by chance, nan for a kind that was not seen often."""
    each = np.repeat(x_N, expert_NK.shape[1]).astype(np.int64) * experts + expert_NK.ravel()
    table_XE = np.bincount(each, minlength=kinds * experts).reshape(kinds, experts)
    seen_X1, even_E = table_XE.sum(1, keepdims=True), shares(expert_NK, experts)
    lift_XE: Floats = table_XE / np.maximum(seen_X1, 1) / np.maximum(even_E, 1e-12)
    return np.where(seen_X1 >= OFTEN, lift_XE, np.nan)


def _shuffled(first_N: Ints) -> list[Ints]:
    dice = np.random.default_rng(0)
    return [dice.permutation(first_N) for _ in range(SHUFFLES)]
