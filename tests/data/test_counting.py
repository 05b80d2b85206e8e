"""What counts is a function of the ids alone."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khanhllm.data import counting
from khanhllm.data.batches import batch_of
from khanhllm.data.counting import Marks, Reading
from khanhllm.data.tokenizer import SPECIALS, Tokenizer, train_tokenizer
from khanhllm.errors import UserError
from khanhllm.schema import TrainConfig

MARKS = Marks(0, 1, 2, 3, 4)
E, SYSTEM, USER, ASSISTANT, END = MARKS


def slow(row):
    """One token after the other, with a state."""
    found, state = [], "text"
    for before, target in zip([None, *row], row, strict=False):
        if target == E:
            counts = state == "text" and before != E
            state = "text"
        elif target in (SYSTEM, USER, ASSISTANT):
            counts = False
            state = "answer" if target == ASSISTANT else "question"
        else:
            counts = state in ("text", "answer")
            if target == END and state != "text":
                state = "question"
        found.append(counts)
    return found[1:]


@given(st.lists(st.lists(st.integers(0, 6), min_size=9, max_size=9), min_size=1, max_size=3))
def test_counted_equals_a_machine_that_reads_token_by_token(rows):
    assert counting.counted(np.array(rows), MARKS).tolist() == [slow(row) for row in rows]


def row_of(text):
    """Words to ids; E, S, U, A, X are the special tokens, any other word is itself."""
    names = {"E": E, "S": SYSTEM, "U": USER, "A": ASSISTANT, "X": END}
    return np.array([[names.get(word) if word in names else 10 + int(word) for word in text.split()]])


def shown(text):
    """The targets that count, in the words of the text."""
    return " ".join(
        word for word, counts in zip(text.split()[1:], counting.counted(row_of(text), MARKS)[0], strict=True) if counts
    )


def test_every_answer_counts_whole_and_with_its_end():
    assert shown("E S 1 X U 2 2 X A 3 4 X U 5 X A 6 X U 7 X A X E") == "3 4 X 6 X X"


def test_a_text_counts_wholly_and_padding_never():
    assert shown("E 1 2 3 E 4 5 E E E") == "1 2 3 E 4 5 E"
    assert shown("1 2 E 3") == "2 E 3"  # from the middle of a document on
    assert shown("E U 1 X A 2 X E 3 4 E U 5 X A 6 X E E E") == "2 X 3 4 E 6 X"
    assert shown("E E E E") == ""


def test_an_answer_that_is_cut_off_ends_there():
    assert shown("E U 1 X A 2 E 3") == "2 3"
    assert shown("E U 1 X A 2 U 3 X") == "2"


def test_positions_and_padding():
    ids = row_of("7 E 1 2 E E E 3")
    assert counting.places(ids, E).tolist() == [[0, 0, 1, 2, 0, 0, 0, 1]]
    assert counting.padding(ids, E).tolist() == [[False, False, False, False, True, True, False]]


def test_a_batch_knows_what_counts():
    rows = np.concatenate([row_of("E U 1 X A 2 X E E"), row_of("E 1 2 E 3 4 5 6 E")])
    batch = batch_of(rows, 2, Reading(E, MARKS, document_mask=True))
    assert batch.targets_BT.flatten()[batch.counted_N].tolist() == [12, END, 11, 12, E, 13, 14, 15, 16, E]
    assert (batch.counted, batch.tokens, batch.cursor) == (10, 15, 2)
    assert batch.place_BT.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0], [0, 1, 2, 0, 1, 2, 3, 4]]
    assert batch.padding_BT.sum() == 1 and batch.padding_BT[0, 7]
    whole = batch_of(rows, 2, Reading(E, None, document_mask=True))
    assert whole.counted == whole.tokens == 15
    plain = batch_of(rows, 2)
    assert (plain.counted, plain.tokens, plain.extras) == (16, 16, (None, None, None))


def test_only_answers_need_roles():
    tokenizer = train_tokenizer(["some text"], 300)
    assert Marks.of(tokenizer) == MARKS
    layout = json.loads(tokenizer.canonical)
    for token in [*layout["added_tokens"]]:
        if token["content"] == SPECIALS[3]:
            token["content"] = "<|other|>"
            layout["model"]["vocab"]["<|other|>"] = layout["model"]["vocab"].pop(SPECIALS[3])
    other = Tokenizer(json.dumps(layout))
    assert Reading.of(TrainConfig(), other) is None
    assert Reading.of(TrainConfig(document_mask=True), other) == Reading(E, None, document_mask=True)
    with pytest.raises(UserError, match=r"no token <\|assistant\|>"):
        Reading.of(TrainConfig(targets="answers"), other)
