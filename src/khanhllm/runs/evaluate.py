"""Score a run on the text that it held out, or on any other."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from khanhllm.data.documents import Reader
from khanhllm.data.shards import MANIFEST, Shards
from khanhllm.data.sources import locate
from khanhllm.data.tokenizer import Tokenizer
from khanhllm.errors import UserError
from khanhllm.inference.score import Score, score
from khanhllm.runs.run import Saved, open_run
from khanhllm.schema import MachineConfig

ROWS_OF_TOKENS = 4096
"""tokens scored at a time; without gradients they take little memory"""


def score_run(run: Path, source: str | None = None, machine_config: MachineConfig | None = None) -> Score:
    """Score a run on all that it held out, or on every byte of another source."""
    saved = open_run(run, machine_config)
    return score_windows(saved, windows_of(source, saved) if source else held_out(saved).windows())


def score_windows(saved: Saved, windows: Iterable[np.ndarray]) -> Score:
    rows = max(1, ROWS_OF_TOKENS // saved.config.model.context)
    return score(saved.model, windows, saved.tokenizer.token_bytes, saved.machine, rows)


def held_out(saved: Saved) -> Shards:
    """The validation documents of a run. UserError if its shards are gone."""
    return _matching(saved.data, saved)


def windows_of(source: str, saved: Saved) -> Iterator[np.ndarray]:
    """The text of any source as windows to score; of prepared shards, the validation split."""
    if (Path(source) / MANIFEST).exists():
        yield from _matching(Path(source), saved).windows()
        return
    context, kept = saved.config.model.context, np.empty(0, np.int64)
    for ids in _tokens(source, saved.tokenizer):
        kept = np.concatenate((kept, ids))
        while len(kept) > context:
            yield kept[: context + 1]
            kept = kept[context:]
    if len(kept) > 1:
        yield kept


def _tokens(source: str, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Each document of a source as training sees it: after an end-of-text."""
    place = locate(source)
    groups = place.groups()
    reader = Reader(place, groups)
    for rank in range(len(groups)):
        for document in reader.run(rank=rank):
            yield np.array([tokenizer.end_of_text, *tokenizer.encode(document.text)], np.int64)


def _matching(folder: Path, saved: Saved) -> Shards:
    shards = Shards.open(folder, "validation", saved.config.model.context)
    if (shards.manifest.tokenizer, shards.vocab_size) != (saved.tokenizer.sha256, saved.tokenizer.vocab_size):
        raise UserError(f"{folder} was prepared with another tokenizer than the run's; score its text instead (--data)")
    return shards
