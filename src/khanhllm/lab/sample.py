"""A sample of text to examine a run on, in windows of one length: of what it held out, or of any source."""

import shutil
from collections.abc import Iterator
from itertools import chain, islice, zip_longest
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from khanhllm.data.batches import batch_of
from khanhllm.data.counting import Reading, padding, places
from khanhllm.data.shards import Shards
from khanhllm.errors import UserError
from khanhllm.runs.evaluate import conversations, held_out, prepared, windowed
from khanhllm.runs.run import Run

if TYPE_CHECKING:
    from khanhllm.data.sources import Source

ENOUGH = 10**12
"""tokens; more are as many as there are"""
MOST_PARTS = 12
"""parts of a source that are told apart: those with most text"""


class Sample(NamedTuple):
    """Windows of text, and where they come from."""

    ids: np.ndarray
    """(W, T + 1), int64"""
    part_W: np.ndarray
    """the part that each window comes from"""
    parts: list[str]
    """their names; one if nobody asked"""
    source: str
    """what it was taken from, in words"""
    reading: Reading | None = None
    """how the run reads it, if not as one text: of conversations only answers count, and none sees another"""

    @property
    def text_WT(self) -> np.ndarray:
        """Which inputs are text: not those that only fill a row."""
        text_WT = np.ones(self.ids[:, :-1].shape, bool)
        return text_WT if self.reading is None else ~padding(self.ids, self.reading.end_of_text)

    @property
    def place_WT(self) -> np.ndarray:
        """The position of each input, in its own document if documents do not see each other."""
        if self.reading is not None and self.reading.document_mask:
            return places(self.ids[:, :-1], self.reading.end_of_text)
        return np.broadcast_to(np.arange(self.ids.shape[1] - 1), self.ids[:, :-1].shape)

    def bytes_W(self, token_bytes: np.ndarray) -> np.ndarray:
        """The bytes of text that count in each window."""
        batch = batch_of(self.ids, reading=self.reading)
        size = torch.from_numpy(token_bytes)[batch.targets_BT]
        found: np.ndarray = batch.by_row(size if batch.counted_N is None else size.flatten()[batch.counted_N]).numpy()
        return found


def take(opened: Run, source: str | None, tokens: int, part: str | None = None) -> Sample:
    """About `tokens` tokens, in equal shares of each part: from all over shards, of other text the first of each
    source. Raises UserError if there are not two windows of them."""
    with TemporaryDirectory(prefix="khanhllm-") as spool:
        return _take(opened, source, tokens, part, Path(spool))


def _take(opened: Run, source: str | None, tokens: int, part: str | None, spool: Path) -> Sample:
    """spool: keeps what was downloaded to see what it holds until it is read."""
    context = opened.config.model.context
    windows = max(2, -(-min(tokens, ENOUGH) // context))
    shards = held_out(opened) if source is None else prepared(source, opened)
    if shards and part:
        raise UserError("prepared shards do not remember parts of their text; with --part, name a text (--data)")
    rows = conversations(source, opened, spool) if source is not None and not shards else None
    if rows is not None and part:
        raise UserError(f"rows of conversations hold several; leave out --part {part}")
    if shards:
        ids, names, part_of = _spread(shards, windows), ["all"], [0]
        told = f"held-out text of {shards.manifest.source}"
    elif rows is not None:
        ids, names, part_of, told = list(islice(rows, windows)), ["all"], [0], str(source)
    else:
        ids, names, part_of = _by_part(opened, str(source), windows, part, spool)
        told = str(source)
    if len(ids) < 2:
        raise UserError(f"{told} has not two windows of {context} tokens (model.context); name more text (--data)")
    reading = Reading.of(opened.config.train, opened.tokenizer)
    return Sample(np.stack(ids), np.resize(part_of, len(ids)), names, told, reading)


def _spread(shards: Shards, windows: int) -> list[np.ndarray]:
    """Rows from all over the shards."""
    picked = np.linspace(0, shards.rows, min(windows, shards.rows), endpoint=False).astype(int)
    return [shards.row(index) for index in picked.tolist()]


def _by_part(
    opened: Run, source: str, windows: int, part: str | None, spool: Path
) -> tuple[list[np.ndarray], list[str], list[int]]:
    """Windows, the names of the parts that have one, and the part of each window."""
    groups = _groups(source, part)
    ids: list[np.ndarray] = []
    names: list[str] = []
    part_of: list[int] = []
    for name, files in groups.items():
        own = list(islice(_windows(opened, files, spool), -(-windows // len(groups))))
        shutil.rmtree(spool, ignore_errors=True)  # many parts may be more than the disk holds
        if own:
            ids += own
            part_of += [len(names)] * len(own)
            names.append(name)
    return ids, names, part_of


def _groups(source: str, part: str | None) -> dict[str, list[tuple["Source", str]]]:
    """The files of each part, each with the source it belongs to; of many parts, those with most text."""
    from khanhllm.data.sources import components, locate

    groups: dict[str, list[tuple[Source, str]]] = {}
    sizes: dict[str, int] = {}
    for component, _ in components(source):
        place = locate(component)
        for file, size in zip(place.files, place.text_bytes, strict=False):
            folder = str(PurePosixPath(file).parent)
            name = {"file": file, "folder": folder, "source": component}.get(part or "", "all")
            groups.setdefault(name, []).append((place, file))
            sizes[name] = sizes.get(name, 0) + size
    largest = sorted(groups, key=lambda name: -sizes[name])[:MOST_PARTS]
    return {name: groups[name] for name in largest}


def _windows(opened: Run, files: list[tuple["Source", str]], spool: Path) -> Iterator[np.ndarray]:
    """The text of some files as windows of context + 1 ids, of each source in turn; a rest that fills none is left
    out."""
    from khanhllm.data.readers import Reader

    def of(place: "Source") -> Iterator[np.ndarray]:
        names, reader = (file for other, file in files if other is place), Reader(place, [], spool)
        return windowed((document.text for name in names for document in reader.read_file(name)), opened)

    places = {id(place): place for place, _ in files}.values()
    turns = chain.from_iterable(zip_longest(*map(of, places)))
    return (window for window in turns if window is not None and len(window) > opened.config.model.context)
