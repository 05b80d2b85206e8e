"""How well the model knows unseen text: cross entropy (nats per token) and bits per byte, which does not depend on
the tokenizer and compares with gzip."""

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch

from khanhllm.config import MachineConfig, UserError
from khanhllm.data.documents import Reader
from khanhllm.data.shards import MANIFEST, Shards
from khanhllm.data.sources import locate
from khanhllm.machine.runtime import Machine
from khanhllm.model import Transformer
from khanhllm.saved import Saved, open_run
from khanhllm.tokenizer import Tokenizer

ROWS_OF_TOKENS = 4096
"""tokens scored at a time; without gradients they take little memory"""


class Score(TypedDict):
    val_ce: float
    """nats per token"""
    val_bpb: float
    """bits per byte of raw text"""
    val_bytes: int
    val_tokens: int


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


@torch.no_grad()
def expert_load(saved: Saved, windows: Iterable[np.ndarray]) -> list[list[float]]:
    """Each expert's share of these windows' tokens, for each mixture layer: (L, E)."""
    total_LE = torch.zeros(len(saved.config.model.moe_layers), saved.config.model.experts)
    for window in windows:
        ids_BT = torch.from_numpy(window[None, :-1]).to(saved.machine.device)
        with saved.machine.autocast():
            _, routings = saved.model.trunk(ids_BT)
        total_LE += torch.stack([routing.load_E for routing in routings]).cpu()
    shares: list[list[float]] = (total_LE / total_LE.sum(-1, keepdim=True)).tolist()
    return shares


@torch.no_grad()
def score(
    model: Transformer, windows: Iterable[np.ndarray], token_bytes: np.ndarray, machine: Machine, rows: int
) -> Score:
    """Score every token of `windows` but the first of each; (up to context + 1,) ids each, `rows` at a time.

    token_bytes: raw bytes of each token of the vocabulary, 0 for special tokens. Their loss counts (knowing where a
    document ends is part of knowing the text), their bytes do not, so val_bytes is the size of the text itself.
    """
    nats, size, tokens = 0.0, 0, 0
    for batch in _same_length(windows, rows):
        ids = torch.from_numpy(batch).to(machine.device)
        with machine.autocast():
            nll_BT, _ = model(ids[:, :-1], ids[:, 1:])
        nats += nll_BT.cpu().double().sum().item()
        size += int(token_bytes[batch[:, 1:]].sum())
        tokens += nll_BT.numel()
    if not tokens:
        raise UserError("there is no text to score")
    return Score(val_ce=nats / tokens, val_bpb=nats / math.log(2) / max(size, 1), val_bytes=size, val_tokens=tokens)


def _same_length(windows: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """Stack neighbours of equal length; the shorter tails go alone."""
    for group in _groups(windows, rows):
        lengths = sorted({len(window) for window in group}, reverse=True)
        for length in lengths:
            yield np.stack([window for window in group if len(window) == length])


def _groups(windows: Iterable[np.ndarray], rows: int) -> Iterator[list[np.ndarray]]:
    rest = iter(windows)
    while group := list(islice(rest, rows)):
        yield group
