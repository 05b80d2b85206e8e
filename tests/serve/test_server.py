"""What clients of OpenAI's API send is answered as they expect it."""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from khanhllm.inference import engine as engine_module
from khanhllm.serve import writing as writing_module

PROMPT = "def main("


def post(client, path="/v1/completions", **body):
    return client.post(path, json=body)


def complete(client, **body):
    answer = post(client, **{"seed": 1, "max_tokens": 6, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(answer):
    assert answer.headers["content-type"] == "text/event-stream"
    blocks = answer.text.split("\n\n")
    assert blocks.pop() == "" and all(block.startswith("data: ") for block in blocks)
    found = [block.removeprefix("data: ") for block in blocks]
    assert found.pop() == "[DONE]"
    return [json.loads(one) for one in found]


def test_one_row_writes_the_text_of_generate(open_client, served):
    client = open_client(rows=1)
    for seed, prompt in enumerate(["", PROMPT, "import os\n"]):
        answer = complete(client, prompt=prompt, seed=seed, max_tokens=12)
        assert [choice["text"] for choice in answer["choices"]] == served.generate(prompt, tokens=12, seed=seed)
    stopped = complete(client, prompt=PROMPT, stop=["e"], temperature=1.5, max_tokens=20)
    assert stopped["choices"][0]["text"] == "".join(served.stream(PROMPT, ["e"], seed=1, temperature=1.5, tokens=20))


def test_an_answer_has_what_clients_read(client, served):
    answer = complete(client, prompt=PROMPT, n=2)
    assert answer["object"] == "text_completion" and answer["model"] == "modern" and answer["id"].startswith("cmpl-")
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert all(choice["finish_reason"] == "length" and choice["logprobs"] is None for choice in answer["choices"])
    tokens = len(served.tokenizer.encode(PROMPT))
    assert answer["usage"] == {"prompt_tokens": tokens, "completion_tokens": 12, "total_tokens": tokens + 12}
    assert [choice["text"] for choice in answer["choices"]] == served.generate(PROMPT, n=2, tokens=6, seed=1)


def test_prompts_are_texts_and_ids_and_lists_of_them(client, served):
    ids = [served.tokenizer.encode(text) for text in (PROMPT, "import")]
    texts = complete(client, prompt=[PROMPT, "import"])["choices"]
    assert [choice["text"] for choice in texts] == [served.generate(t, tokens=6, seed=1)[0] for t in (PROMPT, "import")]
    assert complete(client, prompt=ids)["choices"] == texts
    assert complete(client, prompt=ids[0])["choices"] == texts[:1]
    with_end = [served.tokenizer.end_of_text, *ids[0]]
    assert complete(client, prompt=with_end)["choices"] == texts[:1]


def test_without_a_seed_each_answer_is_another(client):
    texts = {complete(client, prompt=PROMPT, seed=None, temperature=2)["choices"][0]["text"] for _ in range(4)}
    assert len(texts) > 1


@pytest.mark.parametrize("explicit", [False, True])
def test_echoed_logprobs_are_those_of_the_text(client, served, explicit):
    """The end-of-text that KhanhLLM puts before a text conditions it, but is no part of the echo."""
    end, ids = served.tokenizer.end_of_text, served.tokenizer.encode(PROMPT)
    prompt = [end, *ids] if explicit else PROMPT
    answer = complete(client, prompt=prompt, echo=True, logprobs=2, max_tokens=1, temperature=0)
    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    shown = [end] * explicit + ids
    assert logprobs["tokens"][:-1] == [served.tokenizer.decode([token]) for token in shown]
    assert choice["text"].startswith("<|endoftext|>" * explicit + PROMPT)
    assert answer["usage"]["prompt_tokens"] == len(shown)
    with torch.no_grad():
        logits_TV = served.model.logits(torch.tensor([[end, *ids]]))[0]
    logprob_TV = logits_TV[:, : served.tokenizer.vocab_size].log_softmax(-1)
    expected = [float(logprob_V[token]) for logprob_V, token in zip(logprob_TV, ids, strict=False)]
    given = logprobs["token_logprobs"]
    assert given[:explicit] == [None] * explicit and logprobs["top_logprobs"][:explicit] == [None] * explicit
    assert given[explicit:-1] == pytest.approx(expected, abs=1e-4)
    assert given[-1] == pytest.approx(float(logprob_TV[-1].max()), abs=1e-4)
    for token, logprob, top in zip(logprobs["tokens"], given, logprobs["top_logprobs"], strict=True):
        assert top is None or (top[token] == logprob and 2 <= len(top) <= 3)
    assert logprobs["text_offset"][0] == 0 and logprobs["text_offset"] == sorted(logprobs["text_offset"])
    assert (
        complete(client, prompt=prompt, echo=True, max_tokens=0)["choices"][0]["text"]
        == choice["text"][: len("<|endoftext|>" * explicit + PROMPT)]
    )
    scored = complete(client, prompt=prompt, echo=True, logprobs=2, max_tokens=0)["choices"][0]
    assert scored["logprobs"]["token_logprobs"] == pytest.approx(given[:-1], abs=1e-5)
    assert scored["finish_reason"] == "length"


def test_null_counts_as_not_given_inside_too(client):
    assert complete(client, prompt=PROMPT, stream_options={"include_usage": None}, khanhllm={"off": None}, seed=1)


@pytest.mark.parametrize("body", [{}, {"logprobs": 1}, {"echo": True, "logprobs": 0}, {"stop": "e"}, {"n": 3}])
def test_a_stream_adds_up_to_the_answer(client, body):
    whole = complete(client, prompt=PROMPT, temperature=2, max_tokens=16, **body)
    asked = {"stream": True, "stream_options": {"include_usage": True}, "seed": 1, "max_tokens": 16, "temperature": 2}
    *chunks, last = events(post(client, prompt=PROMPT, **asked, **body))
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    for choice in whole["choices"]:
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        for key, values in (choice["logprobs"] or {}).items():
            streamed = [value for part in parts for value in part["logprobs"][key]]
            if key == "token_logprobs":
                streamed, values = (pytest.approx(streamed, abs=1e-4), values)
            if key != "top_logprobs":
                assert streamed == values


def test_the_end_of_the_document_ends_an_answer_but_is_not_in_it(client, served, monkeypatch):
    end, drawn = served.tokenizer.end_of_text, iter([*served.tokenizer.encode("ab"), served.tokenizer.end_of_text])
    monkeypatch.setattr(engine_module, "choose", lambda *_: next(drawn))
    answer = complete(client, prompt=PROMPT, logprobs=1)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "stop")
    assert choice["logprobs"]["tokens"][-1] == served.tokenizer.decode([end])


def test_special_tokens_in_a_text_stay_text(client, served):
    tokens = post(client, "/tokenize", prompt="a<|endoftext|>").json()["tokens"]
    assert tokens == served.tokenizer.encode("a<|endoftext|>") and served.tokenizer.end_of_text not in tokens
    assert post(client, "/detokenize", tokens=tokens).json() == {"prompt": "a<|endoftext|>"}


def test_the_endpoints_that_lm_eval_asks_about_the_tokenizer(client, served):
    info = client.get("/tokenizer_info").json()
    assert post(client, "/tokenize", prompt=info["eos_token"]).json()["tokens"] == [served.tokenizer.end_of_text]
    begun = post(client, "/tokenize", prompt="a", add_special_tokens=True).json()
    assert begun["tokens"] == [served.tokenizer.end_of_text, *served.tokenizer.encode("a")] and begun["count"] == 2


def test_the_model_has_one_name(client):
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "modern" and card["max_model_len"] == 32 and card["object"] == "model"
    assert client.get("/v1/models/modern").json() == card
    for name in ("", "*", "modern", None):
        complete(client, model=name, prompt="a")
    for answer in (post(client, model="gpt-4", prompt="a"), client.get("/v1/models/gpt-4")):
        assert answer.status_code == 404 and "modern" in answer.json()["error"]["message"]


def test_a_base_run_says_that_it_cannot_talk(client):
    answer = post(client, "/v1/chat/completions", messages=[{"role": "user", "content": "Hello"}])
    assert answer.status_code == 400 and "not taught to talk" in answer.json()["error"]["message"]


def test_a_prompt_may_fill_the_context_and_not_more(client):
    full = complete(client, prompt=[1] * 31, max_tokens=1000)
    assert full["usage"]["completion_tokens"] == 1 and full["choices"][0]["finish_reason"] == "length"
    answer = post(client, prompt=[1] * 32)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


def test_closed_experts_change_the_answer_of_that_request_alone(client):
    plain = complete(client, prompt=PROMPT, temperature=0, max_tokens=12)["choices"]
    off = {"off": [[1, expert] for expert in range(4)]}
    assert complete(client, prompt=PROMPT, temperature=0, max_tokens=12, khanhllm=off)["choices"] != plain
    assert complete(client, prompt=PROMPT, temperature=0, max_tokens=12)["choices"] == plain


WRONG = [
    b"{",
    b"[]",
    b'"text"',
    b'{"prompt": NaN}',
    b'{"whatever": NaN}',
    b'{"temperature": 1e400}',
    b'{"seed": ' + b"9" * 5000 + b"}",
    b"[" * 10_000,
    b"\xff",
    *(
        json.dumps(body).encode()
        for body in (
            {"prompt": 5},
            {"prompt": []},
            {"prompt": [-1]},
            {"prompt": [10**9]},
            {"prompt": [True]},
            {"prompt": [1.5]},
            {"prompt": ["a", [1]] * 33},
            {"prompt": [["a"]]},
            {"prompt": {}},
            {"max_tokens": -1},
            {"max_tokens": "5"},
            {"max_tokens": True},
            {"n": 0},
            {"n": 10**6},
            {"n": 128},
            {"logprobs": 21},
            {"temperature": -1},
            {"top_p": 0},
            {"stop": ""},
            {"stop": ["a"] * 17},
            {"stop": "a" * 201},
            {"stop": [1]},
            {"stream": 1},
            {"best_of": 3},
            {"suffix": "x"},
            {"logit_bias": {"1": 5}},
            {"presence_penalty": 0.5},
            {"khanhllm": {"off": [[0, 1]]}},
            {"khanhllm": {"off": [[1, 4]]}},
            {"khanhllm": {"off": [[1]]}},
            {"model": "\ud800"},
            {"stop": "\ud800"},
        )
    ),
]


@pytest.mark.parametrize("raw", WRONG, ids=lambda raw: ascii(raw[:40]))
def test_a_wrong_body_is_refused_in_one_line(client, raw):
    answer = client.post("/v1/completions", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"] and error["message"].isprintable() and error["message"].isascii()
    assert error["type"] == "invalid_request_error"


def test_a_number_that_python_will_not_read_is_said_to_be_too_long(client):
    body = b'{"prompt": "a", "whatever": [-' + b"9" * 5000 + b"]}"
    answer = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "a number in the body is too long")


def test_half_a_character_and_duplicate_keys_are_taken(client):
    raw = b'{"max_tokens": 3, "prompt": "\\ud800", "prompt": "a\\udfffb", "echo": true, "whatever": "\\ud800"}'
    answer = client.post("/v1/completions", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 200 and answer.json()["choices"][0]["text"].startswith("a\ufffdb")


KEYS = ["prompt", "max_tokens", "n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stream", "logprobs"]
KEYS += ["echo", "model", "stream_options", "khanhllm", "best_of", "suffix", "messages", "tokens", "whatever"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.integers(0, 40),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["off", "include_usage", "x"]), inner),
    max_leaves=8,
)
PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]


