"""Faults of the clients of a server: they vanish, stall, send what they must not, come in crowds, or the server is told
to end while they wait. After each one, an ordinary client must be served."""

import http.client
import json
import random
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, Self

import psutil

from khanhllm.chaos.arena import PATIENCE, Arena

ROWS, CROWD = 8, 100
WARM = 100
"""faults after which memory may not grow any more"""
MOST = 5.0
"""growth of memory that is allowed (MB)"""
LOST = (OSError, http.client.HTTPException)
WRONG: list[tuple[bytes, dict[str, str], int]] = [
    (b"{", {}, 400),
    (b"\xff\xfe", {}, 400),
    (b"[]", {}, 400),
    (b'{"prompt": [-1]}', {}, 400),
    (b'{"prompt": "x", "max_tokens": 1e99}', {}, 400),
    (b'{"prompt": "x", "temperature": NaN}', {}, 400),
    (b"[" * 10_000, {}, 400),
    (b'{"prompt": "x"}', {"Content-Type": "text/plain"}, 415),
    (b'{"prompt": "x"}', {"Origin": "https://elsewhere.example"}, 403),
    (b'{"prompt": "x"}', {"Host": "elsewhere.example"}, 403),
    (b'{"prompt": "x", "model": "another"}', {}, 404),
    (b'{"prompt": "' + b"x" * 2**23 + b'"}', {}, 413),
]
"""bodies and headers of requests, and what the server answers"""


class Served:
    """A run, served by a process of its own."""

    def __init__(self, run: Path) -> None:
        command = [sys.executable, "-m", "khanhllm", "serve", str(run), "--port", "0", "--rows", str(ROWS)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout
        told = re.search(r":(\d+)/v1", self.process.stdout.readline())
        self.port = int(told[1]) if told else 0
        self.stalled: list[socket.socket] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for held in self.stalled:
            held.close()
        self.process.kill()
        self.process.communicate()

    @property
    def megabytes(self) -> float:
        return float(psutil.Process(self.process.pid).memory_info().rss / 2**20)

    def ask(self, body: dict[str, Any] | bytes, headers: dict[str, str] | None = None) -> int:
        """Send a request and read the whole answer, which must be JSON. Returns its status."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request("POST", "/v1/completions", raw, {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            json.loads(answer.read())
            return answer.status
        finally:
            connection.close()

    def begin(self, sent: float = 1.0, **body: Any) -> socket.socket:
        """A connection that has sent this share of a request."""
        raw = json.dumps({"prompt": "def ", "max_tokens": 1000, **body}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Type: application/json\r\n"
        whole = f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw
        client = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        client.sendall(whole[: round(sent * len(whole))])
        return client


def _reset(client: socket.socket) -> None:
    """Close a connection as a process does that was killed."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def _cut_stream(served: Served, chance: random.Random) -> str:
    client = served.begin(stream=True)
    client.recv(chance.choice([1, 200, 2000]))
    _reset(client)
    return ""


def _cut_request(served: Served, chance: random.Random) -> str:
    _reset(served.begin(sent=chance.choice([0.1, 0.5, 0.99, 1.0]), n=chance.choice([1, 3])))
    return ""


def _wrong(served: Served, chance: random.Random) -> str:
    body, headers, expected = chance.choice(WRONG)
    with suppress(ConnectionError):  # of a body too large to be read, the server closes the connection
        status = served.ask(body, headers)
        return "" if status == expected else f"{status} instead of {expected} for {body[:60]!r} {headers}"
    return "" if expected == 413 else f"no answer to {body[:60]!r}"


def _stall(served: Served, chance: random.Random) -> str:
    """Leave clients alone that do not read, or do not send; the oldest of them goes."""
    served.stalled.append(served.begin(sent=chance.choice([0.3, 1.0]), stream=True, n=2))
    if len(served.stalled) > 20:
        _reset(served.stalled.pop(0))
    return ""


def _crowd(served: Served, chance: random.Random) -> str:
    def one(nth: int) -> int:
        return served.ask({"prompt": "x" * (nth % 7), "max_tokens": 8, "seed": nth})

    with ThreadPoolExecutor(CROWD) as pool:
        found = set(pool.map(one, range(CROWD)))
    return "" if found <= {200, 429} else f"a crowd was answered by {sorted(found)}"


KINDS: list[tuple[Callable[[Served, random.Random], str], int]] = [
    (_cut_stream, 30),
    (_cut_request, 25),
    (_wrong, 30),
    (_stall, 14),
    (_crowd, 1),
]
SIGNALLED = 0.01
"""share of the faults that are signals to the server while clients wait"""


def vanishing(arena: Arena, chance: random.Random) -> Iterator[str]:
    """Serve a run to clients with faults. Memory may not grow once each kind was met."""
    if not (find_spec("uvicorn") and find_spec("starlette")):
        return
    run, _ = arena.undisturbed
    while True:
        with Served(run) as served:
            first = [kind for kind, _ in KINDS]
            before = 0.0
            for number in count():
                if number > WARM and chance.random() < SIGNALLED:
                    yield _signalled(served, chance)
                    break
                kind = first.pop() if first else chance.choices(*zip(*KINDS, strict=True))[0]
                fault = _told(kind, served, chance) or _told(_ordinary, served, chance)
                now = served.megabytes if not served.process.poll() else 0.0
                if number <= WARM:
                    before = max(before, now)
                elif now > before + MOST and not fault:
                    fault = f"memory grew from {before:.1f} to {now:.1f} MB"
                yield fault
                if served.process.poll() is not None:
                    break


def _told(act: Callable[[Served, random.Random], str], served: Served, chance: random.Random) -> str:
    try:
        return act(served, chance)
    except LOST as error:
        return f"{act.__name__.strip('_')}: {type(error).__name__}: {error}"


def _ordinary(served: Served, chance: random.Random) -> str:
    status = served.ask({"prompt": "import ", "max_tokens": 4})
    return "" if status == 200 else f"an ordinary client was answered by {status}"


def _signalled(served: Served, chance: random.Random) -> str:
    """Tell the server to end while clients read: it must, and say that all is well."""
    clients = [served.begin(stream=True) for _ in range(ROWS * 2)]
    number = chance.choice([signal.SIGTERM, signal.SIGINT])
    served.process.send_signal(number)
    try:
        _, said = served.process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"the server did not end on {number.name}"
    finally:
        for client in clients:
            client.close()
    code = served.process.returncode
    return "" if code == 0 and "Traceback" not in said else f"exit code {code}: {said[-200:]}"
