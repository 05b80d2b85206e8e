"""Run the pipeline of a preparation by one of datatrove's executors: local processes, a Slurm array, or Ray.

A task does every N-th group of files. The source alone decides the groups, and each has files of its own. So neither
the executor nor the number of tasks changes the result, and no finished group is done again.
"""

import importlib
import importlib.util
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_all_start_methods
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from khanhllm.data.clean import COMPARING, steps_of
from khanhllm.data.duplicates import Signatures, merge, removals, reports_of
from khanhllm.data.readers import Reader
from khanhllm.data.shards import Dtype, dtype_for
from khanhllm.data.sources import Source
from khanhllm.data.tokenizer import Tokenizer
from khanhllm.data.writer import HASHES, Report, ShardWriter, no_text, report_path, single_text
from khanhllm.errors import UserError
from khanhllm.limits import cores
from khanhllm.units import as_size, counted


class Unfinished(Exception):
    """The cluster is still working; the text says how far it is."""


@dataclass(frozen=True)
class Execution:
    """Where the tasks of a preparation run."""

    executor: str = "local"
    """local, slurm or ray"""
    tasks: int = 0
    """0 means one for each group of files"""
    workers: int = 0
    """tasks at a time; 0 means one for each core, on a cluster as many as it gives"""
    partition: str = ""
    time: str = "24:00:00"
    cpus: int = 1
    """cores of a Slurm task, which encode in parallel"""
    mem_per_cpu: int = 2
    """memory of a Slurm task for each core (GiB)"""
    patience: float = 600.0
    """without any answer from the network until a task gives up (seconds)"""

    def check(self, tokens: int) -> None:
        """Raise UserError for what cannot work, before any work is done."""
        if self.executor not in ("local", "slurm", "ray"):
            raise UserError(f"executor must be local, slurm or ray, not {self.executor!r}")
        if self.tasks < 0:
            raise UserError(f"tasks must be 0 or more, not {self.tasks}")
        if min(self.cpus, self.mem_per_cpu) < 1:
            raise UserError(f"cpus and mem-per-cpu must be 1 or more, not {self.cpus} and {self.mem_per_cpu}")
        if tokens and self.executor != "local":
            raise UserError(f"--tokens needs --executor local: on {self.executor} the whole source is prepared")
        if self.executor == "slurm" and not self.partition:
            raise UserError("--executor slurm needs a --partition; `sinfo` lists them")
        if self.executor == "slurm" and not shutil.which("sbatch"):
            raise UserError("--executor slurm needs the command sbatch, which is not here; run this on a login node")
        if self.executor == "ray" and not importlib.util.find_spec("ray"):
            raise UserError("--executor ray needs ray, which is not installed: pip install 'khanhllm[ray]'")


