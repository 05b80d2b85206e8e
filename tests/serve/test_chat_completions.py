"""/v1/chat/completions of a run that was taught to talk, as clients of OpenAI read it."""

import json
from dataclasses import replace

import pytest
from starlette.testclient import TestClient

from conftest import house
from khanhllm.data.chat import Message
from khanhllm.data.render import render
from khanhllm.inference.generate import answer
from khanhllm.schema import Sampling

PATH = "/v1/chat/completions"
ASKED = [{"role": "user", "content": "import"}]


@pytest.fixture(scope="module")
def talker(served):
    train = served.config.train.model_copy(update={"targets": "answers"})
    return replace(served, config=served.config.model_copy(update={"train": train}))


@pytest.fixture(scope="module")
def chat(talker):
    served = house(talker)
    with TestClient(served.guarded(), base_url="http://localhost:8000") as client:
        client.server = served.server
        yield client


def post(client, messages=ASKED, **body):
    return client.post(PATH, json={"messages": messages, "seed": 1, "max_tokens": 6, "temperature": 0, **body})


def expected(run, messages, **sampling):
    turns = [Message(one["role"], one["content"]) for one in messages]
    ids = render(turns, run.tokenizer, answer=True)
    return "".join(answer(run.model, run.tokenizer, run.machine, ids, Sampling(temperature=0, **sampling)))


def test_an_answer_is_that_of_the_run(chat, talker):
    """Served and trained on in one form."""
    messages = [{"role": "system", "content": "Code."}, *ASKED]
    found = post(chat, messages).json()
    assert found["object"] == "chat.completion" and found["id"].startswith("chatcmpl-")
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected(talker, messages, tokens=6)}
    assert choice["finish_reason"] in ("stop", "length") and choice["logprobs"] is None
    turns = [Message(one["role"], one["content"]) for one in messages]
    assert found["usage"]["prompt_tokens"] == len(render(turns, talker.tokenizer, answer=True))
    assert talker.chat(messages, tokens=6, temperature=0) == choice["message"]["content"]


def test_a_stream_says_who_speaks_and_then_what(chat, talker):
    answer = post(chat, stream=True, n=2, stream_options={"include_usage": True})
    *blocks, end, rest = answer.text.split("\n\n")
    assert end == "data: [DONE]" and rest == ""
    found = [json.loads(block.removeprefix("data: ")) for block in blocks]
    assert {one["object"] for one in found} == {"chat.completion.chunk"}
    assert [one["choices"][0]["delta"] for one in found[:2]] == [{"role": "assistant", "content": ""}] * 2
    for index in (0, 1):
        parts = [one["choices"][0] for one in found[:-1] if one["choices"][0]["index"] == index]
        assert "".join(part["delta"].get("content", "") for part in parts) == expected(talker, ASKED, tokens=6)
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] in ("stop", "length")
    assert found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] > 0


def test_an_answer_ends_with_any_special_token(chat, talker, monkeypatch):
    """No role token ever stands in an answer; the one that ends it is the reason to stop."""
    end = talker.tokenizer.specials["<|end|>"]
    monkeypatch.setattr("khanhllm.inference.engine.choose", lambda *_: end)
    (choice,) = post(chat).json()["choices"]
    assert choice["message"]["content"] == "" and choice["finish_reason"] == "stop"


def test_a_conversation_goes_on_where_it_ended(chat):
    """The next turn begins with what a row of the engine has read."""
    said = post(chat).json()["choices"][0]["message"]["content"] or "x"
    before = chat.server.engine.counts["reused"]
    post(chat, [*ASKED, {"role": "assistant", "content": said}, {"role": "user", "content": "def"}])
    assert chat.server.engine.counts["reused"] > before


REFUSED = [
    ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "turns must alternate"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "end with a question"),
    ({"messages": [{"role": "system", "content": "a"}]}, "end with a question"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "message 1 is by 'robot'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "such as an image"),
    ({"messages": [{"role": "user"}]}, "is empty"),
    ({"messages": ASKED, "tools": [{"type": "function"}]}, "tools: KhanhLLM cannot do this yet"),
    ({"messages": ASKED, "response_format": {"type": "json_object"}}, "response_format: KhanhLLM cannot do this yet"),
    ({"messages": ASKED, "n": 100}, "more texts than this server holds"),  # to come later would not help
    ({"messages": ASKED, "logprobs": True}, "logprobs: KhanhLLM cannot do this yet"),
    ({"messages": []}, "messages: must have at least 1 items (got '[]')"),
    ({"messages": ASKED * 1001}, "messages: must have at most 1,000 items"),
    ({"messages": "Hi"}, "messages: must be a list (got 'Hi')"),
    ({"messages": [7]}, "messages.0: must be an object (got '7')"),
    ({"messages": ASKED, "stop": ""}, "stop: must have at least 1 characters, or a list (got '')"),
    ({"messages": ASKED, "stop": [""]}, "stop: must be text, or must have at least 1 characters"),
    ({"messages": [{"role": "user", "content": "word " * 5000}]}, "the model sees"),
]


@pytest.mark.parametrize(("body", "why"), REFUSED)
def test_what_cannot_be_answered_is_refused(chat, body, why):
    answer = chat.post(PATH, json=body)
    assert answer.status_code == 400 and why in answer.json()["error"]["message"]


@pytest.mark.parametrize("tokens", [None, 10**9])
def test_the_most_is_all_the_room_there_is(chat, talker, tokens):
    found = post(chat, max_tokens=tokens).json()
    assert found["usage"]["total_tokens"] <= talker.config.model.context + 1


def test_a_run_that_was_not_taught_says_so(client):
    answer = client.post(PATH, json={"messages": ASKED})
    assert answer.status_code == 400 and "not taught to talk" in answer.json()["error"]["message"]


def test_openais_own_client_reads_it(chat, talker):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url="http://localhost:8000/v1", api_key="none", http_client=chat)
    asked = {"model": "*", "messages": ASKED, "max_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == expected(talker, ASKED, tokens=6)
    assert whole.usage.completion_tokens == 6 or whole.choices[0].finish_reason == "stop"
    parts = list(client.chat.completions.create(**asked, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="turns must alternate"):
        client.chat.completions.create(model="*", messages=[*ASKED, *ASKED])
