"""Draw a token from the scores of all, and say how likely it was."""

from typing import NamedTuple

import torch
from torch import Tensor

from khanhllm.errors import UserError
from khanhllm.schema import Sampling

COLDEST = 1e-6
"""temperatures below it take the likeliest token: dividing by them would overflow"""


class Score(NamedTuple):
    """A token, and perhaps how likely it was."""

    token: int
    logprob: float | None = None
    """natural logarithm of its probability, before temperature and other settings"""
    top: tuple[tuple[int, float], ...] = ()
    """the likeliest tokens in its place, the best first, and their logprobs"""


def reseeded(sampling: Sampling, nth: int) -> Sampling:
    """The settings of the nth of several texts, whose seeds follow each other."""
    return sampling.model_copy(update={"seed": (sampling.seed + nth) % 2**63})


def scores(logits_V: Tensor, token: int, top: int) -> Score:
    """The logprob of a token, and those of the `top` likeliest."""
    check(logits_V)
    logprob_V = logits_V.log_softmax(dim=-1)
    best = logprob_V.topk(min(top, len(logprob_V)))
    return Score(token, float(logprob_V[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))


def check(logits_V: Tensor) -> None:
    """Raise UserError if a logit is not finite."""
    if not torch.isfinite(logits_V).all():
        raise UserError("the model answers with numbers that are not finite: its weights are broken; take another run")


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw one token id from the distribution that the settings leave. Raises UserError if a logit is not finite."""
    check(logits_V)
    if sampling.temperature < COLDEST:
        return int(logits_V.argmax())
    logits_V = (logits_V - logits_V.max()) / sampling.temperature
    if 0 < sampling.top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(sampling.top_k).values[-1], -torch.inf)
    prob_V = logits_V.softmax(dim=-1)
    if sampling.top_p < 1:
        sorted_V, order_V = prob_V.sort(descending=True)
        beyond_V = sorted_V.cumsum(0) - sorted_V >= sampling.top_p  # the tokens before suffice already
        prob_V = prob_V.index_fill(0, order_V[beyond_V], 0.0)
    prob_V = prob_V.masked_fill(prob_V < sampling.min_p * prob_V.max(), 0.0)
    return int(torch.multinomial(prob_V, 1, generator=generator))
