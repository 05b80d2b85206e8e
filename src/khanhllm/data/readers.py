"""Read files as documents.

datatrove's readers do the work: they open local disks, the hub and the web alike, and run unchanged in its local,
Slurm and Ray executors. One point differs on purpose. datatrove logs and skips what it cannot read; our reader stops
with one line that names the file and the place, because nobody would notice missing text before the end of the
training.

With data.bad = skip it stops reading that file instead, counts it, and goes on with the next. Memory holds one block of
a file and one document, of plain text its first 16 million characters too.
"""

import csv
import gzip
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datatrove.data import Document
from datatrove.io import DataFolder
from datatrove.pipeline.readers.base import BaseDiskReader
from datatrove.utils.logging import logger
from fsspec.implementations.local import LocalFileSystem
from pyarrow.parquet import ParquetFile
from pyarrow.types import is_struct

from khanhllm.data.chat import SHAPES, NoConversation, WrongConversation, conversation, to_json
from khanhllm.data.counting import Marks
from khanhllm.data.fetch import Denied, NotItsFault, fetch
from khanhllm.data.plain import BLOCK, as_utf8, decoded, documents
from khanhllm.data.records import holds_records, records
from khanhllm.data.source_syntax import filled, text_columns, without_query
from khanhllm.data.sources import LOGIN, Source, as_user_error, is_remote
from khanhllm.data.tokenizer import Tokenizer
from khanhllm.data.unpacked import lines, unpacked
from khanhllm.data.walk import ending, kind
from khanhllm.data.warc import page, pages
from khanhllm.errors import UserError

HEAD = 512
"""bytes that show what a file is"""
PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<!doctype html|<html[\s>])", re.IGNORECASE)
PACKERS = ((b"\x1f\x8b", "gzip", ".gz"), (b"\x28\xb5\x2f\xfd", "zstd", ".zst"), (b"PK\x03\x04", "zip", ".zip"))
"""their first bytes, names and endings"""
ROWS_BYTES = 2**20
"""of a parquet table unpacked at once, at least one row"""
FIELD = 2**27
"""longest field of a csv file (characters); a quote that is never closed runs into this limit"""

CSV_FAULTS = {
    "end of data": "a quoted field is never closed; is the file cut?",
    "new-line character": "a carriage return ends a line; save the file with line feeds (\\n or \\r\\n)",
}
"""what messages of the csv library mean"""

# datatrove's log is for clusters; users get a UserError. Here, so that every process that unpickles a reader runs it.
logger.disable("datatrove")


class Reader(BaseDiskReader):  # type: ignore[misc]
    """The first step of the pipeline: task number `rank` reads the files of `groups[rank]`."""

    name = "KhanhLLM documents"

    def __init__(
        self,
        source: Source,
        groups: list[tuple[str, ...]],
        spool: Path | None = None,
        patience: float = 600.0,
        keep: int = 0,
    ) -> None:
        """spool: folder whose downloads a later process continues; None: a temporary folder.

        patience: seconds without any answer from the network until the reader gives up. keep: downloads (bytes) that
        stay in the spool after this reader has read them to the end, for another reader.
        """
        super().__init__(DataFolder(source.root if not is_remote(source.root) else "/", fs=LocalFileSystem()))
        self.source = source
        self.groups = groups
        self.spool = spool
        self.patience = patience
        self.keep = keep
        self.blank = 0
        """documents that hold only white space, which the reader skips"""
        self.skipped = Counter[str]()
        """files that it could not read to their end, by ending, and conversations (data.bad = skip)"""

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for document in self.read_files_shard(list(self.groups[rank])):
            self.update_doc_stats(document)
            yield document

    def all_texts(self) -> Iterator[str]:
        """The texts of all files, in order."""
        for name in self.source.files:
            for document in self.read_file(name):
                yield document.text

    def read_file(self, filepath: str) -> Iterator[Document]:
        """The documents of one file, in order. Raises UserError that names the file and the place of a fault."""
        where = f"{self.source.root.rstrip('/')}/{filepath}"
        if not is_remote(self.source.root):
            yield from self._documents(self.data_folder, filepath, where)
            return
        with nullcontext(self.spool) if self.spool else TemporaryDirectory(prefix="khanhllm-") as spool:
            # read only complete, checked files: damage found later would already be in the model
            bare = Path(without_query(filepath, self.source.root)).name
            path = Path(spool, blake2b(where.encode(), digest_size=8).hexdigest(), bare)
            path.parent.mkdir(parents=True, exist_ok=True)
            yield from self._documents(DataFolder(str(path.parent), fs=LocalFileSystem()), path.name, where, path)
            self.keep -= path.stat().st_size if path.exists() else 0
            if self.keep <= 0:
                shutil.rmtree(path.parent, ignore_errors=True)

    def _documents(
        self, folder: DataFolder, filepath: str, where: str, download: Path | None = None
    ) -> Iterator[Document]:
        """download: where to download the file first."""
        try:
            if download:
                _download(where, download, self.patience)
            yield from self._read(folder, filepath, where)
        except UserError as error:
            if isinstance(error, NotItsFault):
                raise
            if download and not isinstance(error, NoConversation):  # its author may repair it
                download.unlink(missing_ok=True)
            if self.source.bad == "refuse":
                raise
            self.skipped[ending(Path(filepath).name)] += 1

    def _read(self, folder: DataFolder, filepath: str, where: str) -> Iterator[Document]:
        form = kind(filepath)
        with as_user_error(where), folder.open(filepath, "rb") as raw:
            _check_beginning(raw, where, filepath)
            for number, text in enumerate(self._texts(raw, where, form)):
                if text.strip():
                    yield Document(text=text, id=f"{filepath}/{number}")
                else:
                    self.blank += 1

    def _conversations(self, raw: Any, where: str, form: str) -> Iterator[str]:
        """With data.bad = skip, a conversation that breaks a rule is left out by itself."""
        for record, place in records(raw, where, form):
            try:
                yield to_json(conversation(record, place, self.source.column))
            except UserError:
                if self.source.bad == "refuse":
                    raise
                self.skipped["conversation"] += 1

    def _texts(self, raw: Any, where: str, form: str) -> Iterator[str]:
        if self.source.laid_for:
            return self._conversations(raw, where, form)
        if form == "warc":
            name = without_query(where).lower()
            return pages(gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw, where)
        if form == "page":
            return iter([page(raw.read())])
        wanted = self.source.column
        if form in ("lines", "json"):
            return (_of_object(record, wanted, place) for record, place in records(raw, where, form))
        if form != "text":
            return (_rows if form == "table" else _cells)(raw, where, wanted)
        if self.source.name == "stdlib" and not _is_utf8(Path(where)):
            return iter(())  # Python's own tests keep a few files in other encodings
        return documents(decoded(unpacked(raw, where), where), self.source.document_bytes)


