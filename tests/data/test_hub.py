"""The roads to the hub, against a server on loopback that answers as the hub does."""

import gzip
import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "en/c4-train.00000-of-00002.json.gz": ["one", "two"],
    "en/c4-train.00001-of-00002.json.gz": ["three"],
    "en/c4-validation.00000-of-00001.json.gz": ["held"],
    "README.md": ["a card"],
}
PLAIN = "plain/a.jsonl"
"""a file whose own bytes do not tell whether they are whole"""
TOKEN = "hf_secret"


def packed(path):
    """Of the real C4's 1,024 files, each holds its own name."""
    if path == PLAIN:
        return b'{"text": "as it should be"}\n'
    texts = FILES.get(path, [f"text of {path} {number} " * 200 for number in range(20)])
    return gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode(), mtime=0)


class _Hub(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, shown = self.path.partition("?")[0], self.headers.get("Authorization", "")
        self.server.log.append(path)
        self.server.shown.append((self.headers["Host"], shown))
        if self.server.refuses and path.startswith(self.server.refuses) and shown != f"Bearer {TOKEN}":
            return self.send_error(self.server.code)
        if path.startswith("/api/datasets/") and "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(packed(name)), "oid": "0"} for name in (*FILES, PLAIN)
            ]
            under = path.partition("/tree/")[2].partition("/")[2]
            return self.say([entry for entry in entries if entry["path"].startswith(under)])
        if path.startswith("/api/datasets/"):
            return self.say({"id": "allenai/c4", "sha": SHA, "siblings": [{"rfilename": name} for name in FILES]})
        if "/resolve/" in path:  # as the hub does, elsewhere
            name = path.partition("/resolve/")[2].partition("/")[2]
            self.send_response(302)
            # another name of this server: another host to whoever carries a secret
            self.send_header("Location", f"http://localhost:{self.server.server_port}/cdn/{name}")
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(packed(name)).hexdigest()}"')
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body = packed(path.removeprefix("/cdn/")) if path.startswith("/cdn/") else b"hub"
        if path.startswith("/cdn/") and self.server.damages:
            self.server.damages -= 1
            body = body.replace(b"should", b"shoult")
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.say([])

    def say(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.log, server.shown, server.damages, server.refuses, server.code = [], [], 0, (), 401
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))  # nobody is logged in
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def run(code):
    """In a process of its own: where the hub is, is decided when its library is imported."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


READ = """
from khanhllm.data.readers import Reader
from khanhllm.data.sources import locate
found = locate({source!r})
print(sorted(document.text for name in found.files for document in Reader(found, []).read_file(name)))
"""


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ("hf://datasets/allenai/c4/en", ["one", "three", "two"]),
        ("hf://datasets/allenai/c4/en:validation", ["held"]),
        ("hf://datasets/allenai/c4", ["one", "three", "two"]),
    ],
)
def test_a_dataset_is_read_split_by_split(hub, source, texts):
    assert run(READ.format(source=source)).strip() == str(texts)


def test_a_private_dataset_is_read_with_the_token_which_nobody_else_sees(hub, monkeypatch):
    hub.refuses = ("/api/", "/datasets/")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert run(READ.format(source="hf://datasets/allenai/c4/plain")).strip() == "['as it should be']"
    assert ("127.0.0.1", f"Bearer {TOKEN}") in {(host.partition(":")[0], shown) for host, shown in hub.shown}
    assert {shown for host, shown in hub.shown if host.startswith("localhost")} == {""}


REFUSED = """
from khanhllm.errors import UserError
from khanhllm.data import fetch
fetch.FIRST_WAIT = 0.01
try:
    exec({code!r})
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("code", [401, 403])
@pytest.mark.parametrize("refuses", ["/api/", "/datasets/"])
def test_who_is_not_let_in_is_told_how_to_log_in(hub, code, refuses):
    hub.refuses, hub.code = refuses, code
    said = run(REFUSED.format(code=READ.format(source="hf://datasets/allenai/c4/plain")))
    assert said.count("\n") == 1 and "hf auth login" in said and "HF_TOKEN" in said
    assert f"answer {code}" in said or f"answers {code}" in said or "knows no" in said


def test_wrong_bytes_of_a_large_file_are_fetched_again_and_at_last_refused(hub):
    hub.damages = 3
    code = READ.format(source="hf://datasets/allenai/c4/plain")
    assert run(REFUSED.format(code=code)).strip() == "['as it should be']" and not hub.damages
    hub.damages = 100
    assert "its sha256 is not the published one), 5 times in a row" in run(REFUSED.format(code=code))


BELT = """
from pathlib import Path
from khanhllm.schema import DataConfig
from khanhllm.data.belt_worker import BeltWorker
from khanhllm.data.ensure import ensure
folder = ensure(DataConfig(source="c4", cache={cache!r}, shard_tokens=2000, tokenizer_sample=2000), 300, 1000)
print(BeltWorker(folder, 5.0).make(0).shard.documents)
"""


def test_c4_is_read_shard_by_shard_and_keeps_its_own_validation(hub, tmp_path):
    run(BELT.format(cache=str(tmp_path)))
    asked = [path for path in hub.log if path.startswith("/cdn/")]
    assert sum("validation" in path for path in asked) == 8 and len(set(asked)) == len(asked)
    assert len({path for path in asked if "train" in path}) < 12
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert json.loads((folder / "belt.json").read_bytes())["threshold"] == 0
