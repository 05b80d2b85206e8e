"""Who may ask, and what: the checks before any request reaches the model, and the line in the log after it.

A page on the web makes the reader's browser ask servers of his own machine. It is kept out by the names in Host (DNS
rebinding), by Origin, and by the type of the body, for which a browser asks permission first. Decisions look at
scope["path"], never at an address put together from what the client says.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import re
import sys
import time
import traceback
from collections.abc import Iterable
from typing import Any

from khanhllm.serve.openai import Refused, dumped, event

Scope = Any
Receive = Any
Send = Any
"""ASGI's"""

LARGEST = 2**20
"""bytes of a body"""
PATIENCE = 10
"""seconds until a body must have come"""
STALLED = 60
"""seconds after which a client that takes nothing is let go"""
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
QUIET = "/api/"
"""what the page asks every other second, which is worth a line only if it fails"""
NAMES = re.compile(r"[\w-]+(?:, ?[\w-]+)*", re.ASCII)
"""of headers, parted by commas"""
HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on this host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """An ASGI application around another one.

    key: what clients must send as a bearer token; empty: none. names: what Host may say. origins: pages of the web
    that may ask. literal: whether Host may also be any IP address, which nobody can rebind; for servers that others
    reach. open: paths that need no key.
    """

    def __init__(
        self,
        app: Any,
        names: Iterable[str],
        origins: Iterable[str] = (),
        key: str = "",
        literal: bool = False,
        open: Iterable[str] = ("/health",),
    ) -> None:
        self.app, self.literal, self.open = app, literal, frozenset(open)
        self.origins = frozenset(origin.lower() for origin in origins)  # as browsers send them
        self.names = LOOPBACK | {name.lower() for name in names}
        self.key = _digest(key.encode()) if key else None
        self.answers: dict[int, int] = {}
        """how many of each status were sent"""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})
        started, status = time.monotonic(), 0
        origin = _header(scope, b"origin")

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = list(message.get("headers", ()))
                known = {name for name, _ in own}
                more = HEADERS | (_cors(scope) if origin in self.origins else {})
                message["headers"] = own + [header for header in _encoded(more) if header[0] not in known]
            async with asyncio.timeout(STALLED):
                await send(message)

        try:
            await self._answer(scope, receive, sending)
        except Refused as error:
            await _json(sending, error)
        except TimeoutError:  # nobody reads
            pass
        except asyncio.CancelledError:  # the server ends, and this took longer than it waits
            gone = Refused(503, "the server has ended")
            if status:
                await sending({"type": "http.response.body", "body": event(gone.body()).encode()})
            else:
                await _json(sending, gone)
        except Exception as error:  # one line for what nobody foresaw; a text of the client's may be in its message
            print(f"khanhllm: {type(error).__name__} at {_place(error)}", file=sys.stderr)
            if not status:
                await _json(sending, Refused(500, "something unforeseen happened here; the server's log says where"))
        self.answers[status] = self.answers.get(status, 0) + 1
        if status < 400 and scope["path"].startswith(QUIET):
            return
        took = (time.monotonic() - started) * 1000
        path = ascii(scope["path"])[1:-1][:100]
        when = time.strftime("%H:%M:%S")
        print(f"{when}  {scope['method'][:10]} {path}  {status}  {took:.0f} ms", file=sys.stderr, flush=True)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_host(scope)
        if self._preflight(scope):
            return await _json(send, None, 204)
        if scope["path"] not in self.open:
            self._check_key(scope)
        if scope["method"] == "POST":
            kind = (_header(scope, b"content-type") or "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise Refused(415, "send the body as content-type: application/json")
            receive = _replayed(await _body(receive), receive)
        await self.app(scope, receive, send)

    def _check_host(self, scope: Scope) -> None:
        """Refuse foreign names, and foreign pages."""
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        host = hosts[0].lower() if len(hosts) == 1 else ""
        name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
        port = host[len(name) :]
        known = name in self.names or (self.literal and _is_address(name))
        if not known or (port and not (port[0] == ":" and port[1:].isdecimal())):
            raise Refused(403, "this server does not go by the name in Host; start it with --allow-host NAME")
        origins = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
        if any(origin not in self.origins and origin.lower() != f"http://{host}" for origin in origins):
            raise Refused(403, "pages of this Origin may not ask here; start the server with --cors ORIGIN")

    def _preflight(self, scope: Scope) -> bool:
        return scope["method"] == "OPTIONS" and _header(scope, b"origin") in self.origins

    def _check_key(self, scope: Scope) -> None:
        if self.key is None:
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        kind, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        if not hmac.compare_digest(_digest(key.strip()), self.key) or kind.lower() != b"bearer":
            raise Refused(401, "this server wants its key: Authorization: Bearer KEY", "invalid_api_key")


def _digest(key: bytes) -> bytes:
    """Keys are compared by their hashes, in constant time."""
    return hashlib.sha256(key).digest()


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return False


def _header(scope: Scope, wanted: bytes) -> str | None:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == wanted), None)


def _cors(scope: Scope) -> dict[str, str]:
    """What a page of an allowed origin may do: send the headers that it asks for, as OpenAI's client has many."""
    asked = _header(scope, b"access-control-request-headers") or ""
    names = asked if NAMES.fullmatch(asked) else "authorization, content-type"
    allowed = {"origin": _header(scope, b"origin") or "", "headers": names, "methods": "GET, POST"}
    return {f"access-control-allow-{what}": value for what, value in allowed.items()} | {"vary": "origin"}


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]


async def _json(send: Send, error: Refused | None, status: int = 0) -> None:
    body = dumped(error.body()).encode() if error else b""
    headers = {"content-type": "application/json", "content-length": str(len(body))} if error else {}
    headers |= {"www-authenticate": "Bearer"} if error and error.status == 401 else {}
    status = error.status if error else status
    await send({"type": "http.response.start", "status": status, "headers": _encoded(headers)})
    await send({"type": "http.response.body", "body": body})


async def _body(receive: Receive) -> bytes:
    """The whole body, which may neither be too large nor take too long."""
    body = b""
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                message = await receive()
                body += message.get("body", b"")
                if len(body) > LARGEST:
                    raise Refused(413, f"a body has at most {LARGEST:,} bytes")
                if message["type"] != "http.request" or not message.get("more_body"):
                    return body
    except TimeoutError:
        raise Refused(408, f"the body did not come within {PATIENCE} seconds") from None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` from its beginning, with the whole body as its first message."""
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return first.pop() if first else await receive()

    return again


def _place(error: BaseException) -> str:
    """File and line where an error arose."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}:{last.lineno}"
