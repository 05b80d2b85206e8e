"""What the parts of a source string mean, by their letters alone: `#column`, `{a,b}` and `{0..9}`, `:split`."""

import glob
from pathlib import Path

from khanhllm.config import UserError

COLUMNS = ("text", "content", "document", "body", "article")
"""where the text is looked for when the source names no column, first wins"""


def with_column(source: str) -> tuple[str, str]:
    """A source and the column its end names, or "". A path that exists wins over that reading of its '#'."""
    place, mark, column = source.rpartition("#")
    if not mark or "/" in column or _exists(source):
        return source, ""
    if not place or not column:
        raise UserError(f"{source} names no column; write it behind the '#', as in my.csv#body")
    return place, column


def _exists(source: str) -> bool:
    path = Path(source).expanduser()
    return path.exists() or any(True for _ in glob.iglob(str(path), recursive=True))  # noqa: PTH207, absolute patterns


def text_column(names: list[str], wanted: str, where: str) -> str:
    """The column that holds the text. Raises UserError that names those that there are."""
    found = next((name for name in ([wanted] if wanted else COLUMNS) if name in names), None)
    if found is None:
        there = ", ".join(" ".join(name.split())[:40] for name in names) or "nothing"
        raise UserError(f"{where} has no text column '{wanted or 'text'}'; it has: {there}; name one: SRC#column")
    return found
