"""The page's files and what they ask: data of a run, behind the same guard, and never a file of its folder."""

import gzip
import json
import os
import re
import shutil
import signal
import threading
import time
import urllib.request
import webbrowser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from khanhllm.cli import main
from khanhllm.errors import UserError
from khanhllm.lab import experts as lab
from khanhllm.lab.sample import take
from khanhllm.runs.run import open_run
from khanhllm.schema import MachineConfig
from khanhllm.serve import house as house_module
from khanhllm.serve.findings import findings
from khanhllm.serve.house import House, page_files
from khanhllm.serve.server import Server
from khanhllm.training import checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "modern"
LOG = "step,tokens,loss,val_ce\n1,64,5.5,\n2,128,5.25,4.5\n"
TINY = MachineConfig(device="cpu", threads=1)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(GOLDEN, folder)
    (folder / "training_log.csv").write_text(LOG)
    (folder / "experts.csv").write_text("step,layer,share_0,share_1\n2,1,0.25,0.75\n")
    (folder / "messages.txt").write_text("2026-01-01 00:00:00  <b>hello</b>\n")
    (folder / "samples.txt").write_text("--- step 2\nonce\n")
    return folder


def load(run):
    return Server(open_run(run, TINY), run.name, rows=2)


@pytest.fixture
def visit(run):
    """A client of a house of this run and others; it works as a context manager."""

    def visiting(*others, server=True, guard=None, **settings):
        house = House([run, *others], lambda: load(run), load(run) if server else None, **settings)
        client = TestClient(house.guarded(**(guard or {})), base_url="http://localhost:8000")
        client.house = house
        return client

    return visiting


def test_the_page_needs_nothing_from_elsewhere_and_is_small():
    files = page_files()
    assert {"/", "/page.css", "/app.js"} <= files.keys()
    assert sum(len(gzip.compress(content)) for content, _ in files.values()) < 60_000
    for path, (content, _kind) in files.items():
        text = content.decode()
        assert set(re.findall(r"https?://[^\s\"')]+", text)) <= {"http://www.w3.org/2000/svg"}, (
            path
        )  # a name, no address
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text), (
            path
        )
        assert not re.search(r"localStorage|sessionStorage|document\.cookie|indexedDB", text), path
        if path.endswith(".js"):
            assert len(text.splitlines()) < 200, path


def test_files_of_the_page_come_with_their_policy_and_nothing_else_does(visit, run):
    (run / "secret.txt").write_text("secret")
    with visit() as client:
        for path in page_files():
            answer = client.get(path)
            assert answer.status_code == 200 and answer.headers.get_list("content-security-policy") == [
                house_module.POLICY
            ]
            assert answer.headers["x-content-type-options"] == "nosniff"
        for path in (
            "/secret.txt",
            "/config.toml",
            "/api/../config.toml",
            "/%2e%2e/config.toml",
            "/page/app.js",
            "/api/",
        ):
            answer = client.get(path)
            assert answer.status_code == 404 and "secret" not in answer.text
        assert client.get("/v1/models").json()["data"][0]["id"] == "mine"
        assert client.get("/health").json() == {"status": "ok"}


def test_what_the_page_asks(visit, run):
    with visit() as client:
        model = client.get("/api/model").json()
        assert (
            model["name"] == "mine" and model["layers"] and model["step"] == model["newest"] and not model["waits_for"]
        )
        log = client.get("/api/log").json()
        assert log["curves"]["0"]["loss"] == {"mean": [5.5, 5.25], "least": [5.5, 5.25], "most": [5.5, 5.25]}
        assert log["curves"]["0"]["val_ce"] == {"mean": [None, 4.5]}
        version = log["version"]
        assert client.get(f"/api/log?version={version}").json() == {"version": version}
        assert client.get("/api/loads").json()["curves"]["1"]["share_1"] == {"mean": [0.75]}
        texts = client.get("/api/texts").json()
        assert texts["messages"].endswith("<b>hello</b>\n") and texts["samples"] == "--- step 2\nonce\n"
        assert client.get("/api/experts").json() == {"findings": None, "current": False}
        for bad in ("1", "-1", "x", "../mine", "0" * 10_000):
            assert client.get(f"/api/log?run={bad}").status_code == 400
        assert client.post("/api/log", json={}).status_code == 405


def test_a_run_that_is_resumed_for_longer_says_so(visit, run):
    kept = run / "config.toml"
    text = kept.read_text(encoding="utf-8")
    with visit() as client:
        assert client.get("/api/model").json()["steps"] == 10
        kept.write_text(text.replace("\nsteps = 10\n", "\nsteps = 20\n"), encoding="utf-8")
        assert client.get("/api/model").json()["steps"] == 20
        kept.unlink()
        assert client.get("/api/model").json()["steps"] == 20


def test_several_runs_show_their_logs(visit, run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "training_log.csv").write_text("step,loss\n7,1\n")
    with visit(other) as client:
        assert client.get("/api/model").json()["runs"] == ["mine", "other"]
        assert client.get("/api/log?run=1").json()["last"]["0"] == {"step": 7, "loss": 1}


