"""Generate text with an engine of one row: the continuation of a prompt, piece by piece as it comes."""

from collections.abc import Iterator, Sequence

from khanhllm.data.tokenizer import Tokenizer
from khanhllm.inference.engine import Engine, Job
from khanhllm.inference.sample import Score
from khanhllm.inference.words import spoken
from khanhllm.machine.devices import Machine
from khanhllm.model import Transformer
from khanhllm.schema import Sampling


def write(
    model: Transformer,
    tokenizer: Tokenizer,
    machine: Machine,
    prompt: str,
    sampling: Sampling,
    stops: Sequence[str] = (),
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece, up to `sampling.tokens` tokens, the end of the document or
    the first of `stops`."""
    ids = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    return spoken(tokenizer, continuation(model, ids, sampling, machine, tokenizer.vocab_size), stops)


def answer(
    model: Transformer,
    tokenizer: Tokenizer,
    machine: Machine,
    ids: list[int],
    sampling: Sampling,
    stops: Sequence[str] = (),
) -> Iterator[str]:
    """Yield what the assistant says after `ids`, fewer than the context and with <|assistant|> at their end, piece by
    piece. It is over with any special token, after `sampling.tokens` tokens, and where the context is full."""
    tokens = continuation(model, ids, sampling, machine, tokenizer.vocab_size, slides=False)
    return spoken(tokenizer, tokens, stops, tokenizer.special_ids)


def most_read(context: int) -> int:
    """Tokens of a prompt that are read, its last ones: the first new token needs a place too."""
    return context - 1


def continuation(
    model: Transformer, ids: list[int], sampling: Sampling, machine: Machine, vocab_size: int, slides: bool = True
) -> Iterator[int]:
    """Yield up to `sampling.tokens` ids that follow `ids`. Past the model's context it drops the older half and goes
    on, or ends there unless it `slides`.

    vocab_size: ids at or above it are never drawn (the model may have more rows than the tokenizer has tokens).
    """
    new: list[int] = []
    errors: list[Exception] = []

    def hear(score: Score) -> bool:
        new.append(score.token)
        return False

    def over(_reason: str, error: Exception | None) -> None:
        errors.extend([error] if error else [])

    engine = Engine(model, machine, vocab_size)
    engine.submit(Job(ids[-most_read(model.config.context) :], sampling, hear, over, slides=slides))
    while engine.turn():
        yield from new
        new.clear()
    if errors:
        raise errors[0]
