"""Documents become token shards, once, for any number of runs.

A datatrove pipeline of two steps: our reader and our writer. Its tasks are groups of files that the source alone
decides, so the shards are the same bytes whatever the number of workers. A document is held out for validation by a
hash of its text: two copies of one text can never end up on both sides, and adding files moves no document.

When only so many tokens are needed, tasks run in waves until a prefix of them holds enough; what ran beyond the
prefix is dropped, so again the number of workers does not show. Everything is written aside and published by one
rename: a folder of shards is complete or absent.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
from datatrove.executor import LocalPipelineExecutor
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from khanhllm.config import DataConfig, UserError
from khanhllm.data.documents import Reader
from khanhllm.data.maker import lay
from khanhllm.data.shards import MANIFEST, VERSION, Dtype, Manifest, dtype_for
from khanhllm.data.sources import Source, components, is_remote, locate
from khanhllm.data.writer import HASHES, Report, ShardWriter, report_path, text_hash
from khanhllm.tokenizer import Tokenizer, train

WHOLE = 2**28
"""local text up to this size (bytes) is prepared whole, whatever the run needs, so that the next run finds it"""
LEAST_SAMPLE = 2**24
"""text that a tokenizer needs at least, however short the run (bytes)"""
SPREAD = 16
"""files, at least, that the tokenizer's sample is spread over"""


