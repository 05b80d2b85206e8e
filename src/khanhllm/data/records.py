"""The records of a file, whole, each with its place: what conversations are read from."""

from collections.abc import Iterator
from typing import Any

from pyarrow.parquet import ParquetFile

from khanhllm.data.json_values import values
from khanhllm.data.plain import BLOCK, as_utf8, decoded
from khanhllm.data.unpacked import lines, parsed, unpacked
from khanhllm.data.walk import kind

FORMS = ("lines", "json", "table")
"""kinds of files (walk.py) that hold records"""
AT_ONCE = 256
"""rows of a table that are unpacked at once"""


def records(raw: Any, where: str, form: str) -> Iterator[tuple[Any, str]]:
    """Each record of an open file, and where it stands, for errors."""
    if form == "lines":
        for number, line in enumerate(lines(as_utf8(unpacked(raw, where), where)), 1):
            if line.strip():
                place = f"{where}, line {number}"
                yield parsed(line, place), place
    elif form == "json":
        for number, record in enumerate(values(decoded(unpacked(raw, where), where), where), 1):
            yield record, f"{where}, item {number}"
    else:
        with ParquetFile(raw, buffer_size=BLOCK, pre_buffer=False, page_checksum_verification=True) as table:
            rows = (row for batch in table.iter_batches(AT_ONCE) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield row, f"{where}, row {number}"


def holds_records(name: str, root: str) -> bool:
    """Whether a file of this name, which lies under `root`, can hold conversations."""
    return kind(name, root) in FORMS