def holds_conversations(source: Source, spool: Path | None = None) -> bool:
    """Whether the first file that can be read and is not empty begins with a conversation, right or wrong. spool: where
    its download stays for another reader."""
    for name in source.files:
        if not holds_records(name, source.root):
            break
        try:
            for _ in Reader(replace(source, laid_for=1), [], spool).read_file(name):
                return True  # a file without records decides nothing
        except NoConversation:
            break
        except WrongConversation:
            return True
        except UserError:  # who reads on will hear what is wrong with it
            continue
    return False


def for_conversations(source: Source, context: int, tokenizer: Tokenizer, clean: str) -> Source:
    """The source with its conversations, to be packed into rows of `context` tokens, instead of its texts."""
    Marks.of(tokenizer)
    if clean:
        raise UserError(f"data.clean = {clean} cleans texts, and {source.name} holds conversations; leave it out")
    sizes_of = zip(source.files, source.text_bytes, strict=True)
    kept = [(name, size) for name, size in sizes_of if holds_records(name, source.root)]
    if not kept:
        where = f"those lie in JSON lines, .json or parquet ({SHAPES}); plain text needs --train.targets all"
        raise UserError(f"{source.name} holds no conversations: {where}")
    lost = Counter(ending(Path(name).name) for name in source.files if not holds_records(name, source.root))
    left_out = tuple((Counter(dict(source.left_out)) + lost).items())
    files, sizes = zip(*kept, strict=True)
    return replace(source, files=files, text_bytes=sizes, laid_for=context, left_out=left_out)


def _check_beginning(raw: Any, where: str, name: str) -> None:
    """Raise UserError if the first bytes show that a file is something other than its name says."""
    head = raw.read(HEAD)
    raw.seek(0)
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise UserError(f"{where} is only a Git LFS pointer to the file; type `git lfs pull` in its repository")
    if kind(name) not in ("page", "warc") and PAGE.match(head):
        raise UserError(f"{where} is a web page, not a file of text; give the address or the file of the text itself")
    for magic, packer, suffix in PACKERS:
        if head.startswith(magic) and not name.lower().endswith(suffix):
            way = f"rename it to {Path(name).name}{suffix}" if kind(name + suffix) else "unpack it first"
            raise UserError(f"{where} is packed by {packer}, though its name does not say so; {way}")


def _download(where: str, path: Path, patience: float) -> None:
    if not where.startswith("hf://"):
        fetch(where, path, patience=patience, check=_check_packed, page=kind(where) != "text")
        return
    from huggingface_hub import get_token, hf_hub_url

    _, owner, name, inside = where.removeprefix("hf://").split("/", 3)
    url = hf_hub_url(f"{owner}/{name}", inside, repo_type="dataset")
    try:
        fetch(url, path, token=get_token() or "", patience=patience, check=_check_packed)
    except Denied as error:
        raise Denied(f"{error}; {LOGIN}") from None


def _check_packed(path: Path) -> None:
    """Read a packed file to its end, where its checksum is. Raises the library's error if it is damaged."""
    name = path.name.removesuffix(".part")
    with path.open("rb") as raw:
        _check_beginning(raw, name, name)
    if name.endswith(".parquet"):
        ParquetFile(path).metadata  # noqa: B018
    elif name.endswith((".gz", ".zst")):
        with path.open("rb") as raw:
            for _ in unpacked(raw, name):
                pass


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


