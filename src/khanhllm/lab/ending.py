"""How an examination ends: with a picture if it can be drawn, a table or JSON, and the names of what was written."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from khanhllm.errors import missing_extra


def drawn(picture: Path, draw: Callable[[], None]) -> str:
    """Draw a picture. Returns its name, or why there is none."""
    try:
        draw()
    except ModuleNotFoundError as error:
        return f"no picture: {missing_extra(error) or error}"
    return str(picture)


def show(found: dict[str, Any], parts: Iterable[RenderableType], lines: Iterable[str], as_json: bool) -> None:
    """Print what was found: as JSON, or part by part, and then lines as they are."""
    if as_json:
        print(json.dumps(found))
        return
    console = Console(highlight=False)
    for part in parts:
        console.print(part)
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
