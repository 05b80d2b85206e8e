"""Conversations as ids: the one template for tuning, chat, server and export, and the packing of rows.

    <|endoftext|> <|system|>text <|user|>text <|assistant|>text<|end|> <|user|>text <|assistant|>text<|end|> ...

Only an answer has an end: everyone else's text is over when the next role begins, and the model need not learn to end
what it never writes. So a conversation up to a question, with <|assistant|> behind it, is a beginning of the whole
conversation, id for id. Each text is encoded by itself, and nothing in it becomes a special token.

What counts can be read off these ids (counting.py), so the rows need no mask of their own.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from khanhllm.data.chat import Message
from khanhllm.data.counting import Marks
from khanhllm.data.tokenizer import Tokenizer

AT_ONCE = 1000
"""conversations among which the packing looks for the best fit"""

TEMPLATE = (
    "{{ '<|endoftext|>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""`render` in Jinja, for transformers and others. Their tokenizers see special tokens in the text of a user too."""


def render(messages: Sequence[Message], tokenizer: Tokenizer, answer: bool = False) -> list[int]:
    """The ids of a conversation. answer: the assistant is to speak next."""
    marks = Marks.of(tokenizer)
    ids = [marks.end_of_text]
    for message in messages:
        ids += _turn(message, tokenizer, marks)
    return [*ids, marks.assistant] if answer else ids


def _turn(message: Message, tokenizer: Tokenizer, marks: Marks) -> list[int]:
    end = [marks.end] * (message.role == "assistant")
    return [getattr(marks, message.role), *tokenizer.encode(message.text), *end]


def fitting(messages: Sequence[Message], tokenizer: Tokenizer, room: int) -> list[Message]:
    """A conversation that ends with a question, without its oldest turns, as many as must go for it to fit into `room`
    tokens with the answer's beginning. The system message stays. Empty if the last question alone is too long.

    It counts from the end, so that a long history costs no more than what is kept of it."""
    head = [message for message in messages[:1] if message.role == "system"]
    kept, marks = list(messages[-1:]), Marks.of(tokenizer)
    size = len(render([*head, *kept], tokenizer, answer=True))
    if size > room:
        return []
    for at in range(len(messages) - 3, len(head) - 1, -2):
        pair = messages[at : at + 2]
        size += sum(len(_turn(message, tokenizer, marks)) for message in pair)
        if size > room:
            break
        kept[:0] = pair
    return [*head, *kept]


def cut(messages: Sequence[Message], tokenizer: Tokenizer, context: int) -> tuple[np.ndarray, bool]:
    """The ids of a conversation up to its last answer that fits into a row, none if there is no such; and whether an
    answer was lost."""
    marks = Marks.of(tokenizer)
    ids, fits, lost = [marks.end_of_text], 0, False
    for message in messages:
        if len(ids) <= context:  # else nothing that follows fits
            ids += _turn(message, tokenizer, marks)
        if message.role == "assistant":
            fits, lost = (len(ids), False) if len(ids) <= context else (fits, True)
    return np.array(ids[:fits], np.uint32), lost


def blocks(conversations: Iterable[np.ndarray], context: int, end_of_text: int) -> Iterator[np.ndarray]:
    """Pack whole conversations into blocks of exactly `context` ids, each padded with end-of-text.

    Best fit: among AT_ONCE conversations the longest goes first, each into the fullest block that has room for it.
    """
    rest = iter(conversations)
    while group := list(islice(rest, AT_ONCE)):
        inside: list[list[np.ndarray]] = []
        rooms: list[tuple[int, int]] = []
        """what is left of each block, and its number; sorted"""
        for ids in sorted(group, key=len, reverse=True):
            at = bisect_left(rooms, (len(ids), -1))
            room, number = rooms.pop(at) if at < len(rooms) else (context, len(inside))
            if number == len(inside):
                inside.append([])
            inside[number].append(ids)
            insort(rooms, (room - len(ids), number))
        for parts in inside:
            block = np.full(context, end_of_text, np.uint32)
            block[: sum(map(len, parts))] = np.concatenate(parts)
            yield block