@given(st.sampled_from(PATHS), st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_body_gets_an_answer_in_json_and_the_engine_lives(client, path, body):
    raw = json.dumps(body).encode()
    answer = client.post(path, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404, 429), answer.text
    if answer.headers["content-type"] == "text/event-stream":
        events(answer)
    else:
        json.loads(answer.text, parse_constant=lambda name: pytest.fail(name))
    assert client.get("/health").status_code == 200 and client.server.engine.fault is None


def test_metrics_are_in_the_form_of_prometheus(client):
    complete(client, prompt=PROMPT)
    lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("# TYPE ")]
    numbers = {name: float(number) for name, number in (line.rsplit(" ", 1) for line in lines)}
    assert numbers["khanhllm_tokens_written_total"] >= 6 and all(map(math.isfinite, numbers.values()))
    assert numbers['khanhllm_answers_total{status="200"}'] >= 1


def test_unknown_paths_and_methods_are_refused_in_json(client):
    paths = ["/", "/v1", "/v1/completions/", "/../etc/passwd", "/%2e%2e/x", "//", "/v1/%00", "/config.toml"]
    for path in paths:
        assert client.get(path).status_code == 404 and "error" in client.get(path).json()
    reading, writing = client.delete("/v1/models"), client.get("/v1/completions")
    for answer, method in ((reading, "GET"), (writing, "POST")):
        assert answer.status_code == 405 and method in answer.headers["allow"].split(", ")
        assert f"send this as {method};" in answer.json()["error"]["message"]


