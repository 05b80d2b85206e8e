"""What counts in a row of ids, and where its documents begin.

Both can be read off the ids, since text never becomes a special token (see tokenizer.py): conversations need no second
stream beside their tokens, and lie in the same shards as plain text.

    <|endoftext|> <|user|> Two? <|assistant|> Yes. <|end|> <|endoftext|> A text. <|endoftext|> <|endoftext|>
                                              ^^^^ ^^^^^^^               ^ ^^^^^ ^^^^^^^^^^^^^

Of a conversation, the targets that count are what the assistant says and the token that ends it. A document without
roles counts wholly, the end-of-text that ends it included. An end-of-text after another fills a row, and never counts.
"""

from typing import NamedTuple

import numpy as np

from khanhllm.data.tokenizer import SPECIALS, Tokenizer
from khanhllm.errors import UserError
from khanhllm.schema import TrainConfig


class Marks(NamedTuple):
    """The ids of the special tokens."""

    end_of_text: int
    system: int
    user: int
    assistant: int
    end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Marks":
        """Raises UserError if the tokenizer lacks one."""
        for name in SPECIALS:
            if name not in tokenizer.specials:
                way = "train with one that `khanhllm tokenizer` writes"
                raise UserError(f"the tokenizer has no token {name}, which conversations need; {way}")
        return cls(*(tokenizer.specials[name] for name in SPECIALS))


class Reading(NamedTuple):
    """How a run reads its rows, if not as one text each of which every token counts."""

    end_of_text: int
    marks: Marks | None
    """where only answers count"""
    document_mask: bool

    @classmethod
    def of(cls, config: TrainConfig, tokenizer: Tokenizer) -> "Reading | None":
        """None for plain pre-training. Raises UserError if answers are to count and the tokenizer knows no roles."""
        answers = config.targets == "answers"
        if not answers and not config.document_mask:
            return None
        return cls(tokenizer.end_of_text, Marks.of(tokenizer) if answers else None, config.document_mask)


def counted(ids_BT: np.ndarray, marks: Marks) -> np.ndarray:
    """Which targets of rows (B, T + 1) count: bool (B, T). What stands before the first role in a row is taken for
    text, as when a row begins in the middle of a document."""
    end_of_text, system, user, assistant, end = (_last(ids_BT == mark) for mark in marks)
    text_BT = np.maximum.reduce([system, user, assistant])[:, :-1] <= end_of_text[:, :-1]
    answer_BT = assistant[:, :-1] > np.maximum.reduce([end_of_text, system, user, end])[:, :-1]
    targets_BT = ids_BT[:, 1:]
    roles_BT = np.isin(targets_BT, (marks.system, marks.user, marks.assistant))
    return np.where(
        targets_BT == marks.end_of_text,
        text_BT & ~padding(ids_BT, marks.end_of_text),
        (text_BT | answer_BT) & ~roles_BT,
    )


def padding(ids_BT: np.ndarray, end_of_text: int) -> np.ndarray:
    """Which inputs of rows (B, T + 1) fill a row: each end-of-text that another follows. bool (B, T)."""
    return (ids_BT[:, :-1] == end_of_text) & (ids_BT[:, 1:] == end_of_text)


def places(ids_BT: np.ndarray, end_of_text: int) -> np.ndarray:
    """The position of each token in its own document, whose first is the end-of-text before it: int64 (B, T)."""
    return np.arange(ids_BT.shape[1]) - _last(ids_BT == end_of_text).clip(min=0)


def _last(found_BT: np.ndarray) -> np.ndarray:
    """At each position the newest one so far that is true; -1 before the first."""
    return np.maximum.accumulate(np.where(found_BT, np.arange(found_BT.shape[1]), -1), axis=1)