class Job:
    """One preparation, which runs the pipeline once or several times."""

    def __init__(
        self, source: Source, tokenizer: Tokenizer, aside: Path, tokens: int, execution: Execution, clean: str = ""
    ) -> None:
        self.source = source
        self.clean = clean
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.execution = execution
        self.workers = execution.workers or cores()
        self.groups = source.groups()
        self.aside = aside
        self.dtype = dtype_for(tokenizer.vocab_size)

    def split(self, validation: float) -> list[Report]:
        """Run with this share for validation. If no hash falls into it, hold out the text with the lowest hash."""
        amount = f"about {as_size(self.source.size)} of text" if self.source.size else "text"
        limit = f", no more than {self.tokens:,} training tokens of it" if self.tokens else ""
        say(f"turning {self.source.name} into tokens: {amount} in {counted(len(self.source.files), 'file')}{limit}")
        for step in steps_of(self.clean):
            if step in COMPARING:
                self._compare(step)
        reports = self.run(int(validation * HASHES))
        if not any(report.shards for report in reports):
            if any(report.laid and report.laid.left_out for report in reports):
                fits = f"has an answer that fits into {self.source.laid_for:,} tokens (model.context)"
                raise UserError(f"{self.source.name} holds no text: none of its conversations {fits}")
            raise no_text(self.source.name, self.clean, any(report.skipped for report in reports))
        lowest, highest = min(report.lowest for report in reports), max(report.highest for report in reports)
        if lowest == highest:
            documents = sum(shard.documents for report in reports for shard in report.shards)
            raise single_text(self.source.name, documents)
        if not any(report.count("validation") for report in reports):
            return self.run(lowest + 1)
        if not any(report.count("train") for report in reports):
            return self.run(highest)
        return reports

    def _compare(self, step: str) -> None:
        """Let the tasks read the source for signatures, and merge these in this process."""
        say(f"looking for what {step} removes; this reads the text once more")
        self.folder = self.aside / step
        self.reports = reports_of(self.aside, step)
        self.reports.mkdir(parents=True, exist_ok=True)
        if self._done(0, len(self.groups)) < len(self.groups):
            reader = Reader(self.source, self.groups)
            self._execute(
                lambda _, in_child: Signatures(step, reader, self.clean, self.aside, in_child), 0, len(self.groups)
            )
        merge(self.aside, step)

    def run(self, threshold: int) -> list[Report]:
        """Run tasks, in waves if not all are needed. Documents with a hash below `threshold` are held out."""
        self.folder = self.aside / f"{threshold:x}"  # shards of another threshold do not count
        self.shards = self.folder / "shards"
        self.reports = self.folder / "reports"
        self.reports.mkdir(parents=True, exist_ok=True)
        if not (self.shards / "tokenizer.json").exists():
            self.tokenizer.save(self.shards / "tokenizer.json")
        counts: list[int] = []
        with _watching(self.shards, self.dtype, self.tokens):
            while len(counts) < len(self.groups) and not self._enough(counts):
                wave = self._wave(counts)
                if self._done(len(counts), wave) < wave:
                    self._execute(partial(self._writer, threshold), len(counts), wave)
                counts += [self._report(group).count("train") for group in range(len(counts), len(counts) + wave)]
        needed = next((nth for nth in range(len(counts)) if self._enough(counts[:nth])), len(counts))
        reports = [self._report(group) for group in range(needed)]
        named = {shard.file for report in reports for shard in report.shards}
        for path in self.shards.glob("*.bin*"):
            if path.name not in named:
                path.unlink()
        return reports

    def _enough(self, counts: list[int]) -> bool:
        return 0 < self.tokens <= sum(counts)

    def _wave(self, counts: list[int]) -> int:
        """How many groups to start now: all, or as many as the missing tokens probably need."""
        left = len(self.groups) - len(counts)
        if not self.tokens:
            return left
        each = sum(counts) / len(counts) if counts else self.tokens
        return min(left, self.workers, max(1, round((self.tokens - sum(counts)) / max(each, 1))))

    def _done(self, first: int, wave: int) -> int:
        return sum(report_path(self.reports, group).exists() for group in range(first, first + wave))

    def _writer(self, threshold: int, threads: int, in_child: bool) -> ShardWriter:
        reader = Reader(self.source, self.groups, patience=self.execution.patience)
        removed = partial(removals, self.aside, self.clean)
        return ShardWriter(
            reader, self.shards, self.reports, threshold, self.tokens, threads, in_child, self.clean, removed
        )

    def _execute(self, step: Callable[[int, bool], PipelineStep], first: int, wave: int) -> None:
        """Run tasks on the executor. step: makes the pipeline's step, from its threads and whether it is a child."""
        if self.execution.executor == "slurm":
            self._submit(step(self.execution.cpus, False))
        log = self.folder / "log"
        shutil.rmtree(log, ignore_errors=True)
        # in waves, each task is one group; otherwise a task takes every N-th
        tasks = len(self.groups) if self.tokens else self._tasks()
        wave = wave if self.tokens else tasks
        if self.execution.executor == "ray":
            ray = importlib.import_module("ray")
            if not ray.is_initialized():
                ray.init(log_to_driver=False)
            workers = self.execution.workers or -1
            RayPipelineExecutor([step(1, False)], tasks, workers, skip_completed=False, logging_dir=str(log)).run()
            if self._done(0, len(self.groups)) < len(self.groups):
                raise UserError(f"{self._progress()}; why the others failed is in {log / 'logs'}")
            return
        workers = min(self.workers, wave)
        threads = max(1, cores() // workers)
        executor = LocalPipelineExecutor(
            pipeline=[step(threads, workers > 1)],
            tasks=tasks,
            workers=workers,
            logging_dir=str(log),
            skip_completed=False,
            start_method="forkserver" if "forkserver" in get_all_start_methods() else "spawn",  # as on Windows
            local_tasks=wave,
            local_rank_offset=first,
        )
        with _main_stays_here():
            executor.run()

    def _submit(self, step: PipelineStep) -> None:
        """Submit the tasks to Slurm, unless it has them already. Raises Unfinished; the same command publishes."""
        log, ticket = self.folder / "log", self.folder / "job"
        logs = f"the logs are in {log / 'slurm_logs'}"
        if ticket.exists() and _queued(ticket.read_text(encoding="utf-8")):
            raise Unfinished(f"{self._progress()} by Slurm job {ticket.read_text(encoding='utf-8')}; {logs}")
        shutil.rmtree(log, ignore_errors=True)
        executor = _Slurm(
            [step],
            self._tasks(),
            self.execution.time,
            self.execution.partition,
            cpus_per_task=self.execution.cpus,
            mem_per_cpu_gb=self.execution.mem_per_cpu,
            workers=self.execution.workers or -1,
            job_name="khanhllm-prepare",
            qos="",
            env_command=f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
            logging_dir=str(log),
            skip_completed=False,
        )
        try:
            executor.run()
        except subprocess.CalledProcessError as error:
            raise UserError(f"sbatch refused the job (exit code {error.returncode}); see its message above") from None
        ticket.write_text(str(executor.job_id), encoding="utf-8")
        raise Unfinished(
            f"{self._progress()}; Slurm job {executor.job_id} has {self._tasks()} tasks, {logs}; "
            "run the same command again when it is done"
        )

    def _tasks(self) -> int:
        return min(self.execution.tasks or len(self.groups), len(self.groups))

    def _progress(self) -> str:
        return f"{self._done(0, len(self.groups)):,} of {len(self.groups):,} groups are done"

    def _report(self, group: int) -> Report:
        return Report.model_validate_json(report_path(self.reports, group).read_bytes())


@contextmanager
def _main_stays_here() -> Iterator[None]:
    """Within this context, new worker processes do not import the script that runs: a script that trains would begin
    another training in each of them. The workers need only this package."""
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {name: vars(main)[name] for name in ("__file__", "__spec__") if name in vars(main)}
    vars(main).pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(hidden)


class _Slurm(SlurmPipelineExecutor):  # type: ignore[misc]
    """datatrove's executor without its second job, which only adds up datatrove's own statistics."""

    def launch_merge_stats(self) -> None:
        pass


def _queued(job: str) -> bool:
    """Whether Slurm still has the job. True also if squeue fails, as two jobs must not write the same files."""
    try:
        answer = subprocess.run(["squeue", "--noheader", f"--jobs={job}"], capture_output=True, text=True, check=False)
    except OSError:
        return True
    return bool(answer.stdout.strip()) or (answer.returncode != 0 and "Invalid job id" not in answer.stderr)


@contextmanager
def _watching(folder: Path, dtype: Dtype, goal: int) -> Iterator[None]:
    """Show how many tokens exist so far, by the size of the growing files, which needs no channel to the workers."""
    stop = Event()

    def tokens() -> int:
        size = 0
        for path in folder.glob("*.bin*"):
            with suppress(FileNotFoundError):  # a task that held nothing out removes its empty file
                size += path.stat().st_size
        return size // np.dtype(dtype).itemsize

    def draw() -> None:
        columns = (SpinnerColumn(), TextColumn("{task.completed:,.0f} tokens"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console(), transient=True) as progress:
            task = progress.add_task("tokens", total=goal or None)
            while not stop.wait(0.2):
                progress.update(task, completed=tokens())

    def print_lines() -> None:
        while not stop.wait(10):
            say(f"{tokens():,} tokens so far")

    thread = Thread(target=draw if console().is_terminal else print_lines, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def console() -> Console:
    """A console on stderr."""
    return Console(stderr=True)


def say(text: str) -> None:
    """Print one plain line on stderr."""
    console().print(text, markup=False, highlight=False, soft_wrap=True)