def test_more_than_may_wait_are_told_to_come_later(open_client):
    client = open_client(rows=1, waiting=2)
    engine = client.server.engine
    engine.submit = lambda *_: (_ for _ in ()).throw(engine_module.Full())
    answer = post(client, prompt="a")
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"


def test_an_engine_that_dies_is_heard(open_client):
    deaths = []
    client = open_client(rows=2)
    client.house.died = lambda: deaths.append(1)
    client.server.engine._write = lambda _rows: 1 / 0
    first = post(client, prompt="a", seed=1)  # its first token, which comes from reading the prompt, does not end it
    assert first.status_code == 500 and "engine" in first.json()["error"]["message"]
    assert post(client, prompt="a").status_code == 503
    assert client.get("/health").status_code == 503
    assert deaths == [1]


def test_an_engine_that_dies_ends_a_stream_with_an_error(open_client):
    client = open_client(rows=2)
    client.server.engine._write = lambda _rows: 1 / 0
    answer = post(client, prompt=PROMPT, seed=1, stream=True)  # the first token comes from reading the prompt
    assert '"error"' in answer.text.split("\n\n")[-2] and "[DONE]" not in answer.text


def test_a_stream_that_is_cut_since_nobody_reads_it_ends_with_an_error(client, monkeypatch):
    whole = complete(client, prompt=PROMPT, n=2)
    monkeypatch.setattr(writing_module, "STALLED", -1)
    answer = post(client, prompt=PROMPT, temperature=0, stream=True)
    assert '"error"' in answer.text and "did not read it" in answer.text
    assert '"finish_reason":"stop"' not in answer.text and "[DONE]" not in answer.text
    assert complete(client, prompt=PROMPT, n=2)["choices"] == whole["choices"]  # the server itself reads it


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_a_prompt_that_takes_long_to_encode_holds_nobody_up(client, monkeypatch, path):
    begun, gate, encode = threading.Event(), threading.Event(), client.server.tokenizer.encode

    def slow(text):
        begun.set()
        assert gate.wait(60)
        return encode(text)

    monkeypatch.setattr(client.server.tokenizer, "encode", slow)
    with ThreadPoolExecutor() as pool:
        long = pool.submit(post, client, path, prompt=PROMPT)
        assert begun.wait(60)
        assert client.get("/health").status_code == 200 and not long.done()
        gate.set()
        assert long.result(60).status_code == 200


def test_what_nobody_foresaw_is_one_line(open_client, capsys):
    client = open_client()
    client.server.tokenizer = None
    client.raise_server_exceptions = False
    answer = post(client, "/tokenize", prompt="secret")
    assert answer.status_code == 500 and "error" in answer.json()
    said = capsys.readouterr().err
    assert "AttributeError at" in said and "secret" not in said and "Traceback" not in said