def _rows(raw: Any, where: str, wanted: str) -> Iterator[str]:
    """The texts of a parquet table; only columns that may hold them are read."""
    with ParquetFile(raw, buffer_size=BLOCK, pre_buffer=False, page_checksum_verification=True) as table:
        schema = table.schema_arrow
        if "." in wanted and wanted not in schema.names and _is_field(schema, wanted):
            columns, inside = [wanted.split(".")[0]], wanted.split(".")[1:]
        else:
            columns, inside = text_columns(schema.names, wanted, where), []
            columns = [name for name in columns if _holds_text(schema.field(name).type)] or columns[:1]
        batches = (
            batch
            for group in range(table.num_row_groups)
            for batch in table.iter_batches(
                _at_once(table.metadata.row_group(group)), [group], [wanted] if inside else columns
            )
        )
        rows = (values for batch in batches for values in zip(*map(batch.column, columns), strict=True))
        for number, values in enumerate(rows, 1):
            place = f"{where}, row {number}"
            row = {
                name: _utf8(_inside(value.as_py(), inside), place) for name, value in zip(columns, values, strict=True)
            }
            column = filled(columns, row)
            yield _text(row[column], wanted or column, place)


def _is_field(schema: Any, path: str) -> bool:
    """Whether `doc.text` is the field text of a column doc, and so on."""
    fields = {name: schema.field(name) for name in schema.names}
    for name in path.split("."):
        if name not in fields:
            return False
        kind = fields[name].type
        fields = {kind.field(nth).name: kind.field(nth) for nth in range(kind.num_fields)} if is_struct(kind) else {}
    return True


def _inside(value: Any, path: list[str]) -> Any:
    for name in path:
        value = (value or {}).get(name)
    return value


def _utf8(value: Any, where: str) -> Any:
    """Text that a table keeps as bytes, as text."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text (byte {error.start} of the cell); convert it to UTF-8") from None


def _holds_text(kind: Any) -> bool:
    name = str(kind)
    return ("string" in name or "binary" in name) and not name.startswith(("list", "large_list", "struct", "map"))


def _at_once(group: Any) -> int:
    """How many rows of a row group to unpack at once: about ROWS_BYTES of them."""
    return int(min(max(ROWS_BYTES * group.num_rows // max(group.total_byte_size, 1), 1), 1000))


def _cells(raw: Any, where: str, wanted: str) -> Iterator[str]:
    """The texts of a csv or tsv file. Rows are counted as a spreadsheet does: the header is row 1.

    A tsv file has no quoting: a quote is a character of the text, and every line is a row.
    """
    row = 1

    def decoded_lines() -> Iterator[str]:
        for number, line in enumerate(lines(as_utf8(unpacked(raw, where), where))):
            if b"\0" in line:
                raise UserError(f"{where}, row {row} holds NUL bytes; is it text? Convert it to UTF-8")
            try:
                yield line.decode("utf-8" if number else "utf-8-sig") + "\n"
            except UnicodeDecodeError as error:
                fault = f"is not UTF-8 text (byte {error.start} of the line)"
                raise UserError(f"{where}, row {row} {fault}; convert it to UTF-8") from None

    csv.field_size_limit(FIELD)
    tabs = without_query(where).lower().endswith((".tsv", ".tsv.gz"))
    quoting: Any = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    rows = csv.reader(decoded_lines(), delimiter="\t" if tabs else ",", quoting=quoting, strict=True)
    try:
        header = [name.strip() for name in next(rows)]
        if not any(header):
            raise UserError(f"{where} has no header; its first row must name the columns")
        columns = text_columns(header, wanted, f"{where}, row 1")
        row = 2
        for cells in rows:
            if cells and len(cells) != len(header):
                why = "; tsv has no quoting, so a field with a tab or a line break belongs in a csv" if tabs else ""
                raise UserError(f"{where}, row {row} has {len(cells)} fields, but the header names {len(header)}{why}")
            if cells:
                texts = {name: cells[header.index(name)] for name in columns}
                yield texts[filled(columns, texts)]
            row += 1
    except csv.Error as error:
        why = next((meaning for mark, meaning in CSV_FAULTS.items() if mark in str(error)), str(error))
        raise UserError(f"{where}, row {row}: {why}") from None


def _of_object(record: Any, wanted: str, place: str) -> str:
    if not isinstance(record, dict):
        raise UserError(f"{place} is not a JSON object with a text under the key '{wanted or 'text'}'")
    outer, dot, inner = wanted.partition(".")
    if dot and wanted not in record and isinstance(record.get(outer), dict):
        return _of_object(record[outer], inner, f"{place}, '{outer}'")
    if dot and outer in record and record[outer] is None:
        return ""  # as in a table, where a missing struct has no text
    column = filled(text_columns(list(record), wanted, place), record)
    return _text(record[column], column, place)


def _text(text: Any, column: str, where: str) -> str:
    if not isinstance(text, str | None):
        raise UserError(f"{where}: '{column}' must be text, not {type(text).__name__}")
    text = text or ""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
