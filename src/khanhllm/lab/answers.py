"""Questions, and what a run answers: each is one comparison of log p(continuation | context)."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from khanhllm.inference.likelihood import Likelihood, encode, log_likelihoods
from khanhllm.runs.run import Run


class Question(NamedTuple):
    """Texts of which the model should find one the likeliest. A single one is to be known by heart."""

    choices: list[tuple[str, str]]
    """context and continuation of each"""
    right: int
    field: str = ""
    """which part of its set it belongs to"""


class Answers(NamedTuple):
    """Questions, and what the model says of each choice."""

    questions: list[Question]
    found: list[list[Likelihood]]

    @property
    def cut(self) -> int:
        """Questions of which the model could not see all."""
        return sum(any(one.cut for one in choices) for choices in self.found)

    def credits(self, per: str = "") -> list[float]:
        """For each question, 1 if the right choice is the likeliest one; choices that share the first place share the
        1. per: byte or token, to compare likelihoods per byte or per token. A single choice must be the greedy one."""
        credits = []
        for question, found in zip(*self, strict=True):
            if len(found) == 1:
                credits.append(float(found[0].greedy))
                continue
            sizes = [len(text.strip().encode()) for _, text in question.choices] if per == "byte" else [1] * len(found)
            sizes = [one.tokens for one in found] if per == "token" else sizes
            scores = [one.log / max(1, size) for one, size in zip(found, sizes, strict=True)]
            best = max(scores)
            credits.append(float(scores[question.right] == best) / scores.count(best))
        return credits


def ask(opened: Run, questions: Iterable[Question]) -> Answers:
    """Score every choice of every question."""
    asked = list(questions)
    pairs = [encode(opened.tokenizer, *choice) for question in asked for choice in question.choices]
    scored = iter(log_likelihoods(opened.model, pairs, opened.machine))
    return Answers(asked, [[next(scored) for _ in question.choices] for question in asked])


def mean(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """value: the mean; error: its standard error, which a single value does not have."""
    count = len(values)
    error = float(np.std(values, ddof=1) / math.sqrt(count)) if count > 1 else None
    return {"value": float(np.mean(values)), "error": error, "items": count}


def ratio(amounts: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    """value: the sum of amounts over that of sizes, as bits over bytes; error: its standard error over the items."""
    size, count = max(1, int(sizes.sum())), len(amounts)
    value = float(amounts.sum()) / size
    spread = float(np.square(amounts - value * sizes).sum())
    error = math.sqrt(count / (count - 1) * spread) / size if count > 1 else None
    return {"value": value, "error": error, "items": count}