def test_all_of_it_is_guarded_but_the_files_need_no_key(visit):
    with visit(guard={"key": "k" * 16}) as client:
        assert client.get("/").status_code == 200 and client.get("/app.js").status_code == 200
        for path in ("/api/model", "/api/log", "/api/texts", "/api/experts", "/api/loads", "/v1/models"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"authorization": "Bearer " + "k" * 16}).status_code == 200
        assert client.post("/api/newest", json={}).status_code == 401
        assert client.get("/", headers={"host": "evil.example"}).status_code == 403
        assert client.get("/api/model", headers={"origin": "http://evil.example"}).status_code == 403


def test_without_the_page_there_is_only_the_api_for_programs(visit):
    with visit(page=False) as client:
        assert client.get("/").status_code == 404 and client.get("/api/model").status_code == 404
        assert client.get("/v1/models").status_code == 200


def until(condition):
    """Wait for what must come; only a failing test waits long."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_run_without_a_checkpoint_is_served_when_it_has_one(visit, run, tmp_path, monkeypatch):
    monkeypatch.setattr(house_module, "SECONDS", 0.01)
    away = tmp_path / "away"
    (run / "checkpoints").rename(away)
    (run / "checkpoints").mkdir()
    with visit(server=False) as client:
        for path in ("/v1/models", "/health"):
            answer = client.get(path)
            assert answer.status_code == 503 and "no checkpoint yet" in answer.json()["error"]["message"]
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 503
        model = client.get("/api/model").json()
        assert model["step"] is None and "no checkpoint yet" in model["waits_for"]
        assert client.get("/api/log").json()["last"]["0"]["step"] == 2
        (broken,) = away.iterdir()
        (run / "checkpoints" / "step-0000001").mkdir()  # as a stranger may leave it
        until(lambda: "no checkpoint yet" in client.get("/health").text or "step-0000001" in client.get("/health").text)
        shutil.copytree(broken, run / "checkpoints" / broken.name)
        until(lambda: client.get("/health").status_code == 200)
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
        assert client.get("/api/model").json()["step"] is not None


@pytest.mark.parametrize("at", ["encode", "_prepare", "_write"])
def test_newer_weights_are_taken_when_asked_and_no_stream_is_cut(visit, run, monkeypatch, at):
    monkeypatch.setattr(house_module, "SECONDS", 0.01)
    with visit() as client, ThreadPoolExecutor() as pool:
        before = client.house.server
        whose = before.tokenizer if at == "encode" else before.engine
        there, gate, work = threading.Event(), threading.Event(), getattr(whose, at)
        setattr(whose, at, lambda *given: there.set() or (gate.wait(60) and work(*given)))
        body = {"max_tokens": 20, "stream": True, "temperature": 0}
        stream = pool.submit(lambda: client.post("/v1/completions", json=body).text)
        assert there.wait(60)
        assert client.post("/api/newest", json={}).json()["name"] == "mine"
        assert client.house.server is not before and not stream.done()
        gate.set()
        assert '"finish_reason":"length"' in stream.result(60) and stream.result().endswith("data: [DONE]\n\n")
        until(lambda: not before._thread.is_alive())
        assert client.post("/v1/completions", json={"max_tokens": 2}).status_code == 200
        assert "khanhllm_tokens_written_total 22" in client.get("/metrics").text
        shutil.rmtree(run / "checkpoints")
        answer = client.post("/api/newest", json={})
        assert answer.status_code == 503 and client.get("/health").status_code == 200


def test_weights_that_go_before_they_are_read_are_told_in_one_line(visit, monkeypatch):
    with visit() as client:
        verify = checkpoint.verify
        monkeypatch.setattr(checkpoint, "verify", lambda path, paper: verify(path, paper) or shutil.rmtree(path))
        answer = client.post("/api/newest", json={})
        assert answer.status_code == 503 and "has no checkpoint yet" in answer.json()["error"]["message"]
        assert client.get("/health").status_code == 200


def test_older_weights_that_fail_end_their_own_streams_and_nothing_else(visit, monkeypatch):
    monkeypatch.setattr(house_module, "SECONDS", 0.01)
    gate, deaths, body = threading.Event(), [], {"max_tokens": 20, "temperature": 0}
    with visit() as client, ThreadPoolExecutor() as pool:
        client.house.died = lambda: deaths.append(client.house.fault)
        before = client.house.server
        before.engine._write = lambda _rows: gate.wait(60) and 1 / 0
        stream = pool.submit(lambda: client.post("/v1/completions", json=body | {"stream": True}).text)
        until(lambda: before.engine.busy)
        assert client.post("/api/newest", json={}).status_code == 200
        gate.set()
        assert '"error"' in stream.result(60).split("\n\n")[-2]
        until(lambda: not before._thread.is_alive())
        assert client.post("/v1/completions", json=body).status_code == 200 and not deaths
        client.house.server.engine._write = lambda _rows: 1 / 0
        assert client.post("/v1/completions", json=body).status_code == 500
        until(lambda: deaths)
        assert isinstance(deaths[0], ZeroDivisionError)


def test_open_shows_the_page_in_a_browser(run, monkeypatch):
    found = []

    def visit(address):
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                found.append(answer.read())
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(webbrowser, "open", lambda address: threading.Thread(target=visit, args=[address]).start())
    late = threading.Timer(60, os.kill, [os.getpid(), signal.SIGINT])  # if nobody opens it
    late.start()
    main(["serve", str(run), "--port", "0", "--open", "--machine.device", "cpu", "--machine.threads", "1"])
    late.cancel()
    assert found[0].startswith(b"<!doctype html>")


@pytest.mark.parametrize("words", [["--no-page", "--open"], ["OTHER", "--no-page"], ["nowhere"]])
def test_words_that_do_not_fit_are_refused(run, words, capsys):
    assert main(["serve", str(run), *(str(run) if word == "OTHER" else word for word in words)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_findings_of_the_laboratory(visit, run):
    opened = open_run(run, TINY)
    (run / "text.txt").write_text("import os\n\n\ndef main(x):\n    return x\n" * 60)
    lab.write(lab.examine(opened, take(opened, str(run / "text.txt"), 256, None), "all"), run)
    with visit() as client:
        found = client.get("/api/experts").json()
        assert found["current"] is True
        shutil.rmtree(run / "checkpoints")  # as a training does with old ones
        assert client.get("/api/experts").json()["current"] is True
        (layer, *_) = found["findings"]["layers"]
        assert layer["off"]["share"] is not None and layer["experts"][0]["closed"]["error"] >= 0
        changed = json.loads((run / "experts.json").read_text()) | {"checkpoint": "another", "data": "hf://a/b, " * 99}
        (run / "experts.json").write_text(json.dumps(changed))
        assert client.get("/api/experts").json()["current"] is False


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "[" * 100_000, '{"version": 1, "layers": "x"}', '{"version": 2}', "\0", '{"a": NaN}']
)
def test_findings_that_are_damaged_are_refused_in_one_line(visit, run, text):
    (run / "experts.json").write_text(text)
    with pytest.raises(UserError, match="khanhllm experts RUN"):
        findings(run)
    with visit() as client:
        answer = client.get("/api/experts")
        assert answer.status_code == 404 and "experts.json" in answer.json()["error"]["message"]


def experts_of(routes):
    return [[[expert for expert, _ in layer] for layer in route] for route in routes]


def test_a_stream_tells_where_its_tokens_went(visit, run):
    body = {"prompt": "def main(", "max_tokens": 6, "seed": 1, "khanhllm": {"routes": True}}
    with visit() as client:
        (choice,) = client.post("/v1/completions", json=body).json()["choices"]
        seen, layers = choice["khanhllm"], client.get("/api/model").json()["layers"]
        tokenizer = client.house.server.tokenizer
        ids = [tokenizer.end_of_text, *tokenizer.encode("def main(")]
        assert [token[0] for token in seen["tokens"]][: len(ids)] == ids
        assert tokenizer.decode([token[0] for token in seen["tokens"][1:]]) == "def main(" + choice["text"]
        assert [token[1] for token in seen["tokens"][1 : len(ids)]] == [tokenizer.decode([one]) for one in ids[1:]]
        assert len(seen["routes"]) == len(seen["tokens"]) - 1 == len(ids) + 6 - 1
        assert all(len(route) == len(layers) for route in seen["routes"])
        assert seen["tokens"][0][2] is None and all(
            token[2] >= 0 and len(token[3]) == 5 for token in seen["tokens"][1:]
        )
        chunks = client.post("/v1/completions", json=body | {"stream": True}).text.split("\n\n")[:-2]
        parts = [json.loads(chunk.removeprefix("data: "))["choices"][0]["khanhllm"] for chunk in chunks]
        # the whole prompt comes first, and with it as many drawn tokens as a slow listener has waiting
        assert [part["prompt"] for part in parts] == [len(ids)] + [0] * (len(parts) - 1) and seen["prompt"] == len(ids)
        assert len(parts[0]["routes"]) == len(parts[0]["tokens"]) - 1 >= len(ids)
        assert [t[0] for part in parts for t in part["tokens"]] == [t[0] for t in seen["tokens"]]
        assert experts_of([r for part in parts for r in part["routes"]]) == experts_of(seen["routes"])
        closed = {"routes": True, "off": [[layers[0], 0]]}
        again = body | {"prompt": [token[0] for token in seen["tokens"]], "max_tokens": 0, "khanhllm": closed}
        (read,) = client.post("/v1/completions", json=again).json()["choices"]
        assert [token[0] for token in read["khanhllm"]["tokens"]] == [token[0] for token in seen["tokens"]]
        assert all(expert for route in read["khanhllm"]["routes"] for expert, _ in route[0])
        assert [token[2] for token in read["khanhllm"]["tokens"]] != [token[2] for token in seen["tokens"]]
        (plain,) = client.post("/v1/completions", json=body | {"khanhllm": {}}).json()["choices"]
        assert "khanhllm" not in plain and plain["text"] == choice["text"]
