"""Files become documents.

datatrove's readers are the engine: they open local disks, the hub and the web alike, and run unchanged in its local,
Slurm and Ray executors. In one point we differ on purpose. They log and skip what they cannot read; here bad input
ends the work with one line that names the file and the place, because text that is silently missing is found out
about, if ever, after the training.

A text file has no documents of its own, so it is cut at blank lines into enough of them that a single novel still
yields a held-out part. Whatever the file, memory holds one block of it and one document.
"""

import codecs
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import zstandard
from datatrove.data import Document
from datatrove.io import DataFolder
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.readers.base import BaseDiskReader
from datatrove.utils.logging import logger
from fsspec.implementations.local import LocalFileSystem

from khanhllm.config import UserError
from khanhllm.data.sources import PATIENCE, Source, kind, told

BLOCK = 2**18
"""bytes read at once"""

# Its log is for clusters. Errors reach the user as UserError; this runs in every process that unpickles a reader.
logger.disable("datatrove")


class Reader(BaseDiskReader):  # type: ignore[misc]
    """The first step of the pipeline: task number `rank` reads the files of `groups[rank]`."""

    name = "KhanhLLM documents"

    def __init__(self, source: Source, groups: list[tuple[str, ...]]) -> None:
        super().__init__(_folder(source.root), add_file_path=False)
        self.source = source
        self.groups = groups
        self.blank = 0
        """documents without a word in them, which were left out"""

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for document in self.read_files_shard(list(self.groups[rank])):
            self.update_doc_stats(document)
            yield document

    def read_file(self, filepath: str) -> Iterator[Document]:
        """The documents of one file, in order. Raises UserError that names the file and the place of a fault."""
        where = f"{self.source.root.rstrip('/')}/{filepath}"
        form = kind(filepath)
        # a server need not support ranges; block size 0 reads front to back, which a table cannot
        options = {"block_size": 0} if where.startswith("http") and form != "table" else {}
        with told(where):
            if form == "table":
                yield from ParquetReader(self.data_folder, read_metadata=False, adapter=self._row).read_file(filepath)
                return
            with self.data_folder.open(filepath, "rb", **options) as raw:
                texts = self._texts(raw, where) if form == "text" else _records(raw, where)
                for number, text in enumerate(texts):
                    if text.strip():
                        yield Document(text=text, id=f"{filepath}/{number}")
                    else:
                        self.blank += 1

    def _texts(self, raw: Any, where: str) -> Iterator[str]:
        if self.source.name == "stdlib" and not _is_utf8(Path(where)):
            return iter(())  # Python's own tests keep a few files in other encodings
        return _pieces(_decoded(raw, where), self.source.document_bytes)

    def _row(self, _: Any, record: dict[str, Any], path: str, number: int | str) -> dict[str, Any]:
        text = _text_of(record, f"{path}, row {number}")
        self.blank += not text  # which datatrove leaves out
        return {"text": text, "id": f"{path}/{number}", "metadata": {}}


def _folder(root: str) -> DataFolder:
    if root.startswith("http"):
        import aiohttp

        patience = aiohttp.ClientTimeout(total=None, sock_connect=PATIENCE, sock_read=60)
        return DataFolder(root, client_kwargs={"timeout": patience})
    return DataFolder(root) if root.startswith("hf://") else DataFolder(root, fs=LocalFileSystem())


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


def _decoded(raw: Any, where: str) -> Iterator[str]:
    """A text file as pieces of text, without the byte order mark that some editors leave."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    start = 0
    while True:
        block = raw.read(BLOCK)
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            offset = start - waiting + error.start
            raise UserError(f"{where} is not UTF-8 text (byte {offset}); convert it to UTF-8") from None
        yield text if start else text.removeprefix("\ufeff")
        if not block:
            return
        start += len(block)


def _pieces(texts: Iterator[str], most: int) -> Iterator[str]:
    """Cut a stream of text into documents of at most `most` characters; joined, they are the text again."""
    kept = ""
    for text in texts:
        kept += text
        while len(kept) > most:
            cut = _cut(kept, most)
            yield kept[:cut]
            kept = kept[cut:]
    yield kept


def _cut(text: str, most: int) -> int:
    """The best place to cut in the second half of the allowed length: a blank line, else a line, else a word."""
    for mark in ("\n\n", "\r\n\r\n", "\n", " "):
        if (found := text.rfind(mark, most // 2, most)) >= 0:
            return found + len(mark)
    return most


def _records(raw: Any, where: str) -> Iterator[str]:
    """The texts of a JSON-lines file, packed or not."""
    for number, line in enumerate(_lines(_unpacked(raw, where)), 1):
        if line.strip():
            yield _text_of(_parsed(line, f"{where}, line {number}"), f"{where}, line {number}")


def _unpacked(raw: Any, where: str) -> Iterator[bytes]:
    name = where.partition("?")[0].lower()
    if name.endswith(".zst"):
        return _unzstd(raw)
    file = gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw
    return iter(lambda: file.read(BLOCK), b"")


def _unzstd(raw: Any) -> Iterator[bytes]:
    """zstandard's own file reader takes a frame without an end for a whole one; this asks whether the end was seen."""
    frame = None
    block = raw.read(BLOCK)
    while block:
        frame = frame or zstandard.ZstdDecompressor().decompressobj()
        yield frame.decompress(block)
        block = frame.unused_data
        frame = None if frame.eof else frame
        block = block or raw.read(BLOCK)
    if frame:
        raise EOFError


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    kept: list[bytes] = []
    for block in blocks:
        first, *others = block.split(b"\n")
        kept.append(first)
        for line in others:
            yield b"".join(kept)
            kept = [line]
    yield b"".join(kept)


def _parsed(line: bytes, where: str) -> Any:
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


def _text_of(record: Any, where: str) -> str:
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object with a text under the key 'text'")
    if "text" not in record:
        raise UserError(f"{where} has no text column 'text'; it has: {', '.join(map(str, record)) or 'nothing'}")
    text = record["text"]
    if not isinstance(text, str | None):
        raise UserError(f"{where}: 'text' must be text, not {type(text).__name__}")
    text = text or ""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
