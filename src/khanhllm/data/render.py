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
    for role, text in messages:
        ids += [getattr(marks, role), *tokenizer.encode(text)]
        ids += [marks.end] * (role == "assistant")
    return [*ids, marks.assistant] if answer else ids


def fitting(messages: Sequence[Message], tokenizer: Tokenizer, room: int) -> list[Message]:
    """The conversation without its oldest turns, as many as must go for it to fit into `room` tokens with the answer's
    beginning. The system message stays. Empty if the last question alone is too long."""
    head = [message for message in messages[:1] if message.role == "system"]
    turns = list(messages[len(head) :])
    while turns and len(render([*head, *turns], tokenizer, answer=True)) > room:
        turns = turns[2:]
    return [*head, *turns] if turns else []


def cut(messages: Sequence[Message], tokenizer: Tokenizer, context: int) -> tuple[np.ndarray, bool]:
    """The ids of a conversation up to its last answer that fits into a row, none if there is no such; and whether an
    answer was lost."""
    ends = [nth + 1 for nth, message in enumerate(messages) if message.role == "assistant"]
    for kept in reversed(ends):
        ids = render(messages[:kept], tokenizer)
        if len(ids) <= context:
            return np.array(ids, np.uint32), kept < ends[-1]
    return np.empty(0, np.uint32), bool(ends)


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
