"""The syntax of a source string: `{a,b}` and `{0..9}`, `:split`, and the columns that hold its text."""

import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from khanhllm.errors import UserError

COLUMNS = ("text", "content", "document", "body", "article")
"""columns tried in this order, row by row, when the source names none"""


def with_home(source: str) -> Path:
    """The path with `~` expanded, if that user exists."""
    try:
        return Path(source).expanduser()
    except RuntimeError:
        return Path(source)


def without_query(name: str, root: str = "") -> str:
    """The name without what follows a '?', if it is a URL or lies under `root`, which is one; on a disk and on the hub
    a '?' is a character as any other."""
    return name.partition("?")[0] if (root or name).startswith(("http://", "https://")) else name


def text_columns(names: list[str], wanted: str, where: str) -> list[str]:
    """The columns that may hold the text, in order. Raises UserError that lists the existing ones if there is none."""
    columns = [name for name in ([wanted] if wanted else COLUMNS) if name in names]
    if not columns:
        existing = ", ".join(" ".join(name.split())[:40] for name in names) or "nothing"
        raise UserError(f"{where} has no text column '{wanted or 'text'}'; it has: {existing}; name one: SRC#column")
    return columns


def filled(columns: list[str], row: Mapping[str, Any]) -> str:
    """The first of the columns that holds text in this row; the first one if none does."""
    return next((name for name in columns if isinstance(text := row[name], str) and text.strip()), columns[0])


MOST = 100_000
"""most files that one pattern may stand for"""


def expanded(url: str) -> list[str]:
    """The addresses that braces in the path of a URL stand for, in order: `{a,b}`, `{0..9}`, `{000..100..10}`."""
    parts = re.split(r"\{([^{}]*)\}", url)
    if any(mark in part for part in parts[::2] for mark in "{}") or (len(parts) > 1 and parts[0].count("/") < 3):
        raise UserError(f"{url}: braces must come in pairs, not inside each other and not in the host's name")
    choices = [_choices(part, url) if place % 2 else [part] for place, part in enumerate(parts)]
    if math.prod(map(len, choices)) > MOST:
        raise UserError(f"{url} stands for more than {MOST:,} files")
    return list(dict.fromkeys(map("".join, itertools.product(*choices))))


def _choices(inside: str, url: str) -> list[str]:
    if "," in inside:
        return inside.split(",")
    ends = re.fullmatch(r"([0-9]{1,18})\.\.([0-9]{1,18})(?:\.\.([0-9]{1,18}))?", inside)
    if not ends:
        raise UserError(f"{url}: {{{inside}}} is neither a list {{a,b}} nor a range {{00000..00003}}")
    first, last, step = int(ends[1]), int(ends[2]), max(int(ends[3] or 1), 1)
    if abs(last - first) // step >= MOST:
        raise UserError(f"{url} stands for more than {MOST:,} files")
    padded = any(end[0] == "0" and len(end) > 1 for end in (ends[1], ends[2]))
    width = max(len(ends[1]), len(ends[2])) if padded else 0
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    return [f"{number:0{width}d}" for number in numbers]


def common_folder(names: list[str]) -> tuple[str, list[str]]:
    """The folder that all names lie under, and the names relative to it. What follows a '?' is not part of a path."""
    folders = [without_query(name).split("/")[:-1] for name in names]
    levels = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False))
    root = "/".join(level[0] for level in levels)
    return root, [name[len(root) + 1 :] for name in names]


SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def with_split(path: str) -> tuple[str, str]:
    """Split `path:split` on the hub in two; the split is "" if there is none."""
    place, mark, split = path.rpartition(":")
    if not mark or "/" in split:
        return path, ""
    if not re.fullmatch(r"[\w.-]+", split) or not _words(split):
        raise UserError(f"'{split}' is not the name of a split; write it as in {place}:train")
    return place, split


def of_split(names: list[str], split: str = "", source: str = "the source") -> list[str]:
    """The files that belong to a split; without one, the files to train on.

    The file's own name decides, else the nearest folder's. With no split named, files for training are preferred to
    unmarked ones, and these to files for validation and test, which are taken only where there is nothing else.
    """
    marks = [_splits(name) for name in names]
    pairs = list(zip(names, marks, strict=True))
    if not split:
        training = [name for name, mark in pairs if mark == {"train"}]
        return training or [name for name, mark in pairs if not mark] or names
    wanted = _words(split)
    if wanted <= set(SPLITS.values()):
        chosen = [name for name, mark in pairs if wanted <= mark]
    else:
        chosen = [name for name in names if any(wanted <= _words(part) for part in name.split("/"))]
    if not chosen:
        known = ", ".join(sorted(set().union(*marks))) or "none"
        raise UserError(f"no file of {source} belongs to the split '{split}'; splits seen: {known}")
    return chosen


def _splits(name: str) -> set[str]:
    known = (_words(part) & set(SPLITS.values()) for part in reversed(name.split("/")))
    return next(filter(None, known), set())


def _words(part: str) -> set[str]:
    return {SPLITS.get(word, word) for word in re.split(r"[\W\d_]+", part.lower()) if word}
