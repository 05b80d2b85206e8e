"""Conversations: the shapes in which files have them, and who may speak when.

The keys of a record show its shape, record by record:

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    {"instruction": "Add", "input": "2 and 3", "output": "5"}
    {"prompt": "2 + 3 =", "completion": "5"}
    {"question": "2 + 3?", "answer": "5"}

Each may have a "system" beside it. At most one system message comes first; then user and assistant take turns, the user
first. Whatever breaks this rule is refused by its place in the file: a model would learn it.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from khanhllm.errors import UserError

LISTS = ("messages", "conversations", "conversation")
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""what files call those who speak"""
TOOLS = {"tool", "function", "observation", "function_call", "tool_calls", "tools"}
NEXT = {"": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}
"""who may speak after whom"""
SHAPES = "messages, conversations, instruction and output, prompt and completion, or question and answer"


class NoConversation(UserError):
    """A record of another shape."""


class WrongConversation(UserError):
    """One that breaks a rule."""


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    """system, user or assistant"""
    text: str


def conversation(record: Any, where: str, column: str = "") -> list[Message]:
    """The conversation in a record of a file. column: the key of its list of messages, if that is none of the usual.

    Raises UserError, which begins with `where`, for what is none, and for what the rule of turns forbids.
    """
    if not isinstance(record, Mapping):
        raise NoConversation(f"{where} is no object with a conversation in it")
    if "chosen" in record and "rejected" in record:
        raise WrongConversation(f"{where} holds answers to choose from; khanhllm tune learns from answers alone")
    messages = list(_found(record, where, column))
    if record.get("label") is False:  # of a record without a conversation it says something else
        raise WrongConversation(f"{where} is marked as a bad answer (label: false), and khanhllm tune would learn it")
    if system := _text(record.get("system"), f"{where}, system"):
        messages.insert(0, Message("system", system))
    check_turns(messages, where)
    return messages


def _found(record: Mapping[str, Any], where: str, column: str) -> Iterator[Message]:
    name = next((name for name in ([column] if column else LISTS) if record.get(name) is not None), None)
    if name:
        yield from messages_of(record[name], where)
    elif column:
        raise NoConversation(f"{where} has no {column!r}; it has: {_named(record)}")
    elif "instruction" in record and "output" in record:
        history = record.get("history") or []
        for turn in history if isinstance(history, list | tuple) else [history]:
            if not isinstance(turn, list | tuple) or len(turn) != 2:
                raise WrongConversation(f"{where}: history must be a list of [question, answer]")
            yield from _pair(turn[0], turn[1], where)
        asked = [_text(record[key], where) for key in ("instruction", "input") if record.get(key)]
        yield from _pair("\n".join(filter(None, asked)), record["output"], where)
    else:
        keys = next((keys for keys in PAIRS if all(key in record for key in keys)), None)
        if not keys:
            raise NoConversation(f"{where} holds no conversation ({SHAPES}); it has: {_named(record)}")
        asked, answer = (record[key] for key in keys)
        if isinstance(asked, list) and isinstance(answer, list):  # TRL's form with roles
            yield from messages_of([*asked, *answer], where)
        else:
            yield from _pair(asked, answer, where)


def _named(record: Mapping[str, Any]) -> str:
    return ", ".join(" ".join(str(key).split())[:40] for key in list(record)[:10]) or "nothing"


def _pair(asked: Any, answer: Any, where: str) -> Iterator[Message]:
    yield Message("user", _text(asked, f"{where}, question"))
    yield Message("assistant", _text(answer, f"{where}, answer"))


def messages_of(turns: Any, where: str) -> Iterator[Message]:
    """The messages of a list of {"role", "content"} or {"from", "value"}. Raises UserError that names the message."""
    if not isinstance(turns, list | tuple):
        raise NoConversation(f"{where}: the messages must be a list, not {type(turns).__name__}")
    for number, turn in enumerate(turns, 1):
        place = f"{where}, message {number}"
        if not isinstance(turn, Mapping):
            raise WrongConversation(f"{place} is no object with a role and a content")
        said = turn.get("role") if turn.get("role") is not None else turn.get("from")
        if TOOLS & {key for key in turn if turn[key]} or (isinstance(said, str) and said in TOOLS):
            raise WrongConversation(f"{place} calls a tool or answers one, which KhanhLLM does not teach")
        if turn.get("weight") not in (None, 1, True):
            raise WrongConversation(
                f"{place} has a weight of its own, but all answers count alike; end the conversation before it"
            )
        if not isinstance(said, str) or said not in ROLES:
            raise WrongConversation(f"{place} is by {ascii(said)[:40]}; known are {', '.join(ROLES)}")
        yield Message(ROLES[said], _text(turn.get("content") if "content" in turn else turn.get("value"), place))


def _text(value: Any, where: str) -> str:
    """A text, or a list of parts of text as OpenAI's API has it. UserError for images and other things."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        parts = [part if isinstance(part, Mapping) else {} for part in value]
        if not all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
            raise WrongConversation(
                f"{where} holds something else than text, such as an image; KhanhLLM reads text alone"
            )
        return "".join(part["text"] for part in parts)
    if not isinstance(value, str):
        raise WrongConversation(f"{where} must be text, not {type(value).__name__}")
    return value


def check_turns(messages: list[Message], where: str) -> None:
    """Raise UserError, naming the message, unless each follows one after which it may come and says something."""
    roles = ["", *(message.role for message in messages)]
    for number, (before, role) in enumerate(pairwise(roles), 1):
        if role not in NEXT[before]:
            after = f"after one by {before}" if before else "at the beginning"
            may = " or ".join(NEXT[before])
            raise WrongConversation(
                f"{where}, message {number} is by {role}, but {after} comes {may}; turns must alternate"
            )
        if not messages[number - 1].text.strip():
            raise WrongConversation(f"{where}, message {number}, by {role}, is empty")


def question(turns: Any, where: str) -> list[Message]:
    """A conversation as `messages_of` reads it that waits for an answer. Raises UserError for any other."""
    messages = list(messages_of(turns, where))
    check_turns(messages, where)
    if not messages or messages[-1].role != "user":
        raise WrongConversation(f"{where} must end with a question, by the user")
    return messages


def to_json(messages: list[Message]) -> str:
    """A conversation as one line of ASCII, always the same: its hash decides on which side of the split it goes."""
    return json.dumps([list(message) for message in messages])


def from_json(text: str) -> list[Message]:
    return [Message(*message) for message in json.loads(text)]