def prepare(
    source: str, tokenizer: Tokenizer, out: Path, *, validation: float, tokens: int = 0, workers: int = 0
) -> Manifest:
    """Write the shards of a source into the new folder `out`.

    validation: share of documents held out, in (0, 1). tokens: read no further once there are as many training
    tokens, 0 reads all. workers: processes, 0 means one for each core. Raises UserError for anything wrong with the
    source, and if `out` exists or cannot be written; then nothing is left behind.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; remove it or choose another folder")
    if len(components(source)) > 1:
        raise UserError(f"{source} is a mixture, which is made while training; give it to khanhllm train --data")
    found = locate(source)
    started = time.monotonic()
    with aside(out) as new:
        job = _Job(found, tokenizer, new, tokens, workers or _cores())
        manifest = _manifest(found, tokenizer, validation, job.split(validation))
        (job.shards / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        job.shards.rename(out)
    say(
        f"prepared {manifest.train_tokens:,} training and {manifest.validation_tokens:,} validation tokens "
        f"in {time.monotonic() - started:.0f} s: {out}"
    )
    return manifest


@contextmanager
def aside(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, to be renamed to it when it is whole; whatever is left of it is removed."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            yield new
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None


def _manifest(source: Source, tokenizer: Tokenizer, validation: float, reports: list[Report]) -> Manifest:
    return Manifest(
        version=VERSION,
        source=source.name,
        tokenizer=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype_for(tokenizer.vocab_size),
        validation=validation,
        train_tokens=sum(report.count("train") for report in reports),
        validation_tokens=sum(report.count("validation") for report in reports),
        shards=tuple(shard for report in reports for shard in report.shards),
    )


class _Job:
    """One preparation: the pipeline, run as often as it takes."""

    def __init__(self, source: Source, tokenizer: Tokenizer, aside: Path, tokens: int, workers: int) -> None:
        self.source = source
        self.tokens = tokens
        self.workers = workers
        self.groups = source.groups()
        self.aside = aside
        self.shards = aside / "shards"
        self.dtype = dtype_for(tokenizer.vocab_size)
        tokenizer.save(self.shards / "tokenizer.json")

    def split(self, validation: float) -> list[Report]:
        """Run with the share asked for; a corpus too small for chance gives its lowest hash to validation."""
        amount = f"about {self.source.size / 1e6:,.0f} MB of text" if self.source.size else "text"
        limit = f", no more than {self.tokens:,} training tokens of it" if self.tokens else ""
        say(f"turning {self.source.name} into tokens: {amount} in {len(self.source.files):,} files{limit}")
        reports = self.run(int(validation * HASHES))
        if not reports:
            raise UserError(f"{self.source.name} holds no text: every file of it is empty")
        lowest, highest = min(report.lowest for report in reports), max(report.highest for report in reports)
        if lowest == highest:
            raise UserError(f"{self.source.name} is a single document, but one must be held out; give more text")
        if not any(report.count("validation") for report in reports):
            return self.run(lowest + 1)
        if not any(report.count("train") for report in reports):
            return self.run(highest)
        return reports

    def run(self, threshold: int) -> list[Report]:
        """Run tasks, in waves if not all are needed. Documents with a hash below `threshold` are held out."""
        for old in self.shards.glob("*.bin"):
            old.unlink()
        shutil.rmtree(self.aside / "log", ignore_errors=True)
        counts: list[int] = []
        with _watching(self.shards, self.dtype, self.tokens):
            while len(counts) < len(self.groups) and not self._enough(counts):
                wave = self._wave(counts)
                self._execute(threshold, len(counts), wave)
                counts += [self._report(rank)[1] for rank in range(len(counts), len(counts) + wave)]
        kept = next((nth for nth in range(len(counts)) if self._enough(counts[:nth])), len(counts))
        for rank in range(kept, len(counts)):
            for path in self.shards.glob(f"*-{rank:05d}.bin"):
                path.unlink()
        reports = (self._report(rank)[0] for rank in range(kept))
        return [report for report in reports if report.shards]

    def _enough(self, counts: list[int]) -> bool:
        return 0 < self.tokens <= sum(counts)

    def _wave(self, counts: list[int]) -> int:
        """Tasks worth starting now: all, or as many as the tokens still missing seem to need."""
        left = len(self.groups) - len(counts)
        if not self.tokens:
            return left
        each = sum(counts) / len(counts) if counts else self.tokens
        return min(left, self.workers, max(1, round((self.tokens - sum(counts)) / max(each, 1))))

    def _execute(self, threshold: int, first: int, wave: int) -> None:
        workers = min(self.workers, wave)
        writer = ShardWriter(self.shards, self.aside, threshold, self.tokens, max(1, _cores() // workers), workers > 1)
        LocalPipelineExecutor(
            pipeline=[Reader(self.source, self.groups), writer],
            tasks=len(self.groups),
            workers=workers,
            logging_dir=str(self.aside / "log"),
            local_tasks=wave,
            local_rank_offset=first,
        ).run()

    def _report(self, rank: int) -> tuple[Report, int]:
        report = Report.model_validate_json(report_path(self.aside, rank).read_bytes())
        return report, report.count("train")


def train_on(source: str, vocab_size: int, sample_bytes: int, validation: float = 0.01) -> Tokenizer:
    """Train a tokenizer on at most `sample_bytes` of the source's training documents, spread over its files.

    Each component of a mixture gives its share.

    Memory does not grow with the source. Raises UserError for anything wrong with the source.
    """
    shares = [(locate(name), int(weight * sample_bytes)) for name, weight in components(source)]
    amount = sum(min(found.size or share, share) for found, share in shares) / 1e6
    say(f"training a tokenizer of {vocab_size:,} tokens on {amount:,.0f} MB of {source} (at most; a sample is enough)")
    started = time.monotonic()
    samples = chain.from_iterable(_sample(found, share, validation) for found, share in shares)
    tokenizer = train(samples, vocab_size, progress=_console().is_terminal)
    say(f"trained the tokenizer in {time.monotonic() - started:.0f} s: {tokenizer.vocab_size:,} tokens")
    return tokenizer


def _sample(source: Source, most: int, validation: float) -> Iterator[str]:
    """Training documents from the beginning of each file, no file giving more than its share."""
    reader = Reader(source, [])
    # of a distant source, no more files are fetched than the sample needs
    share = most if is_remote(source.root) else max(most // min(SPREAD, len(source.files)), 1)
    empty = True
    for name in source.files:
        room = min(share, most)
        for document in reader.read_file(name):
            empty = False
            raw = document.text.encode()
            if text_hash(raw) >= int(validation * HASHES):
                raw = raw[:room]
                yield raw.decode(errors="ignore")
                room -= len(raw)
                most -= len(raw)
            if room <= 0:
                break
        if most <= 0:
            break
    if empty:
        raise UserError(f"{source.name} holds no text: every file of it is empty")


def ensure(data: DataConfig, vocab_size: int, tokens_needed: int) -> Path:
    """The folder of shards for a run: the one given, one from the cache, or a new one.

    vocab_size: of the model, no less than the tokenizer's. tokens_needed: training tokens of the run. A source that
    is remote, a mixture or larger than WHOLE becomes a belt, whose shards are made while the model trains. Raises
    UserError.
    """
    folder = Path(data.source)
    if not (folder / MANIFEST).is_file():
        parts = components(data.source)
        sources = [None if is_remote(name) else locate(name) for name, _ in parts]
        fingerprints = [
            source.fingerprint if source else name for source, (name, _) in zip(sources, parts, strict=True)
        ]
        whole = len(sources) == 1 and sources[0] and sources[0].size <= WHOLE
        given = Tokenizer.load(Path(data.tokenizer)) if data.tokenizer else None
        recipe: list[Any] = [VERSION, fingerprints[0] if whole else fingerprints, data.validation, data.tokens]
        recipe += [given.sha256] if given else [vocab_size, data.tokenizer_sample]
        recipe += [] if whole else [data.shard_tokens, [weight for _, weight in parts]]
        folder = Path(data.cache) / _folder_name(data.source, recipe)
        if given:
            _fits(given.vocab_size, vocab_size, data.tokenizer)
        if not (folder / MANIFEST).is_file():
            _make(folder, data, given, vocab_size, tokens_needed)
    _check(folder, data.tokenizer, vocab_size)
    return folder


def _make(folder: Path, data: DataConfig, tokenizer: Tokenizer | None, vocab_size: int, tokens_needed: int) -> None:
    with _alone(folder):
        if (folder / MANIFEST).is_file():
            return
        for left_over in folder.parent.glob(f".{folder.name}-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        sources = [(locate(name), weight) for name, weight in components(data.source)]
        whole = len(sources) == 1 and 0 < sources[0][0].size <= WHOLE and not is_remote(data.source)
        # a short run must not read a long sample: 8 bytes are more than a token ever stands for on average
        most = data.tokenizer_sample if whole else max(8 * (data.tokens or tokens_needed), LEAST_SAMPLE)
        sample = min(data.tokenizer_sample, most)
        tokenizer = tokenizer or train_on(data.source, vocab_size, sample, data.validation)
        if whole:
            prepare(
                data.source, tokenizer, folder, validation=data.validation, tokens=data.tokens, workers=data.workers
            )
            return
        with aside(folder) as new:
            lay(new, data.source, sources, tokenizer, data.validation, data.shard_tokens, data.tokens)
            new.rename(folder)


def _check(folder: Path, tokenizer: str, vocab_size: int) -> None:
    manifest = Manifest.read(folder)
    _fits(manifest.vocab_size, vocab_size, str(folder))
    for path in (folder / "tokenizer.json", *([Path(tokenizer)] if tokenizer else [])):
        if Tokenizer.load(path).sha256 != manifest.tokenizer:
            raise UserError(f"the tokenizer {path} does not match the shards in {folder}; prepare them again with it")


def _fits(tokens: int, vocab_size: int, where: str) -> None:
    if tokens > vocab_size:
        raise UserError(f"{where} has {tokens} tokens, more than model.vocab_size {vocab_size}; raise that to {tokens}")


def _folder_name(source: str, recipe: list[Any]) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", source.lower()).strip("-")[-40:].strip("-") or "text"
    return f"{slug}-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]}"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time prepares a folder; the others wait and then find it done."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder.parent} (data.cache): {error.strerror}") from None
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process is preparing {folder}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _watching(folder: Path, dtype: Dtype, goal: int) -> Iterator[None]:
    """Show how many tokens there are so far, by the size of the growing files: no channel to the workers is needed."""
    stop = Event()

    def tokens() -> int:
        size = 0
        for path in folder.glob("*.bin"):
            with suppress(FileNotFoundError):  # a task that held nothing out removes its empty file
                size += path.stat().st_size
        return size // np.dtype(dtype).itemsize

    def draw() -> None:
        columns = (SpinnerColumn(), TextColumn("{task.completed:,.0f} tokens"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=_console(), transient=True) as progress:
            task = progress.add_task("tokens", total=goal or None)
            while not stop.wait(0.2):
                progress.update(task, completed=tokens())

    def tell() -> None:
        while not stop.wait(10):
            say(f"{tokens():,} tokens so far")

    thread = Thread(target=draw if _console().is_terminal else tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _console() -> Console:
    return Console(stderr=True)


def say(text: str) -> None:
    """One plain line on stderr."""
    _console().print(text, markup=False, highlight=False, soft_wrap=True)
