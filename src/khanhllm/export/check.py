"""Does what was written compute what we compute? It is read back and both are run on the same windows of text."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from khanhllm.data.shards import Shards
from khanhllm.data.tokenizer import Tokenizer
from khanhllm.errors import UserError
from khanhllm.model import Transformer
from khanhllm.model.counts import on_paper
from khanhllm.model.rope import Rope
from khanhllm.schema import ModelConfig

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
WINDOWS, LENGTH = 64, 64
ROWS = 8
"""windows computed at a time"""
# What the rounding of the weights explains, with room. No bound on single logits: where two experts are nearly level, a
# difference in the last digit sends a token to the other one.
MOST_KL = {"f32": 1e-5, "f16": 1e-4, "bf16": 5e-2, "q8_0": 5e-2}


class Exported(NamedTuple):
    """What a reader finds in a folder or file."""

    model: ModelConfig
    weights: Mapping[str, Tensor]
    """by our names, fp32"""
    tokens: int
    """of the tokenizer"""
    end_of_text: int | list[int] | None


@dataclass(frozen=True)
class Difference:
    """How far the exported model is from ours, over all positions of all windows."""

    logit: float
    """largest difference of two logits"""
    kl: float
    """mean Kullback-Leibler divergence of the next token's distribution (nats)"""
    same: float
    """share of the positions where both find the same token likeliest"""
    positions: int

    def describe(self) -> str:
        return (
            f"{self.positions:,} positions: logits differ by at most {self.logit:.1e}, "
            f"mean KL divergence {self.kl:.1e} nats, same likeliest token {self.same:.1%}"
        )


def assembled(model: ModelConfig, weights: Mapping[str, Tensor]) -> Transformer:
    """A model around these very tensors, which may be mapped from a file: nothing is copied."""
    built = on_paper(model)
    built.load_state_dict(dict(weights), assign=True)
    if model.style == "modern":
        rope = Rope(model.head_dim, model.context, model.rope_theta)
        for block in built.blocks:
            block.attention.rope = rope  # type: ignore[union-attr]
    return built.float().eval()


def rounded(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as it is written. UserError if f16 has no number for it."""
    found = weight.to(dtype).contiguous()
    if dtype == torch.float16 and not found.isfinite().all():
        raise UserError(f"{name} holds numbers beyond the range of f16; export with --dtype bf16 or f32")
    return found


def windows(data: Path, tokenizer: Tokenizer, context: int) -> tuple[Tensor, str]:
    """Up to 64 windows of the text that the run held out, (64, T), or ids drawn at random if its shards are gone; and
    which of the two they are, in words."""
    length = min(LENGTH, context)
    try:
        shards = Shards.open(data, "validation", context)
        whole = (window[:length] for window in shards.windows() if len(window) >= length)
        if shards.manifest.tokenizer == tokenizer.sha256 and (found := list(islice(whole, WINDOWS))):
            return torch.from_numpy(np.stack(found).astype(np.int64)), "held-out text"
    except (UserError, ValueError):
        pass
    dice = torch.Generator().manual_seed(0)
    return torch.randint(tokenizer.vocab_size, (WINDOWS, length), generator=dice), "ids drawn at random"


@torch.inference_mode()
def compare(ours: Transformer, theirs: Transformer, ids_NT: Tensor) -> Difference:
    logit, kl, same, positions = 0.0, 0.0, 0, 0
    for ids_BT in ids_NT.split(ROWS):
        a_BTV, b_BTV = ours.logits(ids_BT), theirs.logits(ids_BT)
        logit = max(logit, float((a_BTV - b_BTV).abs().max()))
        p_BTV, q_BTV = a_BTV.log_softmax(-1), b_BTV.log_softmax(-1)
        kl += float((p_BTV.exp() * (p_BTV - q_BTV)).sum())
        same += int((a_BTV.argmax(-1) == b_BTV.argmax(-1)).sum())
        positions += ids_BT.numel()
    return Difference(logit, max(kl / positions, 0.0), same / positions, positions)


def check(
    ours: tuple[ModelConfig, Mapping[str, Tensor]],
    found: Exported,
    meant: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    text: tuple[Tensor, str],
    dtype: str,
) -> str:
    """Compare a model with what was read back of its export, and describe the difference in one line.

    meant: the weights that were written, before rounding to `dtype`. text: what `windows` found. Raises UserError,
    naming the first fault: an end-of-text or a tokenizer that is another, a tensor that is not the one meant (but of
    q8_0), or predictions further away in the mean than rounding explains.
    """
    if found.end_of_text != tokenizer.end_of_text or found.tokens != tokenizer.vocab_size:
        raise UserError("the tokenizer reads back differently from what was written; nothing was published")
    if dtype in DTYPES:
        for name, weight in meant.items():
            back = found.weights.get(name, weight.new_empty(0)).float()  # norms and routers may stay in fp32
            if not (torch.equal(weight.to(DTYPES[dtype]).float(), back) or torch.equal(weight.float(), back)):
                raise UserError(f"{name} reads back differently from what was written; nothing was published")
    ids_NT, source = text
    difference = compare(assembled(*ours), assembled(found.model, found.weights), ids_NT)
    if not difference.kl <= MOST_KL[dtype]:
        raise UserError(f"the exported model computes something else; nothing was published. {difference.describe()}")
    return f"on {source}, {difference.describe()}"
