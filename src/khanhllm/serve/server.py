"""The endpoints: requests in, answers out. The engine works in a thread of its own."""

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from khanhllm.data.chat import question
from khanhllm.data.render import render
from khanhllm.data.tokenizer import END_OF_TEXT
from khanhllm.errors import UserError
from khanhllm.inference.engine import Dead, Engine, Full
from khanhllm.inference.sample import reseeded
from khanhllm.runs.run import Run
from khanhllm.schema import Sampling
from khanhllm.serve.guard import Guard
from khanhllm.serve.openai import (
    ALIVE,
    DONE,
    Chat,
    ChatForm,
    Completion,
    Detokenize,
    Form,
    Refused,
    TextForm,
    Tokenize,
    Writes,
    check_ids,
    dumped,
    event,
    parsed,
    usage,
)
from khanhllm.serve.writing import Logprobs, Piece, Seen, Wanted, Writing, told

Kind = TypeVar("Kind", bound=Writes)
STREAM = {"content-type": "text/event-stream", "x-accel-buffering": "no"}


class Server:
    """A run as an ASGI application, `app`, which a `House` starts, guards and stops."""

    def __init__(self, run: Run, name: str, rows: int = 8, waiting: int = 64) -> None:
        self.run, self.name = run, name
        self.tokenizer, self.shape = run.tokenizer, run.config.model
        self.engine = Engine(run.model, run.machine, self.tokenizer.vocab_size, rows, waiting)
        self.started = int(time.time())
        self._encoding = 0
        """requests whose prompts are being encoded"""
        paths: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
            ("GET", "/health", self.health),
            ("GET", "/metrics", self.metrics),
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{name}", self.model),
            ("POST", "/v1/completions", self.completions),
            ("POST", "/v1/chat/completions", self.chat),
            ("POST", "/tokenize", self.tokenize),
            ("POST", "/detokenize", self.detokenize),
            ("GET", "/tokenizer_info", self.tokenizer_info),
        ]
        routes = [Route(path, endpoint, methods=[method]) for method, path, endpoint in paths]
        self.app = application(routes)
        self.guard: Guard | None = None
        self.died: Callable[[], None] = lambda: None
        """called once, in the engine's thread, when the engine has ended by an error"""

    @property
    def idle(self) -> bool:
        """Whether no text is being encoded, waits or is written."""
        return not self._encoding and self.engine.idle

    def start(self) -> None:
        """Let the engine work."""
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End all jobs, and the engine."""
        self.engine.close()
        await asyncio.to_thread(self._thread.join)

    def _work(self) -> None:
        self.run.machine.take_process()
        self.engine.run()
        if self.engine.fault:
            self.died()

    async def health(self, _request: Request) -> Response:
        if self.engine.fault:
            raise Refused(503, "the engine has ended by an error")
        return as_json({"status": "ok"})

    async def metrics(self, _request: Request) -> Response:
        """https://prometheus.io/docs/instrumenting/exposition_formats/"""
        engine, lines = self.engine, []
        for name, count in engine.counts.items():
            lines += [f"# TYPE khanhllm_tokens_{name}_total counter", f"khanhllm_tokens_{name}_total {count}"]
        for name, count in {"rows_busy": engine.busy, "waiting": len(engine.waiting)}.items():
            lines += [f"# TYPE khanhllm_{name} gauge", f"khanhllm_{name} {count}"]
        lines.append("# TYPE khanhllm_answers_total counter")
        answers = sorted(self.guard.answers.items()) if self.guard else []
        lines += [f'khanhllm_answers_total{{status="{status}"}} {count}' for status, count in answers]
        return Response("\n".join([*lines, ""]), media_type="text/plain; version=0.0.4")

    async def models(self, _request: Request) -> Response:
        return as_json({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return as_json(self._card())

    def _card(self) -> dict[str, Any]:
        card = {"id": self.name, "object": "model", "created": self.started, "owned_by": "khanhllm"}
        return card | {"max_model_len": self.shape.context}

    def _check_model(self, name: str) -> None:
        if name not in (self.name, "", "*"):
            raise Refused(404, f"no model of this name here; it is called {self.name}", "model_not_found", "model")

    async def tokenizer_info(self, _request: Request) -> Response:
        names = {f"{what}_token": END_OF_TEXT for what in ("bos", "eos", "pad")}
        return as_json(names | {"vocab_size": self.tokenizer.vocab_size, "max_model_len": self.shape.context})

    async def tokenize(self, request: Request) -> Response:
        """A text that is the name of a special token and nothing else becomes that token: clients ask for its id so."""
        asked = parsed(await request.body(), Tokenize)
        special = self.tokenizer.specials.get(asked.prompt)
        ids = await asyncio.to_thread(self.tokenizer.encode, asked.prompt) if special is None else [special]
        ids = [self.tokenizer.end_of_text] * asked.add_special_tokens + ids
        return as_json({"tokens": ids, "count": len(ids), "max_model_len": self.shape.context})

    async def detokenize(self, request: Request) -> Response:
        asked = parsed(await request.body(), Detokenize)
        check_ids(asked.tokens, self.tokenizer.vocab_size, "tokens")
        return as_json({"prompt": self.tokenizer.decode(asked.tokens)})

    async def chat(self, request: Request) -> Response:
        asked = parsed(await request.body(), Chat)
        self._check_model(asked.model)
        if not self.run.talks:
            raise Refused(400, "this run was not taught to talk (khanhllm tune); use /v1/completions")
        return await self._answer(request, asked, self._wanted_answers, ChatForm)

    async def completions(self, request: Request) -> Response:
        asked = parsed(await request.body(), Completion)
        self._check_model(asked.model)
        return await self._answer(request, asked, self._wanted, TextForm)

    async def _answer(
        self, request: Request, asked: Kind, texts: Callable[[Kind], list[Wanted]], form: Form
    ) -> Response:
        self._encoding += 1
        try:  # in a thread, so that a long prompt does not hold up the streams of others
            wanted = await asyncio.to_thread(texts, asked)
        finally:
            self._encoding -= 1
        try:
            writing = Writing(self.engine, self.tokenizer, wanted, asked.stream)
        except Full:
            raise Refused(429, "too many requests wait already; try again", "rate_limit_exceeded") from None
        except Dead:
            raise Refused(503, "the engine has ended by an error") from None
        reply = {
            "id": f"{form.prefix}-{secrets.token_hex(12)}",
            "object": form.part_name if asked.stream else form.whole_name,
            "created": int(time.time()),
            "model": self.name,
        }
        tokens = sum(len(one.ids) - one.shown for one in wanted[:: asked.n])
        if asked.stream:
            return StreamingResponse(self._events(asked, writing, wanted, reply, tokens, form), headers=STREAM)
        return await self._whole(request, writing, wanted, reply, tokens, form)

    def _wanted_answers(self, asked: Chat) -> list[Wanted]:
        """The n answers to a conversation."""
        self._check_many(1, asked.n)
        try:
            turns = question(asked.messages, "messages")
        except UserError as error:
            raise Refused(400, str(error), param="messages") from None
        ids, context = render(turns, self.tokenizer, answer=True), self.shape.context
        if len(ids) >= context:
            text = f"the conversation has {len(ids):,} tokens, the model sees {context:,} at once, an answer included"
            raise Refused(400, text, "context_length_exceeded", "messages")
        most, closed = min(asked.tokens or context, context), self._closed(asked)
        first, routes = _sampling(asked, most), asked.khanhllm.routes
        return [
            Wanted(ids, 0, reseeded(first, nth), asked.stops, None, False, closed, routes) for nth in range(asked.n)
        ]

    def _wanted(self, asked: Completion) -> list[Wanted]:
        """A text to be continued for each prompt and each of its n choices."""
        prompts = asked.prompts(self.tokenizer.vocab_size)
        self._check_many(len(prompts), asked.n)
        closed, wanted, context = self._closed(asked), list[Wanted](), self.shape.context
        first = _sampling(asked, asked.max_tokens)
        for prompt in prompts:
            ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            implied = isinstance(prompt, str) or ids[:1] != [self.tokenizer.end_of_text]
            ids = [self.tokenizer.end_of_text] * implied + ids
            if len(ids) > context:
                text = (
                    f"the prompt has {len(ids):,} tokens (with the end-of-text before it), the model sees {context:,}"
                )
                raise Refused(400, f"{text} at once", "context_length_exceeded", "prompt")
            for nth in range(asked.n):
                how = (asked.stops, asked.logprobs, asked.echo, closed, asked.khanhllm.routes)
                wanted.append(Wanted(ids, int(implied), reseeded(first, nth), *how))
        return wanted

    def _check_many(self, prompts: int, n: int) -> None:
        """Raise Refused for more texts than there will ever be room for."""
        most = self.engine.most_waiting + len(self.engine.rows)
        if n * prompts > most:
            text = f"{prompts} prompts x n {n} are more texts than this server holds, {most}"
            raise Refused(400, text, param="n")

    def _closed(self, asked: Writes) -> dict[int, list[int]]:
        closed: dict[int, list[int]] = {}
        for layer, expert in asked.khanhllm.off:
            if layer not in self.shape.moe_layers or not 0 <= expert < self.shape.experts:
                text = f"khanhllm.off: mixture layers {self.shape.moe_layers}, experts 0 to {self.shape.experts - 1}"
                raise Refused(400, text, param="khanhllm")
            closed.setdefault(layer, []).append(expert)
        return {layer: sorted(set(experts)) for layer, experts in sorted(closed.items())}

    async def _whole(
        self,
        request: Request,
        writing: Writing,
        wanted: Sequence[Wanted],
        reply: dict[str, Any],
        tokens: int,
        form: Form,
    ) -> Response:
        """The answer at once; if the client goes before, its jobs end."""
        gone = asyncio.create_task(_gone(request))
        gathered = asyncio.create_task(_gathered(writing, len(wanted)))
        try:
            await asyncio.wait({gone, gathered}, return_when=asyncio.FIRST_COMPLETED)
            if not gathered.done():
                return Response(status_code=499)  # nobody reads it
            answers = gathered.result()
        finally:
            gone.cancel()
            gathered.cancel()
            writing.cancel()
        choices = []
        for one, whole in zip(wanted, answers, strict=True):
            logprobs = Logprobs(self.tokenizer).add(whole.scores) if one.logprobs is not None else None
            choices.append(form.whole(whole.choice, whole.text, logprobs, whole.finish) | self._told(whole.seen))
        return as_json(reply | {"choices": choices, "usage": usage(tokens, writing.written)})

    async def _events(
        self,
        asked: Writes,
        writing: Writing,
        wanted: Sequence[Wanted],
        reply: dict[str, Any],
        tokens: int,
        form: Form,
    ) -> AsyncIterator[str]:
        """The answer as server-sent events; if the client goes, the jobs end."""
        logprobs = [Logprobs(self.tokenizer) for _ in wanted]
        count = asked.stream_options.include_usage
        counted = {"usage": None} if count else {}
        try:
            for first in filter(None, map(form.first, range(len(wanted)))):
                yield event(reply | {"choices": [first]} | counted)
            async for piece in writing.pieces():
                if piece is None:
                    yield ALIVE
                    continue
                if piece.error:
                    yield event(_as_refused(piece.error).body())
                    return
                if not (piece.text or piece.scores or piece.finish or piece.seen):
                    continue
                scores = wanted[piece.choice].logprobs is not None
                scored = logprobs[piece.choice].add(piece.scores) if scores else None
                choice = form.part(piece.choice, piece.text, scored, piece.finish) | self._told(piece.seen)
                yield event(reply | {"choices": [choice]} | counted)
            if count:
                yield event(reply | {"choices": [], "usage": usage(tokens, writing.written)})
            yield DONE
        finally:
            writing.cancel()

    def _told(self, seen: Seen | None) -> dict[str, Any]:
        return {"khanhllm": told(self.tokenizer, seen)} if seen else {}


def application(routes: Sequence[Route], lifespan: Any = None) -> Starlette:
    """These routes; whatever goes wrong is answered in JSON."""
    handlers: Any = {Refused: _refused, HTTPException: _http, Exception: _unforeseen}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    app.router.redirect_slashes = False
    return app


def _sampling(asked: Writes, tokens: int) -> Sampling:
    """The settings of the first text."""
    return Sampling(
        tokens=tokens,
        temperature=asked.temperature,
        top_k=max(asked.top_k, 0),
        top_p=asked.top_p,
        min_p=asked.min_p,
        seed=secrets.randbelow(2**62) if asked.seed is None else asked.seed % 2**63,
    )


async def _gathered(writing: Writing, choices: int) -> list[Piece]:
    """Each choice as one piece. Raises Refused if one ended by an error."""
    found = [Piece(choice, "") for choice in range(choices)]
    async for piece in writing.pieces():
        if piece and piece.error:
            raise _as_refused(piece.error)
        if piece:
            found[piece.choice] = found[piece.choice].then(piece)
    return found


def _as_refused(error: Exception) -> Refused:
    return Refused(500, "the engine has ended by an error" if isinstance(error, Dead) else str(error))


async def _gone(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def as_json(value: Mapping[str, Any], status: int = 200) -> Response:
    return Response(dumped(value), status, media_type="application/json")


def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    answer = as_json(error.body(), error.status)
    if error.status in (429, 503):
        answer.headers["retry-after"] = "1"
    return answer


def _unforeseen(request: Request, _error: Exception) -> Response:
    """Starlette raises the error again, for the guard to log it."""
    return _refused(request, Refused(500, "something unforeseen happened here; the server's log says where"))


def _http(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    headers = error.headers or {}
    text = "there is nothing here" if error.status_code == 404 else error.detail
    if allowed := headers.get("Allow"):
        text += f": send this as {'POST' if 'POST' in allowed else 'GET'}"
    answer = _refused(request, Refused(error.status_code, f"{text}; see docs/serve.md"))
    answer.headers.update(headers)
    return answer
