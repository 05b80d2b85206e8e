"""The engine writes many texts with one model: their rows are decoded together, a token each at a time.

    waiting ──> a free row ──> read the prompt, a chunk a turn ──> write, all rows that do so in one forward ──> over

One thread calls `turn`; other threads may submit jobs and cancel them. A job is told its tokens through its functions,
in that thread. A row keeps what it has read after its job is over, and the next job that begins alike begins there.
With one row nothing is reused and a prompt is read at once, so that the same job always gets the same bits.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor

from khanhllm.errors import UserError
from khanhllm.inference.routes import Route, routes, watched
from khanhllm.inference.sample import Score, choose, scores
from khanhllm.machine.devices import Machine
from khanhllm.model import Transformer
from khanhllm.model.transformer import ALL_OPEN, Closed
from khanhllm.schema import Sampling

CHUNK = 128
"""tokens of a prompt that are read between two steps of those who write, so that nobody stands still for long"""


class Full(Exception):
    """More jobs wait than the engine holds."""


class Dead(Exception):
    """The engine has ended by an error; it takes no jobs."""


@dataclass(eq=False)
class Job:
    """A text to be continued."""

    ids: Sequence[int]
    """at least one, each within the vocabulary"""
    sampling: Sampling
    hear: Callable[[Score], bool]
    """called with each new token; answers whether this was enough"""
    over: Callable[[str, Exception | None], None]
    """called once, at the end, with its reason: stop, length, cancelled, or error and the error"""
    top: int | None = None
    """score each token, and name so many of the likeliest in its place; None: no scores"""
    echo: Callable[[Score], None] | None = None
    """called with each token of the prompt but the first, scored; then the prompt is read from its beginning"""
    route: Callable[[list[Route]], None] | None = None
    """called with where each token went that was read, in their order; then the prompt is read from its beginning"""
    closed: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """experts that this text must do without, by layer; where all are closed, the layer adds nothing"""
    slides: bool = False
    """past the model's context, drop the older half of the text and go on, instead of ending"""
    cancelled: bool = False


