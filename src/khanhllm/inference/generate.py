"""Generate text: prefill the prompt, then one token at a time from the cache, and yield text as it comes."""

import codecs
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from khanhllm.data.tokenizer import Tokenizer
from khanhllm.errors import UserError
from khanhllm.machine.devices import Machine
from khanhllm.model import Transformer
from khanhllm.schema import Sampling


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The pieces up to the first text of `stops` that is complete, without it; a text may lie across several pieces.

    What may be the beginning of a stop is held back until the next pieces decide, so that no part of one is shown.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [(at + len(stop), at) for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            held = held[: min(found)[1]]
            break
        keep = max((size for stop in stops for size in range(len(stop)) if held.endswith(stop[:size])), default=0)
        if ready := held[: len(held) - keep]:
            yield ready
        held = held[len(held) - keep :]
    if held:
        yield held


def write(model: Transformer, tokenizer: Tokenizer, machine: Machine, prompt: str, sampling: Sampling) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece, up to `sampling.tokens` tokens or the end of the document."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span several tokens
    ids = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    for token in continuation(model, ids, sampling, machine, tokenizer.vocab_size):
        if token == tokenizer.end_of_text:
            break
        if piece := decoder.decode(tokenizer.decode_bytes([token])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


def most_read(context: int) -> int:
    """Tokens of a prompt that are read, its last ones: the first new token needs a place too."""
    return context - 1


COLDEST = 1e-6
"""temperatures below it take the likeliest token: dividing by them would overflow"""


@torch.inference_mode()
def continuation(
    model: Transformer, ids: list[int], sampling: Sampling, machine: Machine, vocab_size: int
) -> Iterator[int]:
    """Yield up to `sampling.tokens` ids that follow `ids`. Past the model's context it drops the older half.

    vocab_size: ids at or above it are never drawn (the model may have more rows than the tokenizer has tokens).
    """
    context = model.config.context
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = model.new_cache()
    new = ids = ids[-most_read(context) :]
    for _ in range(sampling.tokens):
        if cache.length + len(new) > context:
            new = ids = ids[-(context // 2) :]
            cache = model.new_cache()
        with machine.autocast():
            logits_V = model.next_logits(torch.tensor([new], device=machine.device), cache)[0]
        token = choose(logits_V[:vocab_size].cpu(), sampling, generator)
        yield token
        new = [token]
        ids = [*ids, token]


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw one token id from the distribution that the settings leave. Raises UserError if a logit is not finite."""
    if not torch.isfinite(logits_V).all():
        raise UserError("the model answers with numbers that are not finite: its weights are broken; take another run")
    if sampling.temperature < COLDEST:
        return int(logits_V.argmax())
    logits_V = (logits_V - logits_V.max()) / sampling.temperature
    if 0 < sampling.top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(sampling.top_k).values[-1], -torch.inf)
    prob_V = logits_V.softmax(dim=-1)
    if sampling.top_p < 1:
        sorted_V, order_V = prob_V.sort(descending=True)
        beyond_V = sorted_V.cumsum(0) - sorted_V >= sampling.top_p  # the tokens before suffice already
        prob_V = prob_V.index_fill(0, order_V[beyond_V], 0.0)
    prob_V = prob_V.masked_fill(prob_V < sampling.min_p * prob_V.max(), 0.0)
    return int(torch.multinomial(prob_V, 1, generator=generator))
