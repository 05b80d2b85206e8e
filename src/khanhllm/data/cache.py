"""Where shards lie in the cache: those of a recipe, and those that moved with their run."""

import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from khanhllm.data.shards import MANIFEST
from khanhllm.data.source_syntax import with_home
from khanhllm.files import there
from khanhllm.schema import DataConfig


def place_of(folder: str, cache: str) -> Path:
    """Where the shards lie that a run had in `folder`: there, or in its cache, if that was moved with the run."""
    moved = with_home(cache) / Path(folder).name
    return moved if there(moved / MANIFEST) and not there(Path(folder) / MANIFEST) else Path(folder)


def folder_of(data: DataConfig, recipe: list[Any]) -> Path:
    """The folder of a recipe in the cache, whatever its source was called when it was made."""
    cache, digest = with_home(data.cache), hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    with suppress(OSError):  # who makes the folder tells what is wrong with the cache
        for made in cache.glob(f"*-{digest}"):
            return made
    slug = re.sub(r"[^a-z0-9]+", "-", data.source.lower()).strip("-")[-40:].strip("-") or "text"
    return cache / f"{slug}-{digest}"
