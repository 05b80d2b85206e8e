"""Score how well a model predicts text: cross entropy (nats per token) and bits per byte, which does not depend on the
tokenizer and compares with gzip."""

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypedDict

import numpy as np
import torch

from khanhllm.data.batches import batch_of
from khanhllm.data.counting import Reading
from khanhllm.errors import UserError
from khanhllm.machine.devices import Machine
from khanhllm.model import Transformer


class Score(TypedDict):
    """How well a model predicts a text."""

    val_ce: float
    """nats per token"""
    val_bpb: float
    """bits per byte of raw text"""
    val_bytes: int
    val_tokens: int


@torch.no_grad()
def expert_load(model: Transformer, windows: Iterable[np.ndarray], machine: Machine) -> list[list[float]]:
    """Each expert's share of these windows' tokens, for each mixture layer: (L, E)."""
    total_LE = torch.zeros(len(model.config.moe_layers), model.config.experts)
    for window in windows:
        ids_BT = torch.from_numpy(window[None, :-1]).to(machine.device)
        with machine.autocast():
            _, routings = model.trunk(ids_BT)
        total_LE += torch.stack([routing.load_E for routing in routings]).cpu()
    shares: list[list[float]] = (total_LE / total_LE.sum(-1, keepdim=True)).tolist()
    return shares


@torch.no_grad()
def score(
    model: Transformer,
    windows: Iterable[np.ndarray],
    token_bytes: np.ndarray,
    machine: Machine,
    rows: int,
    reading: Reading | None = None,
) -> Score:
    """Score every token of `windows` but the first of each, or what else counts in the `reading`; (up to
    context + 1,) ids each, `rows` at a time.

    token_bytes: number of bytes of each token of the vocabulary, 0 for special tokens. The loss of special tokens
    counts (to know where a document ends is part of knowing the text); so val_bytes is the size of the text itself.
    """
    nats, size, tokens = 0.0, 0, 0
    for ids_BT in _same_length(windows, rows):
        batch = batch_of(ids_BT, reading=reading)
        counted = slice(None) if batch.counted_N is None else batch.counted_N.numpy()
        size += int(token_bytes[ids_BT[:, 1:].flatten()[counted]].sum())
        tokens += batch.counted
        batch = batch.map(lambda tensor: tensor.to(machine.device))
        with machine.autocast():
            nll, _ = model(batch.inputs_BT, batch.targets_BT, *batch.extras)
        nats += nll.cpu().double().sum().item()
    if not tokens:
        raise UserError("there is no answer to score" if reading and reading.marks else "there is no text to score")
    return Score(val_ce=nats / tokens, val_bpb=nats / math.log(2) / max(size, 1), val_bytes=size, val_tokens=tokens)


def _same_length(windows: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """Stack neighbours of equal length; shorter tails become arrays of their own."""
    rest = iter(windows)
    while group := list(islice(rest, rows)):
        lengths = sorted({len(window) for window in group}, reverse=True)
        for length in lengths:
            yield np.stack([window for window in group if len(window) == length])
