"""A request becomes jobs of the engine, and what they are told becomes pieces of its answer."""

import asyncio
import codecs
import math
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from khanhllm.data.tokenizer import Tokenizer
from khanhllm.errors import UserError
from khanhllm.inference.engine import Engine, Job
from khanhllm.inference.routes import Route
from khanhllm.inference.sample import Score
from khanhllm.inference.words import Words
from khanhllm.schema import Sampling

STALLED = 1000
"""pieces of a stream that may wait for a client that does not read; then its jobs are cancelled"""
APART = 0.01
"""least time between two parts of a stream (seconds): the engine's thread and the event loop share one lock of
Python's, and to hand it over for each token takes as long as a small model does"""
ALTERNATIVES = 5
"""tokens that are named beside each one whose way is told"""


class Seen(NamedTuple):
    """What was seen of the model's work since the last piece. Both lists begin with the first token that was read, and
    the n-th route is that of the n-th token: a token is drawn before it is read, so routes come one token later."""

    tokens: Sequence[Score]
    routes: Sequence[Route]
    prompt: int
    """how many of the tokens were given"""

    def then(self, more: "Seen") -> "Seen":
        return Seen([*self.tokens, *more.tokens], [*self.routes, *more.routes], self.prompt + more.prompt)


class Piece(NamedTuple):
    """What comes next in one choice of an answer."""

    choice: int
    text: str
    scores: Sequence[Score] = ()
    finish: str | None = None
    """stop or length: nothing follows"""
    error: Exception | None = None
    seen: Seen | None = None

    def then(self, more: "Piece") -> "Piece":
        """This piece and the next one of its choice, as one."""
        both = self.seen.then(more.seen) if self.seen and more.seen else self.seen or more.seen
        return Piece(self.choice, self.text + more.text, [*self.scores, *more.scores], more.finish, more.error, both)


class Wanted(NamedTuple):
    """A text to be continued."""

    ids: list[int]
    """with the end-of-text before it"""
    shown: int
    """where the prompt begins in `ids`: behind an end-of-text that the client did not give"""
    sampling: Sampling
    stops: list[str]
    logprobs: int | None
    echo: bool
    closed: dict[int, list[int]]
    routes: bool
    """tell where each token went, those of the prompt too"""


