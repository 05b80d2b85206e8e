"""A real HTTP server on loopback that serves a folder, with ranges and ETags, and injects the faults of a list."""

import hashlib
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

KINDS = ("refused", "reset", "stall", "404", "408", "429", "500", "503", "short", "wrong")


class FaultyServer:
    """Serves a folder. `faults`: one of KINDS (or "" for none) for each request for a file, in order."""

    def __init__(self, folder: Path, port: int = 0, stall: float = 1.0) -> None:
        self.folder, self.stall = Path(folder), stall
        self.etags = True
        self.faults: list[str] = []
        self.log: list[tuple[str, str, str]] = []
        """(path, range asked for, fault)"""
        self.server = _Server(("127.0.0.1", port), _Handler)
        self.server.owner = self
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    owner: FaultyServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        owner = self.server.owner
        fault = owner.faults.pop(0) if owner.faults else ""
        asked = self.headers.get("Range", "")
        owner.log.append((self.path, asked, fault))
        path = owner.folder / unquote(self.path.partition("?")[0]).lstrip("/")
        if fault == "refused":
            return self._reset()
        if fault.isdigit() or not path.is_file():
            return self._say(int(fault or 404))
        data = path.read_bytes()
        tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        start = 0
        if asked and self.headers.get("If-Range") == tag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        body = bytearray(data[start:])
        if fault == "wrong" and body:
            body[len(body) // 2] ^= 0x55
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if owner.etags:
            self.send_header("ETag", tag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if fault in ("reset", "short", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "stall":
                time.sleep(owner.stall)
            if fault == "reset":
                time.sleep(0.02)
                return self._reset()
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self._say(200)

    def _say(self, code: int) -> None:
        self.send_response(code)
        if code == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
