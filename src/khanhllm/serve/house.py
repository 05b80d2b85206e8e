"""A run folder as one site: the page, what the page asks (/api), and behind both the server of the model, as soon as
the run has a checkpoint."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from khanhllm.errors import UserError
from khanhllm.log.run_log import EXPERTS, FILE, MESSAGES
from khanhllm.model.counts import active_parameters, on_paper, total_parameters
from khanhllm.runs.run import PYTHON
from khanhllm.serve.findings import findings
from khanhllm.serve.guard import Guard
from khanhllm.serve.openai import Asked, Refused, parsed
from khanhllm.serve.server import Server, application, as_json
from khanhllm.serve.watch import Watch, tail
from khanhllm.settings import read_config
from khanhllm.training import checkpoint

SECONDS = 1.0
"""between two looks for a first checkpoint"""
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


def page_files() -> dict[str, tuple[bytes, str]]:
    """The page: what lies under each address, and its type."""
    found = {}
    for file in resources.files("khanhllm.serve").joinpath("page").iterdir():
        if kind := KINDS.get(Path(file.name).suffix):
            found["/" if file.name == "index.html" else f"/{file.name}"] = (file.read_bytes(), f"{kind}; charset=utf-8")
    return found


class House:
    """An ASGI application for one run, whose model it serves, and others whose logs it shows beside.

    load: opens the newest checkpoint. server: what `load` returned already; None: the run has no checkpoint yet.
    """

    def __init__(
        self, runs: Sequence[Path], load: Callable[[], Server], server: Server | None = None, page: bool = True
    ) -> None:
        self.runs, self.load, self.server = runs, load, server
        self.names = [run.resolve().name for run in runs]
        self.name = self.names[0]
        self.files = page_files() if page else {}
        self.logs = [(Watch(run / FILE), Watch(run / EXPERTS, "layer")) for run in runs]
        self.config = read_config(runs[0])
        paper = on_paper(self.config.model)
        self.sizes = {"parameters": total_parameters(paper), "active": active_parameters(paper)}
        self.why = "the run has no checkpoint yet; its model is served as soon as there is one"
        self.guard: Guard | None = None
        self.fault: BaseException | None = None
        """what ended the engine"""
        self.died: Callable[[], None] = lambda: None
        """called once when the engine has ended by an error"""
        self._retired: list[Server] = []
        self._loading = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        api: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
            ("GET", "/api/model", self.model),
            ("GET", "/api/log", partial(self._curves, 0)),
            ("GET", "/api/loads", partial(self._curves, 1)),
            ("GET", "/api/texts", self.texts),
            ("GET", "/api/experts", self.experts),
            ("POST", "/api/newest", self.newest),
        ]
        routes = [Route(path, self.file, methods=["GET"]) for path in self.files]
        routes += [Route(path, endpoint, methods=[method]) for method, path, endpoint in api if page]
        self.own = application(routes, self._lifespan)

    def guarded(self, names: Iterable[str] = (), **settings: Any) -> Guard:
        """The application behind its guard, whose settings these are."""
        self.guard = Guard(self._answer, names, open={"/health", *self.files}, **settings)
        return self.guard

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        if scope["type"] == "lifespan" or path in self.files or (self.files and path.startswith("/api/")):
            return await self.own(scope, receive, send)
        if not self.server:
            raise Refused(503, self.why, "model_not_ready")
        await self.server.app(scope, receive, send)

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        waiting = asyncio.create_task(self._wait())
        if self.server:
            self._begin(self.server)
        yield
        waiting.cancel()
        for server in [*self._retired, *([self.server] if self.server else [])]:
            await server.stop()

    async def _wait(self) -> None:
        """Open the run's first checkpoint when it appears. One that cannot be opened may be followed by another."""
        tried: list[Path] = []
        while not self.server:
            there = await asyncio.to_thread(checkpoint.steps, self.runs[0])
            if there != tried:
                tried = there
                try:
                    await self._open()
                except UserError as error:
                    self.why = str(error)
                except Exception as error:  # out of memory, say: the page and the next try go on
                    self.why = f"the checkpoint could not be opened: {type(error).__name__}: {error}"[:300]
            await asyncio.sleep(SECONDS)

    async def _open(self) -> None:
        """Serve the newest checkpoint; what is being written with another one ends with that one."""
        async with self._loading:
            server = await asyncio.to_thread(self.load)
            if self.server:
                server.engine.counts = self.server.engine.counts  # a counter of /metrics never goes back
            self._begin(server)
            before, self.server = self.server, server
            if before:
                self._retired.append(before)
                task = asyncio.create_task(self._retire(before))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _begin(self, server: Server) -> None:
        server.guard, server.died = self.guard, lambda: self._died(server)
        server.start()

    def _died(self, server: Server) -> None:
        """Who still listened to one that is retired has been told; the one that follows it goes on."""
        if server not in self._retired:
            self.fault = server.engine.fault
            self.died()

    async def _retire(self, server: Server) -> None:
        while not server.idle:
            await asyncio.sleep(SECONDS / 10)
        await server.stop()
        self._retired.remove(server)

    async def file(self, request: Request) -> Response:
        """A file of the page."""
        content, kind = self.files[request.scope["path"]]
        return Response(content, headers={"content-type": kind, "content-security-policy": POLICY})

    async def model(self, _request: Request) -> Response:
        """What is served, and what there is to see."""
        return as_json(await asyncio.to_thread(self._model))

    def _model(self) -> dict[str, Any]:
        with suppress(UserError):  # of a folder that is being removed, the last one that was read
            self.config = read_config(self.runs[0])  # anew: a resumed training may be longer
        config, server = self.config, self.server
        shape = config.model
        kept = checkpoint.steps(self.runs[0])
        return self.sizes | {
            "name": self.name,
            "runs": self.names,
            "step": server.run.step if server else None,
            "newest": max(map(checkpoint.step_of, kept), default=None),
            "waits_for": "" if server else self.why,
            "talks": bool(server and server.run.talks),
            "prompt": config.train.sample_prompt or (PYTHON if config.data.source == "stdlib" else ""),
            "steps": 0 if config.train.seconds else config.train.steps,
            "pattern": shape.pattern,
            "layers": shape.moe_layers,
            "experts": shape.experts if shape.moe_layers else 0,
            "experts_per_token": shape.experts_per_token,
            "context": shape.context,
            "vocabulary": shape.vocab_size,
            "device": str(server.run.machine.device) if server else "",
            "version": metadata.version("khanhllm"),
        }

    async def _curves(self, which: int, request: Request) -> Response:
        """The curves of a run's log (0), or the load of each expert over time, a curve for each mixture layer (1)."""
        watch = self.logs[self._asked_run(request)][which]
        return as_json(await asyncio.to_thread(watch.look, request.query_params.get("version", "")))

    async def texts(self, request: Request) -> Response:
        """The ends of a run's messages and samples."""
        run = self.runs[self._asked_run(request)]
        messages, samples = await asyncio.to_thread(lambda: (tail(run / MESSAGES), tail(run / "samples.txt")))
        return as_json({"messages": messages, "samples": samples})

    async def experts(self, _request: Request) -> Response:
        """What `khanhllm experts` found, and whether it speaks of the weights that are served."""
        try:
            found = await asyncio.to_thread(findings, self.runs[0])
        except UserError as error:
            raise Refused(404, str(error)) from None
        current = bool(found and self.server and self.server.run.identity == found["checkpoint"])
        return as_json({"findings": found, "current": current})

    async def newest(self, request: Request) -> Response:
        """Serve the newest checkpoint from now on."""
        parsed(await request.body(), Asked)
        try:
            await self._open()
        except UserError as error:
            raise Refused(503, str(error)) from None
        return await self.model(request)

    def _asked_run(self, request: Request) -> int:
        asked = request.query_params.get("run", "0")
        if asked not in map(str, range(len(self.runs))):
            raise Refused(400, f"run must be a number from 0 to {len(self.runs) - 1}", param="run")
        return int(asked)
