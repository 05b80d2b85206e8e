"""Files of bytes, packed or not, as blocks, as lines, and lines as JSON."""

import gzip
import json
from collections.abc import Iterator
from typing import Any

import orjson
import zstandard

from khanhllm.data.plain import BLOCK
from khanhllm.data.source_syntax import without_query
from khanhllm.errors import UserError

ZST_BLOCK = 2**9
"""packed bytes that zstandard unpacks at once; even a file made to fill memory yields at most 2**17 from each 4"""


def unpacked(raw: Any, where: str) -> Iterator[bytes]:
    name = without_query(where).lower()
    if name.endswith(".zst"):
        return _unzstd(raw, where)
    file = gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw
    return iter(lambda: file.read(BLOCK), b"")


def _unzstd(raw: Any, where: str) -> Iterator[bytes]:
    """Unpack zstandard. Raises EOFError for a frame without its end, which zstandard's own reader accepts."""
    frame = None
    block = raw.read(ZST_BLOCK)
    while block:
        frame = frame or zstandard.ZstdDecompressor().decompressobj()
        try:
            unpacked = frame.decompress(block)
        except zstandard.ZstdError as error:
            if "too much memory" not in str(error):
                raise
            fault = "was packed with a window above 128 MB (zstd --long)"
            raise UserError(f"{where} {fault}; unpack it by `zstd -d --long=31`, then pack it without --long") from None
        yield from (unpacked[at : at + BLOCK] for at in range(0, len(unpacked), BLOCK))
        block = frame.unused_data
        frame = None if frame.eof else frame
        block = block or raw.read(ZST_BLOCK)
    if frame:
        raise EOFError


def lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    pending: list[bytes] = []
    for block in blocks:
        first, *others = block.split(b"\n")
        pending.append(first)
        for line in others:
            yield b"".join(pending)
            pending = [line]
    yield b"".join(pending)


def parsed(line: bytes, where: str) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        why = error.msg
    try:
        line.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text (byte {error.start} of the line); convert it to UTF-8") from None
    try:
        return json.loads(line)  # forgives lone surrogates, which real web text has
    except (ValueError, RecursionError):
        raise UserError(f"{where} is not valid JSON ({why}); is the file cut in the middle?") from None
