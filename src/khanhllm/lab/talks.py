"""What a run that was taught to talk makes of the conversations that it held out: how many nats the right answers take,
whether its own answers end, and whether they are the right ones, word for word."""

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from khanhllm.data.counting import Marks
from khanhllm.errors import UserError
from khanhllm.inference.engine import Engine, Job
from khanhllm.inference.likelihood import Pair, log_likelihoods
from khanhllm.inference.sample import Score
from khanhllm.runs.evaluate import held_out
from khanhllm.runs.run import Run
from khanhllm.schema import Sampling

ROWS = 16
"""answers that are written together"""
LONGER = 2
"""an answer may have so many times the tokens of the longest right one"""


def held_out_answers(opened: Run) -> Iterator[Pair]:
    """Each answer of the conversations that the run held out, <|end|> included, and all that stands before it."""
    marks = Marks.of(opened.tokenizer)
    for window in held_out(opened).windows():
        for ids in np.split(window, np.flatnonzero(window == marks.end_of_text)):
            for start in np.flatnonzero(ids == marks.assistant) + 1:
                yield ids[:start].tolist(), ids[start : start + int(np.argmax(ids[start:] == marks.end)) + 1].tolist()


def likeliest(opened: Run, questions: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """The likeliest answer to each question, token by token: up to `tokens`, or to the first special one, which is
    its last then. questions: ids, with <|assistant|> at their end."""
    specials = opened.tokenizer.special_ids
    answers: list[list[int]] = [[] for _ in questions]
    engine = Engine(opened.model, opened.machine, opened.tokenizer.vocab_size, ROWS, waiting=len(answers))

    def job(ids: Sequence[int], said: list[int]) -> Job:
        def hear(score: Score) -> bool:
            said.append(score.token)
            return score.token in specials

        return Job(ids, Sampling(tokens=tokens, temperature=0), hear, lambda _reason, _error: None)

    engine.submit(*map(job, questions, answers))
    while engine.turn():
        pass
    return answers


def answers(opened: Run, most: int) -> tuple[np.ndarray, np.ndarray, list[bool], list[bool]]:
    """Of up to `most` held-out answers: nats and tokens of the right one, whether the run's own ends, and whether it is
    the right one. Raises UserError if the run held out none."""
    pairs = list(islice(held_out_answers(opened), most))
    if not pairs:
        raise UserError("the run held out no conversation")
    found = log_likelihoods(opened.model, pairs, opened.machine)
    longest = max(len(right) for _, right in pairs)
    own = likeliest(opened, [before for before, _ in pairs], LONGER * longest)
    end = Marks.of(opened.tokenizer).end
    nats, tokens = np.array([-one.log for one in found]), np.array([one.tokens for one in found])
    rights = [right == said for (_, right), said in zip(pairs, own, strict=True)]
    return nats, tokens, [said[-1:] == [end] for said in own], rights