class Row:
    """One row of the cache and the job that has it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.job: Job | None = None
        self.left: list[int] = []
        """ids that follow those in the cache, and were not read yet"""
        self.written = 0
        self.last_used = 0
        self.dice = torch.Generator()
        self.closed: Mapping[int, Sequence[int]] = {}
        """with which experts closed its cache was made"""

    @property
    def reads(self) -> bool:
        """Whether it still reads its prompt; if not, one token is left and its job writes."""
        return self.job is not None and (len(self.left) > 1 or (self.job.echo is not None and not self.written))


class Engine:
    """Owns the model's cache. `vocab_size`: ids at or above it are never drawn (the model may have more rows than the
    tokenizer has tokens)."""

    def __init__(self, model: Transformer, machine: Machine, vocab_size: int, rows: int = 1, waiting: int = 1) -> None:
        self.model, self.machine, self.vocab_size = model, machine, vocab_size
        self.context = model.config.context
        self.chunk = CHUNK if rows > 1 else self.context
        self.cache = model.new_text_cache(rows)
        self.rows = [Row(number) for number in range(rows)]
        self.most_waiting = waiting
        self.waiting: deque[Job] = deque()
        self.counts = {"read": 0, "reused": 0, "written": 0}
        """tokens of prompts that were read, that a row had read before, and new tokens"""
        self.turns = 0
        self.fault: BaseException | None = None
        """what ended the engine"""
        self._closing = False
        self._bell = threading.Condition()

    @property
    def busy(self) -> int:
        """Rows that have a job."""
        return sum(row.job is not None for row in self.rows)

    @property
    def idle(self) -> bool:
        """Whether all jobs are over."""
        with self._bell:
            return not self.waiting and not self.busy

    def submit(self, *jobs: Job) -> None:
        """Let jobs wait for free rows: all, or none and Full is raised. Raises Dead if the engine has ended."""
        with self._bell:
            if self.fault or self._closing:
                raise Dead(f"the engine has ended: {self.fault or 'it was closed'}")
            if len(self.waiting) + len(jobs) > self.most_waiting + len(self.rows) - self.busy:
                raise Full
            self.waiting.extend(jobs)
            self._bell.notify()

    def cancel(self, job: Job) -> None:
        """End a job before the next token; what was read of it stays for the next one."""
        with self._bell:
            job.cancelled = True
            self._bell.notify()

    def close(self) -> None:
        """Let `run` return; jobs that are not over are cancelled."""
        with self._bell:
            self._closing = True
            self._bell.notify()

    def run(self) -> None:
        """Work until `close`. After an error all jobs are told, and `fault` has it."""
        try:
            while True:
                with self._bell:
                    self._bell.wait_for(lambda: self._closing or not self.idle)
                    if self._closing:
                        break
                self.turn()
        except BaseException as error:
            self.fault = error
        finally:
            self._end_all()

    def _end_all(self) -> None:
        with self._bell:
            self._closing = True
            jobs = [row.job for row in self.rows if row.job] + list(self.waiting)
            self.waiting.clear()
        for row in self.rows:
            row.job = None
        for job in jobs:
            job.over("error" if self.fault else "cancelled", Dead(str(self.fault)) if self.fault else None)

    @torch.inference_mode()
    def turn(self) -> bool:
        """One chunk of one prompt, then one token for each row that writes; False if there was nothing to do."""
        self.turns += 1
        self._sweep()
        self._admit()
        if reading := next((row for row in self.rows if row.reads), None):
            self._guarded(self._read, reading)
        if writing := [row for row in self.rows if row.job and not row.reads]:
            self._write(writing)
        return reading is not None or bool(writing)

    def _sweep(self) -> None:
        for row in self.rows:
            if row.job and row.job.cancelled:
                self._end(row, "cancelled")
        with self._bell:
            gone = [job for job in self.waiting if job.cancelled]
            self.waiting = deque(job for job in self.waiting if not job.cancelled)
        for job in gone:
            job.over("cancelled", None)

    def _admit(self) -> None:
        """Give free rows to those who wait, in their order, until one has a prompt to read."""
        while not any(row.reads for row in self.rows):
            free = [row for row in self.rows if row.job is None]
            if not free or not self.waiting:
                return
            job = self.waiting[0]
            row = self._prepare(job, free)
            with self._bell:  # it waits until its row has it: whoever looks meanwhile must find it somewhere
                row.job = self.waiting.popleft()
            row.written, row.last_used, row.closed = 0, self.turns, job.closed
            row.dice.manual_seed(job.sampling.seed)
            held = len(self.cache.ids[row.number])
            row.left = list(job.ids[held:])
            self.counts["reused"] += held
            self.counts["read"] += len(row.left)
            if not job.sampling.tokens and not job.echo:
                self._end(row, "length")

    def _prepare(self, job: Job, free: list[Row]) -> Row:
        """A free row whose cache holds the beginning of the job's ids that some row has read already, as far as
        possible: that row itself, or else the one that was idle longest, with a copy."""
        ids = self.cache.ids
        common = {row: self._common(row, job) for row in self.rows}
        source = max(self.rows, key=lambda row: (common[row], row.job is None))
        target = min(free, key=lambda row: (bool(ids[row.number]), row.last_used))
        if source.job is None and 2 * common[source] >= len(ids[source.number]):
            target = source  # little of what it held is lost
        self.cache.copy(source.number, target.number, common[source])
        return target

    def _common(self, row: Row, job: Job) -> int:
        """How many of the job's ids, but the last, which must be read, the row has in its cache."""
        if len(self.rows) == 1 or job.echo or job.route or {**row.closed} != {**job.closed}:
            return 0
        pairs = zip(self.cache.ids[row.number], job.ids[:-1], strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _read(self, row: Row) -> None:
        """Read the next chunk of a prompt; with its last one, draw the first token."""
        job, held = row.job, self.cache.ids[row.number]
        assert job is not None
        new, row.left = row.left[: self.chunk], row.left[self.chunk :]
        ids_BT, cache, closed = self._tensor([new]), self.cache.one(row.number), self._closed([row])
        with self.machine.autocast(), self._routed([row]):
            if job.echo:
                x_BTD, _ = self.model.trunk(ids_BT, cache, closed)
                logits_TV = self._echo(job, job.echo, [*new[1:], *row.left[:1]], x_BTD)
            else:
                logits_TV = self.model.next_logits(ids_BT, cache, closed)
        held += new
        if not row.left:
            self._draw(row, logits_TV[-1, : self.vocab_size].cpu())

    @contextmanager
    def _routed(self, rows: list[Row]) -> Iterator[None]:
        """Around a forward of these rows: tells the jobs that want to know it where each token went."""
        told = {nth: row.job.route for nth, row in enumerate(rows) if row.job and row.job.route}
        if not told:
            yield
            return
        with watched(self.model) as chosen:
            yield
        found = routes(chosen, len(rows))
        for nth, route in told.items():
            route(found[nth])

    def _echo(self, job: Job, echo: Callable[[Score], None], after: list[int], x_BTD: Tensor) -> Tensor:
        """Score the tokens of a prompt that come after each position; the logits of the last (1, V)."""
        for start in range(0, x_BTD.shape[1], CHUNK):
            logits_TV = self.model.head.logits(x_BTD[:, start : start + CHUNK])[0, :, : self.vocab_size].cpu()
            for logits_V, token in zip(logits_TV, after[start : start + CHUNK], strict=False):
                echo(scores(logits_V, token, job.top or 0))
        return logits_TV[-1:]

    def _write(self, rows: list[Row]) -> None:
        """One token for each of these rows."""
        rows = [row for row in rows if self._has_place(row)]
        if not rows:
            return
        numbers = [row.number for row in rows]
        cache = self.cache.one(numbers[0]) if len(rows) == 1 else self.cache.several(numbers)
        with self.machine.autocast(), self._routed(rows):
            logits_BV = self.model.next_logits(self._tensor([row.left for row in rows]), cache, self._closed(rows))
        logits_BV = logits_BV[:, : self.vocab_size].cpu()
        for row, logits_V in zip(rows, logits_BV, strict=True):
            self.cache.ids[row.number] += row.left
            row.left = []
            self._guarded(self._draw, row, logits_V)

    def _has_place(self, row: Row) -> bool:
        """Whether the row's next token fits into the context. If not, its job ends, or drops the older half."""
        held = self.cache.ids[row.number]
        if len(held) < self.context:
            return True
        if row.job and row.job.slides:
            row.left = [*held, *row.left][-(self.context // 2) :]
            held.clear()
            return not row.reads
        self._end(row, "length")
        return False

    def _draw(self, row: Row, logits_V: Tensor) -> None:
        """Draw the next token, tell it, and end the job if that was the last one."""
        job = row.job
        assert job is not None
        if not job.sampling.tokens:  # only its prompt was to be scored
            return self._end(row, "length")
        token = choose(logits_V, job.sampling, row.dice)
        row.left, row.written = [token], row.written + 1
        self.counts["written"] += 1
        if job.hear(Score(token) if job.top is None else scores(logits_V, token, job.top)):
            return self._end(row, "stop")
        if row.written == job.sampling.tokens:
            self._end(row, "length")

    def _guarded(self, work: Callable[..., None], row: Row, *inputs: Tensor) -> None:
        """An error that is the text's own, such as numbers that are not finite, ends this job alone."""
        try:
            work(row, *inputs)
        except UserError as error:
            self.cache.clear(row.number)
            self._end(row, "error", error)

    def _end(self, row: Row, reason: str, error: Exception | None = None) -> None:
        job, row.job, row.left, row.last_used = row.job, None, [], self.turns
        assert job is not None
        job.over(reason, error)

    def _closed(self, rows: list[Row]) -> Closed:
        """The closed experts of rows as the model takes them."""
        if not any(row.closed for row in rows):
            return ALL_OPEN
        found = {}
        for layer in sorted({layer for row in rows for layer in row.closed}):
            closed_BE = torch.zeros(len(rows), self.model.config.experts, dtype=torch.bool)
            for nth, row in enumerate(rows):
                closed_BE[nth, list(row.closed.get(layer, ()))] = True
            found[layer] = closed_BE.to(self.machine.device)
        return found

    def _tensor(self, ids: list[list[int]]) -> Tensor:
        return torch.tensor(ids, device=self.machine.device)
