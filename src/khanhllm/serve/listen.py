"""Serve a run until a signal comes, over HTTP."""

import asyncio
import os
import secrets
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from khanhllm.errors import UserError
from khanhllm.files import read
from khanhllm.runs.run import Run
from khanhllm.serve.guard import PATIENCE, is_loopback
from khanhllm.serve.server import Server

GRACE = 5
"""seconds that streams have to finish after the first signal"""
SILENT = 64
"""connections without a request that are kept; another one closes the oldest of them"""


class Protocol(H11Protocol):
    """A connection must send its request in time, and many that do not keep nobody else out."""

    silent: dict["Protocol", None] = {}  # noqa: RUF012  # of the process, the oldest first

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.silent[self] = None
        self.late = self.loop.call_later(PATIENCE, self._late)
        if len(self.silent) > SILENT:
            next(iter(self.silent)).transport.close()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle:
            self._spoke()

    def connection_lost(self, exc: Exception | None) -> None:
        self._spoke()
        super().connection_lost(exc)

    def _spoke(self) -> None:
        self.silent.pop(self, None)
        self.late.cancel()

    def _late(self) -> None:
        if not self.cycle:
            self.transport.close()


def read_key(file: Path | None) -> str:
    """The key in a file, or in the environment as KHANHLLM_KEY; empty if there is none."""
    if not file:
        return os.environ.get("KHANHLLM_KEY", "").strip()
    try:
        key = read(file, 4096).decode("ascii").strip()
    except OSError as error:
        raise UserError(f"cannot read the key from {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the key in {file} must be ASCII") from None
    if len(key) < 16 or not key.isprintable():
        raise UserError(f"the key in {file} must have at least 16 characters, on one line")
    return key


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound. Raises UserError if it cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        text = error.strerror if isinstance(error, OSError) else "no name of a host"
        raise UserError(f"cannot serve on {host} port {port}: {text}; try another --port") from None
    return bound


def serve(
    run: Run,
    name: str,
    host: str,
    port: int,
    rows: int,
    waiting: int,
    key: str,
    allowed: Sequence[str] = (),
    origins: Sequence[str] = (),
) -> int:
    """Serve until SIGINT or SIGTERM; then let streams finish for a while. The exit code: 1 if the engine has died.

    Without a key, a server that other machines can reach makes one and prints it.
    """
    bound = listen(host, port)
    foreign = not is_loopback(host)
    shown_key = secrets.token_urlsafe(24) if foreign and not key else ""
    key = key or shown_key
    server: uvicorn.Server

    def died() -> None:
        server.should_exit = True

    ours = Server(run, name, rows, waiting, died)
    names = [f"[{host}]" if ":" in host else host, *allowed]
    app = ours.guarded(names, origins=origins, key=key, literal=foreign)
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE,
    )
    server = uvicorn.Server(config)
    # uvicorn repeats the signal that ended it, to whoever handled it before: nobody
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    shown = f"[{host}]" if ":" in host else host
    print(f"{name} listens on http://{shown}:{bound.getsockname()[1]}/v1  (Ctrl-C ends it)", flush=True)
    if shown_key:
        print(f"key, to be sent as Authorization: Bearer KEY:  {shown_key}", flush=True)
    asyncio.run(server.serve([bound]))
    if ours.engine.fault:
        fault = ours.engine.fault
        raise RuntimeError(f"the engine has ended by an error: {type(fault).__name__}: {fault}") from fault
    return 0
