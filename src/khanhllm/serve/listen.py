"""Serve a run until a signal comes, over HTTP."""

import asyncio
import errno
import os
import secrets
import signal
import socket
import sys
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from khanhllm.errors import UserError
from khanhllm.files import read
from khanhllm.serve.guard import PATIENCE, is_loopback
from khanhllm.serve.house import House

GRACE = 5
"""seconds that streams have to finish after the first signal"""
SILENT = 500
"""connections without a request that are kept; another one closes the oldest of them"""


class Protocol(H11Protocol):
    """A connection must send each request in time, and many that do not keep nobody else out."""

    silent: dict["Protocol", None] = {}  # noqa: RUF012  # of the process, the oldest first

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._asked:
            self._settled()
        elif self not in self.silent:  # it has begun a further request, and uvicorn's own patience ends with that
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._settled()
        super().connection_lost(exc)

    @property
    def _asked(self) -> bool:
        """Whether there is a request that has no whole answer yet."""
        return bool(self.cycle and not self.cycle.response_complete)

    def _wait(self) -> None:
        self.silent[self] = None
        self.late = self.loop.call_later(PATIENCE, self._late)
        if len(self.silent) > SILENT:
            oldest = next(iter(self.silent))
            oldest._settled()
            oldest.transport.close()

    def _settled(self) -> None:
        self.silent.pop(self, None)
        self.late.cancel()

    def _late(self) -> None:
        if not self._asked:
            self.transport.close()


def read_key(file: Path | None) -> str:
    """The key in a file, or in the environment as KHANHLLM_KEY; empty if there is none."""
    where = file or "KHANHLLM_KEY"
    try:
        given = read(file, 4096) if file else os.fsencode(os.environ.get("KHANHLLM_KEY", ""))
        key = given.decode("ascii").strip()
    except OSError as error:
        raise UserError(f"cannot read the key from {where}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the key in {where} must be ASCII") from None
    if not file and not given:
        return ""
    if len(key) < 16 or not key.isprintable():
        raise UserError(f"the key in {where} must have at least 16 characters, on one line")
    return key


AT_FAULT = {
    errno.EADDRINUSE: "--port",
    errno.EACCES: "--port",
    errno.EADDRNOTAVAIL: "--host",
    errno.EAFNOSUPPORT: "--host",
}
"""what to change when a socket cannot be bound"""


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections, which wait until somebody serves them. Raises UserError if it cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        option = socket.SO_REUSEADDR
        if sys.platform == "win32":  # where that would let two servers have one port
            option = socket.SO_EXCLUSIVEADDRUSE
        bound.setsockopt(socket.SOL_SOCKET, option, 1)
        bound.bind(address)
        bound.listen(2048)
    except (OSError, UnicodeError) as error:
        text = error.strerror if isinstance(error, OSError) else "no name of a host"
        at_fault = "--host"
        if isinstance(error, OSError) and not isinstance(error, socket.gaierror):  # it found an address
            at_fault = AT_FAULT.get(error.errno or 0, "")
        remedy = f"; try another {at_fault}" if at_fault else ""
        raise UserError(f"cannot serve on {host} port {port}: {text}{remedy}") from None
    return bound


@contextmanager
def nobody_else() -> Iterator[None]:
    """Within this context, signals have no handler but uvicorn's, which repeats the one that ended it to the handler
    before."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve(
    enter: Callable[[], House],
    host: str,
    port: int,
    key: str,
    allowed: Sequence[str],
    origins: Sequence[str],
    browse: bool = False,
) -> None:
    """Serve until SIGINT or SIGTERM; then streams may finish for a while, and a second SIGINT ends it at once. Raises
    UserError if it cannot listen there, and RuntimeError when the engine has died.

    enter: gives the house, once there is a socket: what keeps that from being is said before a model is loaded. Without
    a key, a server that other machines can reach makes one and prints it. browse: open the page in a browser.
    """
    bound = listen(host, port)
    house = enter()
    foreign = not is_loopback(host)
    made = secrets.token_urlsafe(24) if foreign and not key else ""
    shown = f"[{host}]" if ":" in host else host
    app = house.guarded([shown, *allowed], origins=origins, key=key or made, literal=foreign)
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
    listening = uvicorn.Server(config)

    def died() -> None:
        listening.should_exit = True

    house.died = died
    address = f"http://{shown}:{bound.getsockname()[1]}"
    print(f"{house.name} listens on {address}/v1  (Ctrl-C ends it)", flush=True)
    if house.files:
        print(f"page: {address}/", flush=True)
    if made:
        print(f"key, to be sent as Authorization: Bearer KEY:  {made}", flush=True)
    if browse:
        page = address.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")
        Thread(target=webbrowser.open, args=[page], daemon=True).start()  # a browser in the terminal waits for the page
    with nobody_else():
        asyncio.run(listening.serve([bound]))
    if fault := house.fault:
        raise RuntimeError(f"the engine has ended by an error: {type(fault).__name__}: {fault}") from fault
