"""Who may ask, and what; each line is something that went wrong in another server (docs/serve.md)."""

import asyncio
import hmac

import pytest

from khanhllm.serve.guard import LARGEST, Guard, is_loopback

OK = {"prompt": "a", "max_tokens": 1, "seed": 1}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:1234", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:8765", 200),
        ("[::1]:8000", 200),
        ("evil.example:8000", 403),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("192.168.1.5", 403),
        ("a/health?", 403),
        ("localhost/health?", 403),
        ("localhost:8000/health", 403),
        ("", 403),
    ],
)
def test_the_name_in_host(client, host, status):
    answer = client.get("/v1/models", headers={"host": host})
    assert answer.status_code == status and answer.json()


def test_two_hosts_are_none(client):
    assert client.get("/v1/models", headers=[("host", "localhost"), ("host", "localhost")]).status_code == 403


def test_names_that_are_allowed_and_addresses_where_others_reach_it(open_client):
    named = open_client(guard={"names": ["Box.Example"]})
    assert named.get("/v1/models", headers={"host": "box.example:80"}).status_code == 200
    literal = open_client(guard={"names": [], "literal": True})
    assert literal.get("/v1/models", headers={"host": "192.168.1.5:8000"}).status_code == 200
    assert literal.get("/v1/models", headers={"host": "evil.example"}).status_code == 403


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://localhost:8000", 200),
        ("http://localhost:9000", 403),
        ("https://localhost:8000", 403),
        ("http://evil.example", 403),
        ("null", 403),
        ("", 403),
        ("https://my.example", 200),
        ("https://my.example.evil.example", 403),
    ],
)
def test_pages_of_other_origins(open_client, origin, status):
    client = open_client(guard={"origins": ["https://my.example"]})
    answer = client.post("/v1/completions", json=OK, headers={} if origin is None else {"origin": origin})
    assert answer.status_code == status
    allowed = answer.headers.get("access-control-allow-origin")
    assert allowed == (origin if origin == "https://my.example" else None)
    assert "access-control-allow-credentials" not in answer.headers


def test_an_origin_that_was_typed_in_capitals_is_the_browser_s(open_client):
    client = open_client(guard={"origins": ["https://My.Example"]})
    assert client.post("/v1/completions", json=OK, headers={"origin": "https://my.example"}).status_code == 200


@pytest.mark.parametrize("begun", [False, True])
def test_a_request_that_the_end_of_the_server_cuts_off_is_told(begun, capsys):
    sent = []

    async def app(_scope, _receive, send):
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise asyncio.CancelledError

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": [(b"host", b"localhost")]}
    asyncio.run(Guard(app, [])(scope, None, send))
    first, last = sent
    assert first["status"] == (200 if begun else 503)
    assert b"the server has ended" in last["body"] and not last.get("more_body")
    assert f"/v1/models  {first['status']}" in capsys.readouterr().err


def test_a_browser_that_asks_first(open_client):
    client = open_client(guard={"origins": ["https://my.example"], "key": "k" * 16})
    asking = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    answer = client.options("/v1/completions", headers={"origin": "https://my.example", **asking})
    assert answer.status_code == 204 and "content-type" in answer.headers["access-control-allow-headers"]
    assert client.options("/v1/completions", headers={"origin": "https://evil.example", **asking}).status_code == 403


@pytest.mark.parametrize(
    ("asked", "granted"),
    [
        ("authorization,content-type,x-stainless-arch,x-stainless-retry-count", None),
        ("Content-Type, X-Any", None),
        ("content-type\tx, *", "authorization, content-type"),
        ("x\xff", "authorization, content-type"),
        ("", "authorization, content-type"),
    ],
)
def test_a_page_of_an_allowed_origin_may_send_the_headers_that_it_names(open_client, asked, granted):
    """As OpenAI's client in a browser does."""
    client = open_client(guard={"origins": ["https://my.example"]})
    headers = {"origin": "https://my.example", "access-control-request-headers": asked.encode("latin-1")}
    answer = client.options("/v1/completions", headers=headers)
    assert answer.headers["access-control-allow-headers"] == (granted or asked)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_a_body_that_a_page_may_send_unasked_is_not_read(client, kind):
    for path in ("/v1/completions", "/tokenize", "/nowhere"):
        headers = {"content-type": kind} if kind else {}
        assert client.post(path, content=b'{"prompt": "a"}', headers=headers).status_code == 415
    assert client.post("/tokenize", content=b'{"prompt": "a"}', headers={"content-type": "Application/JSON; x=y"})


def test_the_key(open_client, monkeypatch, capsys):
    key, compared = "correct-horse-battery", []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda *both: compared.append(both) or real(*both))
    client = open_client(guard={"key": key})

    def status(*headers):
        given = [("authorization", header) for header in headers]
        return client.get("/v1/models", headers=given).status_code

    assert status(f"Bearer {key}") == status(f"bearer {key}") == 200
    wrong = ["", "Bearer", "Bearer ", f"Bearer {key[:-1]}", f"Bearer {key}x", f"Basic {key}", key]
    for header in (*wrong, "Bearer k\xe9y".encode("latin-1")):
        assert status(header) == 401
    assert status() == 401 and status(f"Bearer {key}", f"Bearer {key}") == 401
    assert len(compared) == 2 + len(wrong) + 3
    assert all(len(one) == len(other) == 32 for one, other in compared)  # hashes of one length
    for path in ("/metrics", "/tokenizer_info", "/v1/models/modern", "/nowhere", "/health/", "/%2fhealth"):
        assert client.get(path).status_code == 401
    assert client.get("/health").status_code == 200
    assert key not in capsys.readouterr().err


def test_a_body_is_not_larger_than_a_mebibyte(client):
    large = b'{"prompt": "' + b"a" * LARGEST + b'"}'
    kind = {"content-type": "application/json"}
    assert client.post("/v1/completions", content=large, headers=kind).status_code == 413
    in_parts = (large[start : start + 2**16] for start in range(0, len(large), 2**16))
    assert client.post("/v1/completions", content=in_parts, headers=kind).status_code == 413


def test_nothing_in_the_address_acts(client):
    before = dict(client.server.engine.counts)
    for path in ("/?q=a", "/v1/completions?prompt=a", "/health?q=a"):
        client.get(path)
    assert client.server.engine.counts == before


def test_every_answer_says_how_browsers_must_take_it(client):
    answers = [client.get("/health"), client.get("/nowhere"), client.post("/v1/completions", json=OK)]
    for answer in [*answers, client.get("/health", headers={"host": "evil.example"})]:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_the_log_has_no_text_and_no_escapes(client, capsys):
    client.post("/v1/completions?q=geheim", json={**OK, "prompt": "geheim \x1b]0;x\x07", "stop": "geheim"})
    client.get("/%1b]0;owned%07")
    said = capsys.readouterr().err
    assert "POST /v1/completions  200" in said
    assert "geheim" not in said and "\x1b" not in said and "\x07" not in said


def test_which_hosts_others_reach():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.1.2.3", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.5", "box.example", "")))
