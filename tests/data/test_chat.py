"""Conversations are recognised by their shape, record by record, and refused by their place (docs/chat.md)."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from khanhllm.data.chat import Message, conversation, from_json, to_json
from khanhllm.data.readers import Reader, holds_conversations
from khanhllm.data.sources import locate
from khanhllm.errors import UserError

ASKED, SAID = Message("user", "Hi"), Message("assistant", "Hello")
SYSTEM = Message("system", "Be short.")
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]

SHAPES = [
    ({"messages": TURNS}, [ASKED, SAID]),
    ({"messages": [{"role": "developer", "content": "Be short."}, *TURNS]}, [SYSTEM, ASKED, SAID]),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, [ASKED, SAID]),
    ({"conversations": TURNS, "system": "Be short."}, [SYSTEM, ASKED, SAID]),
    ({"instruction": "Add", "input": "2 3", "output": "5"}, [Message("user", "Add\n2 3"), Message("assistant", "5")]),
    ({"instruction": "Hi", "input": "", "output": "Hello", "history": [["Hi", "Hello"]]}, [ASKED, SAID, ASKED, SAID]),
    ({"prompt": "Hi", "completion": "Hello"}, [ASKED, SAID]),
    ({"prompt": TURNS[:1], "completion": TURNS[1:]}, [ASKED, SAID]),
    ({"question": "Hi", "answer": "Hello", "id": 7}, [ASKED, SAID]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, TURNS[1]]}, [ASKED, SAID]),
    ({"messages": [TURNS[0], {**TURNS[1], "weight": 1, "tool_calls": None}]}, [ASKED, SAID]),
]


@pytest.mark.parametrize(("record", "expected"), SHAPES)
def test_each_shape_becomes_messages(record, expected):
    assert conversation(record, "here") == expected
    assert from_json(to_json(expected)) == expected


def turns(*roles):
    return {"messages": [{"role": role, "content": "text"} for role in roles]}


REFUSED = [
    (turns("assistant"), "message 1 is by assistant, but at the beginning comes system or user"),
    (turns("user", "user"), "message 2 is by user, but after one by user comes assistant"),
    (turns("user", "assistant", "assistant"), "message 3 is by assistant"),
    (turns("user", "system", "assistant"), "message 2 is by system"),
    (turns("system", "system", "user"), "message 2 is by system"),
    (turns("user", "narrator"), "message 2 is by 'narrator'; known are system, developer, user"),
    (turns("user", "tool"), "message 2 calls a tool or answers one"),
    ({"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "calls a tool"),
    ({"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}, "message 2 has a weight of its own"),
    ({"messages": [TURNS[0], {"role": "assistant", "content": " "}]}, "message 2, by assistant, is empty"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "such as an image"),
    ({"messages": [{"role": "user", "content": 7}]}, "must be text, not int"),
    ({"instruction": "Hi", "output": "Hello", "history": 5}, "history must be a list of"),
    ({"messages": "Hi"}, "the messages must be a list, not str"),
    ({"messages": ["Hi"]}, "message 1 is no object"),
    ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "answers to choose from"),
    ({"prompt": "Hi", "completion": "Bye", "label": False}, "marked as a bad answer"),
    ({"text": "Hi"}, "holds no conversation (messages, conversations, instruction and output"),
    ([1], "is no object with a conversation"),
]


@pytest.mark.parametrize(("record", "why"), REFUSED)
def test_what_breaks_the_rule_is_refused_by_its_place(record, why):
    """Roles that do not alternate, an assistant first, unknown roles; and tools, images, weights."""
    with pytest.raises(UserError, match=r"^chats\.jsonl, line 3") as refused:
        conversation(record, "chats.jsonl, line 3")
    assert why in str(refused.value) and "\n" not in str(refused.value)


def read(source, bad="refuse"):
    reader = Reader(replace(locate(str(source), bad), laid_for=64), [])
    found = [from_json(document.text) for name in reader.source.files for document in reader.read_file(name)]
    return found, dict(reader.skipped)


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_lines_may_have_different_shapes(tmp_path):
    chats = write_lines(tmp_path / "chats.jsonl", *(record for record, _ in SHAPES))
    assert read(chats)[0] == [expected for _, expected in SHAPES]


def test_parquet_and_json_hold_the_same_conversations(tmp_path):
    pq.write_table(pa.table({"messages": [TURNS, TURNS], "id": [1, 2]}), tmp_path / "chats.parquet")
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": "Hi", "input": "", "output": "Hello"}]), "utf-8")
    assert read(tmp_path / "chats.parquet")[0] == [[ASKED, SAID]] * 2
    assert read(tmp_path / "alpaca.json")[0] == [[ASKED, SAID]]


def test_a_column_names_the_list_of_messages(tmp_path):
    chats = write_lines(tmp_path / "chats.jsonl", {"talk": TURNS, "messages": "other"})
    assert read(f"{chats}#talk")[0] == [[ASKED, SAID]]
    with pytest.raises(UserError, match=r"line 1 has no 'speech'; it has: talk, messages"):
        read(f"{chats}#speech")


def test_a_bad_conversation_ends_it_or_is_skipped_alone(tmp_path):
    chats = write_lines(tmp_path / "chats.jsonl", {"messages": TURNS}, turns("assistant"), {"messages": TURNS})
    with pytest.raises(UserError, match=r"chats\.jsonl, line 2, message 1 is by assistant"):
        read(chats)
    assert read(chats, bad="skip") == ([[ASKED, SAID]] * 2, {"conversation": 1})


def test_an_empty_file_decides_nothing(tmp_path):
    write_lines(tmp_path / "chats.jsonl", {"messages": TURNS})
    for number in range(9):  # whichever comes first
        write_lines(tmp_path / f"{number}.jsonl")
    assert holds_conversations(locate(str(tmp_path)))
    assert not holds_conversations(locate(f"{tmp_path}/[0-9].jsonl"))
