"""Walk through folders, and tell files that hold text from others."""

import fnmatch
import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from khanhllm.data.source_syntax import COLUMNS, without_query
from khanhllm.data.warc import can_read_pages
from khanhllm.errors import UserError

TEXT = (".txt", ".text", ".md", ".rst", ".py", ".txt.gz")
LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".jsonl.zst", ".ndjson.zst", ".json.zst")
JSON = (".json",)
TABLES = (".parquet",)
SHEETS = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
WEB = (".warc", ".warc.gz", ".wet", ".wet.gz")
PAGES = (".html", ".htm")
# readers.py reads each kind.
KINDS = {"text": TEXT, "lines": LINES, "json": JSON, "table": TABLES, "sheet": SHEETS, "page": PAGES, "warc": WEB}
OWN = {"folder of shards": {"manifest.json", "tokenizer.json"}, "run": {"config.toml", "training_log.csv"}}
"""folders that KhanhLLM makes, which may lie inside a folder of texts, and what shows them; their files are no texts"""
SKIPPED = ("__pycache__", "site-packages", "dist-packages", "lost+found", "System Volume Information")
"""folders left out like hidden ones; the last two hold the system's own files, and only it may open them"""
BEGINNING = 2**16
"""bytes of a .json file that show whether it holds documents"""


def kind(name: str, root: str = "") -> str:
    """The kind of a file, a key of KINDS, by its ending; "" if it is unknown. root: where it lies, if that is a URL."""
    name = without_query(name, root).lower()
    return next((kind for kind, endings in KINDS.items() if name.endswith(endings)), "")


def walk(root: Path, left_out: Counter[str], links: bool = True) -> Iterator[Path]:
    """The files of a folder; behind its own those of linked folders. Each folder is read once, wherever links lead.

    Raises UserError for one that cannot be opened, unless `links` are left alone: those are of Python's own library.
    """
    seen: set[str] = set()
    waiting = [root]
    for start in waiting:
        for folder, folders, names in os.walk(start, onerror=_refuse if links else None):
            real = os.path.realpath(folder)
            own = [what for what, marks in OWN.items() if marks <= set(names)]
            left_out.update(own)
            if own or real in seen:
                folders.clear()
                continue
            seen.add(real)
            left_out.update(f"{name}/" for name in folders if _is_skipped(name))
            folders[:] = sorted(name for name in folders if not _is_skipped(name))
            for link in (Path(folder, name) for name in folders if links and Path(folder, name).is_symlink()):
                above = root.resolve().is_relative_to(link.resolve())
                left_out.update(["link to a folder above"] * above)
                waiting += [] if above else [link]
            left_out.update("hidden" for name in names if name.startswith("."))
            yield from (Path(folder, name) for name in names if not name.startswith("."))


def _refuse(error: OSError) -> None:
    """Nobody would notice that the text of this folder is missing. But a pattern may name one that is not there."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        why = f"{error.strerror}; make it readable, or name the others by a pattern"
        raise UserError(f"cannot read {error.filename}: {why}")


def _is_skipped(folder: str) -> bool:
    return folder in SKIPPED or folder.startswith(".")


def matching(pattern: Path) -> Iterator[Path]:
    """What a pattern matches. Python's own `**` would go round and round where links make a loop."""
    if "**" not in pattern.parts:
        yield from map(Path, glob.glob(str(pattern)))  # noqa: PTH207, Path.glob takes no absolute patterns
        return
    magic = next(nth for nth, part in enumerate(pattern.parts) if glob.has_magic(part))
    base, rest = Path(*pattern.parts[:magic]), pattern.parts[magic:]
    yield from (file for file in walk(base, Counter()) if _fits(file.relative_to(base).parts, rest))


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern or not parts:
        return not parts and set(pattern) <= {"**"}
    if pattern[0] == "**":
        return _fits(parts, pattern[1:]) or _fits(parts[1:], pattern)
    return fnmatch.fnmatch(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def once(files: Iterable[Path]) -> list[Path]:
    """The files without those that a pattern also reaches by a link to their folder."""
    shortest = sorted(files, key=lambda file: (len(file.parts), str(file)))
    return list({(os.path.realpath(file.parent), file.name): file for file in reversed(shortest)}.values())


def readable(files: Iterable[Path], column: str, left_out: Counter[str]) -> list[Path]:
    """The files that hold text; counts the others."""
    found = []
    for file in files:
        form, what = kind(file.name), ending(file.name)
        if form == "page" and not can_read_pages():
            left_out[f"{what} (needs khanhllm[web])"] += 1
        elif form == "json" and not _holds_documents(file, column):
            left_out[f"{what} without texts"] += 1
        elif form:
            found.append(file)
        else:
            left_out[what] += 1
    return found


def _holds_documents(file: Path, column: str) -> bool:
    """Whether a .json file begins with an object that has a column of text: most .json files are settings."""
    try:
        with file.open("rb") as raw:
            beginning = raw.read(BEGINNING)
    except OSError:
        return True  # `_stat` says what is wrong
    names = "|".join(map(re.escape, [column] if column else COLUMNS))
    whole = beginning.decode("utf-8-sig", "replace")
    return bool(re.match(r"\s*(\[\s*)?\{", whole) and re.search(rf'"(?:{names})"\s*:', whole))


def ending(name: str) -> str:
    """The kind of a file that is left out, in words."""
    if name.startswith("."):
        return "hidden"
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] in ([".gz"], [".zst"], [".bz2"], [".xz"]) else suffixes[-1:]) or (
        "without ending"
    )