class Writing:
    """The jobs of one request."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, wanted: Sequence[Wanted], stream: bool) -> None:
        """Raises Full or Dead, as `Engine.submit` does."""
        self.engine, self.tokenizer, self.stream, self.written = engine, tokenizer, stream, 0
        self._loop, self._bell = asyncio.get_running_loop(), asyncio.Event()
        self._pieces, self._awaited = deque[Piece](), False
        self.jobs = [self._job(index, one) for index, one in enumerate(wanted)]
        engine.submit(*self.jobs)

    async def pieces(self, patience: float = 15) -> AsyncIterator[Piece | None]:
        """The pieces of all choices as they come, neighbours as one; None when there was none for so many seconds."""
        going = len(self.jobs)
        while going:
            self._bell.clear()
            self._awaited = True
            if not self._pieces:
                try:
                    await asyncio.wait_for(self._bell.wait(), patience)
                except TimeoutError:
                    yield None
                    continue
            self._awaited = False
            found: dict[int, Piece] = {}
            while self._pieces:
                piece = self._pieces.popleft()
                found[piece.choice] = found[piece.choice].then(piece) if piece.choice in found else piece
            for piece in found.values():
                going -= piece.finish is not None
                yield piece
            await asyncio.sleep(APART if going else 0)

    def cancel(self) -> None:
        """End all jobs that are not over."""
        for job in self.jobs:
            self.engine.cancel(job)

    def _job(self, index: int, wanted: Wanted) -> Job:
        """A job whose functions, which the engine's thread calls, send pieces to the event loop."""
        words = Words(self.tokenizer, wanted.stops)
        prompt: list[Score] = [Score(token) for token in wanted.ids[wanted.shown : 1]]
        begun = not wanted.echo
        tokens, routes, given = [Score(wanted.ids[0])], list[Route](), len(wanted.ids)
        cut: UserError | None = None

        def beginning() -> tuple[str, list[Score]]:
            nonlocal begun
            if begun:
                return "", []
            begun = True
            return self.tokenizer.decode(wanted.ids[wanted.shown :]), prompt

        def seen() -> Seen | None:
            nonlocal tokens, routes, given
            new, tokens, routes, given = Seen(tokens, routes, given), [], [], 0
            return new if wanted.routes else None

        def echo(score: Score) -> None:
            prompt.append(score)
            tokens.append(score)

        def hear(score: Score) -> bool:
            nonlocal cut
            tokens.append(score)
            text, scores = beginning()
            ended = score.token in self.tokenizer.ends
            text += words.rest() if ended else words.add(score.token)
            self.written += 1
            scored = [*scores, score] if wanted.logprobs is not None else []
            self._send(Piece(index, text, scored, seen=seen()))
            ended |= words.ended
            if self.stream and not ended and len(self._pieces) > STALLED:
                # it must not look as if the model had ended here
                cut = UserError("the answer was cut, since its client did not read it")
            return ended or cut is not None

        def over(reason: str, error: Exception | None) -> None:
            text, scores = beginning()
            scored = scores if wanted.logprobs is not None else []
            self._send(Piece(index, text + words.rest(), scored, reason, error or cut, seen()))

        top = ALTERNATIVES if wanted.routes and wanted.logprobs is None else wanted.logprobs
        job = Job(wanted.ids, wanted.sampling, hear, over, top=top, closed=wanted.closed)
        job.echo = echo if wanted.routes or (wanted.echo and wanted.logprobs is not None) else None
        job.route = (lambda new: routes.extend(new)) if wanted.routes else None
        return job

    def _send(self, piece: Piece) -> None:
        self._pieces.append(piece)
        try:
            if self._awaited:
                self._loop.call_soon_threadsafe(self._bell.set)
        except RuntimeError:  # the event loop has ended, and with it everybody who could listen
            self.cancel()


class Logprobs:
    """The `logprobs` of one choice, in the form of /v1/completions."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.offset = tokenizer, 0
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, scores: Sequence[Score]) -> dict[str, list[Any]]:
        """These tokens; the offsets go on where those before ended."""
        offsets = []
        for score in scores:
            offsets.append(self.offset)
            self.offset += len(self.decoder.decode(self.tokenizer.decode_bytes([score.token])))
        return {
            "tokens": [self.name(score.token) for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [self._top(score) for score in scores],
            "text_offset": offsets,
        }

    def _top(self, score: Score) -> dict[str, float] | None:
        """The likeliest tokens, and the one that stands there; lm-eval takes it for the greedy one if it is the
        likeliest."""
        if score.logprob is None:
            return None
        return {self.name(token): logprob for token, logprob in score.top} | {self.name(score.token): score.logprob}

    def name(self, token: int) -> str:
        return named(self.tokenizer, token)


def named(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token, or its bytes if they are no text, in OpenAI's spelling."""
    raw = tokenizer.decode_bytes([token])
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def told(tokenizer: Tokenizer, seen: Seen) -> dict[str, Any]:
    """`seen` as clients get it: each token as [id, text, bits, alternatives], bits being null where no token stands
    before it; each route as [[expert, weight], ...] for every mixture layer; how many tokens are the prompt's."""

    def one(score: Score) -> list[Any]:
        bits = None if score.logprob is None else round(-score.logprob / math.log(2), 3)
        likely = [[named(tokenizer, token), round(math.exp(logprob), 4)] for token, logprob in score.top]
        return [score.token, named(tokenizer, score.token), bits, likely]

    routes = [[[(expert, round(weight, 4)) for expert, weight in layer] for layer in route] for route in seen.routes]
    return {"tokens": [one(score) for score in seen.tokens], "routes": routes, "prompt": seen.prompt}
