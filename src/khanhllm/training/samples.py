"""What a run writes now and then, to read along: a text of its own, or answers to questions that it held out."""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from khanhllm.data.shards import Shards
from khanhllm.data.tokenizer import Tokenizer
from khanhllm.errors import UserError
from khanhllm.inference.generate import answer, write
from khanhllm.inference.sample import reseeded
from khanhllm.log.run_log import Log
from khanhllm.machine.group import Lost
from khanhllm.schema import Sampling
from khanhllm.training.parts import Parts

QUESTIONS = 3


def write_samples(parts: Parts, step: int, log: Log, finished: bool) -> None:
    """Write them into samples.txt and the log; the first process does it. Weights that have gone wrong write nothing:
    the guard brings a run back from them, but not one that has finished, which raises UserError."""
    parts.learner.owners.led(lambda: _write_samples(parts, step, log, finished))


def _write_samples(parts: Parts, step: int, log: Log, finished: bool) -> None:
    written = _answers(parts) if parts.config.train.targets == "answers" else _text(parts, step)
    try:
        with (parts.run / "samples.txt").open("a", encoding="utf-8", errors="replace") as file:
            for prompt, text in written:
                log.say(f"step {step} writes: {' '.join((prompt + text).split())[:300]}")
                file.write(f"--- step {step}\n{prompt}{text}\n")
    except (OSError, UserError) as error:
        if isinstance(error, Lost) or (finished and isinstance(error, UserError)):
            raise
        log.say(f"the sample could not be written: {error}; training continues")


def _text(parts: Parts, step: int) -> Iterator[tuple[str, str]]:
    train, learner = parts.config.train, parts.learner
    sampling = reseeded(Sampling(tokens=train.sample_tokens, seed=train.seed), step)
    pieces = write(learner.model, parts.tokenizer, learner.machine, train.sample_prompt, sampling)
    yield train.sample_prompt, "".join(pieces)


def _answers(parts: Parts) -> Iterator[tuple[str, str]]:
    learner, tokenizer = parts.learner, parts.tokenizer
    sampling = Sampling(tokens=parts.config.train.sample_tokens, temperature=0)
    for ids in islice(questions(parts.validation, tokenizer), QUESTIONS):
        pieces = answer(learner.model, tokenizer, learner.machine, ids, sampling)
        yield tokenizer.decode(ids[1:]), "".join(pieces)


def questions(shards: Shards, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The ids of each conversation up to where its first answer begins."""
    assistant = tokenizer.specials.get("<|assistant|>")
    for window in shards.windows():
        for start in np.flatnonzero(window == tokenizer.end_of_text):
            found = np.flatnonzero(window[start:] == assistant)
            following = np.flatnonzero(window[start + 1 :] == tokenizer.end_of_text)
            if len(found) and (not len(following) or found[0] <= following[0]):
                yield window[start : start + found[0] + 1].tolist()
