"""How likely a model takes a continuation to be: log p(continuation | end-of-text, context), for many pairs at once.

Every benchmark of this project is made of such pairs. Their tokens, and what is kept when a pair is longer than the
model sees at once, are those of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from khanhllm.data.tokenizer import Tokenizer
from khanhllm.machine.devices import Machine
from khanhllm.model import Transformer

ROWS_OF_TOKENS = 4096
"""tokens read at a time, padding included; without gradients they take little memory"""
CHUNK = 1024
"""rows of logits that exist at one time"""

Pair = tuple[list[int], list[int]]
"""the ids of a context, end-of-text first, and of its continuation"""
Read = tuple[int, ...]


class Likelihood(NamedTuple):
    """What a model says of a continuation."""

    log: float
    """natural logarithm of its probability"""
    greedy: bool
    """whether each of its tokens is the likeliest one"""
    tokens: int
    """scored; 0 if it has none of its own, since its text melts into the last token of the context"""
    cut: int
    """tokens of the pair that the model could not see"""


def encode(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """The ids of a pair. Both texts are encoded as one and parted then, as text is when it is trained on; blanks at
    the end of the context belong to the continuation, since a token begins with its blank."""
    kept = context.rstrip()
    before = tokenizer.encode(kept)
    whole = tokenizer.encode(context + continuation)
    return [tokenizer.end_of_text, *before], whole[len(before) :]


@torch.inference_mode()
def log_likelihoods(model: Transformer, pairs: Sequence[Pair], machine: Machine) -> list[Likelihood]:
    """Score each pair. Of one that is too long, the end is read, so that as much of the continuation as possible is
    scored. Pairs that read the same, as questions answered by one letter do, are read once."""
    seen = model.config.context + 1
    reads: dict[Read, list[int]] = {}
    wanted: list[list[int]] = []
    for number, (before, after) in enumerate(pairs):
        ids = (before + after)[-seen:]
        wanted.append(ids[len(ids) - min(len(after), len(ids) - 1) :])
        reads.setdefault(tuple(ids[:-1]), []).append(number)
    found: dict[int, tuple[float, bool]] = {}
    for batch in _batches(sorted(reads, key=len, reverse=True)):
        asked = [(row, number) for row, read in enumerate(batch) for number in reads[read]]
        found.update(_scored(model, batch, asked, wanted, machine))
    lengths = [len(before) + len(after) for before, after in pairs]
    return [Likelihood(*found[n], len(wanted[n]), max(0, length - seen)) for n, length in enumerate(lengths)]


def _batches(reads: list[Read]) -> Iterator[list[Read]]:
    """Neighbours of similar length; the first of each batch is its longest."""
    start = 0
    while start < len(reads):
        rows = max(1, ROWS_OF_TOKENS // max(1, len(reads[start])))
        yield reads[start : start + rows]
        start += rows


def _scored(
    model: Transformer, batch: list[Read], asked: list[tuple[int, int]], wanted: list[list[int]], machine: Machine
) -> Iterator[tuple[int, tuple[float, bool]]]:
    """The number of each pair, the logarithm of its probability and whether it is greedy. What pads a row lies behind
    all that is scored, where attention never looks. Only what is scored goes through the head."""
    ids_BT = torch.zeros(len(batch), max(1, len(batch[0])), dtype=torch.long)
    for row, read in enumerate(batch):
        ids_BT[row, : len(read)] = torch.tensor(read)
    with machine.autocast():
        x_BTD, _ = model.trunk(ids_BT.to(machine.device))
    rows: list[int] = []
    places: list[int] = []
    targets: list[int] = []
    for row, number in asked:
        count = len(wanted[number])
        rows += [row] * count
        places += range(len(batch[row]) - count, len(batch[row]))
        targets += wanted[number]
    logs: list[float] = []
    likeliest: list[bool] = []
    for x_CD, target_C in zip(
        x_BTD[rows, places].split(CHUNK), torch.tensor(targets, dtype=torch.long).split(CHUNK), strict=True
    ):
        target_C = target_C.to(machine.device)
        with machine.autocast():
            logits_CV = model.head.logits(x_CD)
        logs += logits_CV.log_softmax(-1).gather(1, target_C[:, None]).squeeze(1).tolist()
        likeliest += (logits_CV.argmax(-1) == target_C).tolist()
    start = 0
    for _, number in asked:
        end = start + len(wanted[number])
        yield number, (sum(logs[start:end]), all(likeliest[start:end]))
        start = end
