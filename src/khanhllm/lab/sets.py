"""Sets of questions from files: found in a folder, downloaded, read.

The files are JSON lines, plain or gzipped, as their authors publish them: BLiMP's pairs of sentences, and what
llm-foundry has for DCLM's CORE: {query, choices, gold}, {context, continuation}, {context_options, continuation, gold}.
"""

import gzip
import hashlib
import io
import json
import tomllib
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from khanhllm.draw import visible
from khanhllm.errors import UserError
from khanhllm.files import SMALL, read
from khanhllm.lab.answers import Question

TABLE = Path(__file__).with_name("sets.toml")
"""addresses and sha256 of what can be downloaded"""


class Set(NamedTuple):
    """A file of questions."""

    rows: list[dict[str, Any]]
    path: Path
    sha256: str
    """of the JSON lines, unpacked"""


def published() -> dict[str, tuple[str, str]]:
    """The address and the sha256 of each file that can be downloaded, by its name."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return {
        Path(path).stem: (part["address"] + path, sha256)
        for part in table.values()
        for path, sha256 in part["sha256"].items()
    }


def blimp() -> list[str]:
    """The names of BLiMP's paradigms."""
    return [Path(path).stem for path in tomllib.loads(TABLE.read_text(encoding="utf-8"))["blimp"]["sha256"]]


def found(folder: Path) -> dict[str, Path]:
    """Each set in a folder and in two levels of folders below it, by its name."""
    paths = chain.from_iterable(folder.glob(f"{deep}*.jsonl*") for deep in ("", "*/", "*/*/"))
    return {
        path.name.removesuffix(".gz").removesuffix(".jsonl"): path
        for path in sorted(paths, reverse=True)
        if path.name.endswith((".jsonl", ".jsonl.gz"))
    }


def download(names: list[str], folder: Path) -> None:
    """Bring the sets that the folder lacks. Raises UserError, also if the bytes are not those that were published."""
    from khanhllm.data.fetch import fetch

    have = found(folder)
    for name, (address, sha256) in published().items():
        if name in names and name not in have:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot write {folder}: {error.strerror}") from None
            fetch(address, folder / f"{name}.jsonl", sha256=sha256, patience=60)


def load(path: Path) -> Set:
    """Read a set. Raises UserError."""
    try:
        data = read(path)
        if path.suffix == ".gz":
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(SMALL + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > SMALL:
        raise UserError(f"{path} has more than {SMALL:,} bytes; no set of questions is so large")
    rows = []
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                raise UserError(f"{path}, line {number} is not valid JSON") from None
    if not rows:
        raise UserError(f"{path} holds no questions")
    return Set(rows, path, hashlib.sha256(data).hexdigest())


def spread(count: int, most: int) -> list[int]:
    """At most so many of `count` numbers, from everywhere among them, always the same."""
    return list(range(count)) if count <= most else [nth * count // most for nth in range(most)]


def questions(source: Set, delimiter: str, most: int) -> Iterator[Question]:
    """At most so many questions of a set. delimiter: lies between a question and its answer. Raises UserError."""
    for number in spread(len(source.rows), most):
        yield question(source, number, delimiter)


def question(source: Set, number: int, delimiter: str) -> Question:
    """One row as a question. Raises UserError if it has none of the known shapes."""
    row = source.rows[number]
    try:
        shaped = _shaped(row, delimiter)
        texts = [text for choice in shaped.choices for text in choice]
        right = shaped.right if isinstance(shaped.right, int) else -1
        if all(isinstance(text, str) for text in texts) and 0 <= right < len(shaped.choices):
            return shaped
    except (KeyError, TypeError, AttributeError):
        pass
    shapes = "sentence_good and sentence_bad, query, choices and gold, or continuation and context or context_options"
    raise UserError(f"{source.path}, question {number + 1} has not {shapes}")


def _shaped(row: dict[str, Any], delimiter: str) -> Question:
    if "sentence_good" in row:
        field = visible(str(row.get("field", ""))).replace("/", "_")[:60]
        return Question([("", row["sentence_good"]), ("", row["sentence_bad"])], 0, field)
    if "choices" in row:
        asked = row["query"].strip() + delimiter
        return Question([(asked, choice.strip()) for choice in row["choices"]], row["gold"])
    options = row["context_options"] if "context_options" in row else [row["context"]]
    answer = row["continuation"].strip()
    return Question([(option.strip() + delimiter, answer) for option in options], row.get("gold", 0))
