"""A tiny run on real text, in processes that can be killed, and what it leaves without and with faults."""

import csv
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from khanhllm.errors import UserError
from khanhllm.files import sha256_of
from khanhllm.log.run_log import FILE, TIMING, lacks_validation
from khanhllm.machine.signals import exit_code
from khanhllm.schema import Config
from khanhllm.settings import resolve
from khanhllm.training import checkpoint
from khanhllm.training.run import train

PATIENCE = 120.0
"""seconds after which a training that has not ended counts as hung"""

SHAPE = {"pattern": "DM", "dim": 32, "heads": 2, "hidden": 64, "experts": 4, "context": 32, "vocab_size": 400}
TRAIN = {"steps": 60, "micro_batch": 2, "accumulation": 2, "eval_every": 10, "eval_tokens": 500, "save_every": 3}
Outcome = tuple[dict[str, str], list[dict[str, str]]]

# importing torch takes longer than a whole training here; one process does it, and all others are forked from that
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["khanhllm.chaos.arena"])


class Arena:
    """A folder with real text, and tiny runs on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.count = 0
        corpus = root / "corpus"
        corpus.mkdir()
        for package in (json, logging, multiprocessing):
            for path in sorted(Path(str(package.__file__)).parent.glob("*.py")):
                (corpus / f"{package.__name__}-{path.stem}.txt").write_bytes(path.read_bytes())

    def config(self, **sections: Any) -> Config:
        """The config of a tiny run, with changes by section."""
        return resolve(
            {
                "model": SHAPE,
                "data": {"source": str(self.root / "corpus"), "cache": str(self.root / "shards"), "workers": 1},
                "train": {**TRAIN, "sample_tokens": 0},
                "schedule": {"warmup": 5},
                "machine": {"device": "cpu", "threads": 1},
            },
            sections,
        )

    def folder(self) -> Path:
        """A folder that does not exist yet, for the next run."""
        self.count += 1
        return self.root / f"run-{self.count}"

    @cached_property
    def undisturbed(self) -> tuple[Path, float]:
        """The folder of a run without faults, and the seconds that it took."""
        self.calm(self.config())  # prepares the shards
        begun = time.monotonic()
        return self.calm(self.config()), time.monotonic() - begun

    def calm(self, config: Config) -> Path:
        """The folder of a run without faults."""
        folder = self.folder()
        if code := end(self.start(config, folder)):
            raise UserError(f"the undisturbed run ended with {code}: {output(folder)[-300:]}")
        return folder

    def finished(self, folder: Path) -> bool:
        """Whether the run has saved its last step, and validated after it."""
        config = self.config()
        saved = folder / "checkpoints" / f"step-{config.train.steps:07d}"
        return saved.exists() and not lacks_validation(folder, config, config.train.steps)

    def start(self, config: Config, folder: Path, before: Callable[[], None] | None = None) -> ForkServerProcess:
        """Start a training in a process of its own, which first calls `before`; it resumes the run in the folder, if
        any."""
        process = processes.Process(target=_train, args=(config, folder, before))
        process.start()
        return process


def _train(config: Config, folder: Path, before: Callable[[], None] | None) -> None:
    """Do what `khanhllm train` does."""
    os.setsid()
    folder.mkdir(exist_ok=True)
    written = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(written, 1)
    os.dup2(written, 2)
    if before:
        before()
    try:
        stopped = train(config, folder, resume=(folder / "config.toml").exists())
    except UserError as error:
        with suppress(OSError):  # the limit may leave no room for it
            os.write(written, f"{error}\n".encode())
        raise SystemExit(error.exit_code) from None
    raise SystemExit(exit_code(stopped))


def end(process: ForkServerProcess, patience: float = PATIENCE) -> int | None:
    """Wait for a training to end. Returns its exit code, negative for a signal; None if it hung and was killed."""
    process.join(patience)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    return process.exitcode


def wait_until(true: Callable[[], Any], process: ForkServerProcess) -> bool:
    """Wait until `true` holds or the process ends. Returns whether it held."""
    deadline = time.monotonic() + PATIENCE
    while process.is_alive() and time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.002)
    return False


def output(folder: Path) -> str:
    """What the trainings in a folder have printed."""
    return (folder / "output.txt").read_text("utf-8", "replace") if (folder / "output.txt").exists() else ""


def outcome(folder: Path) -> Outcome:
    """The contents of the newest checkpoint, and the CSV without the columns of timing."""
    newest = checkpoint.newest(folder)
    if newest is None:
        return {}, []
    held = {path.name: sha256_of(path) for path in newest.glob("*.safetensors")}
    held |= {key: str(value) for key, value in checkpoint.read_state(newest).items() if key != "folder"}
    rows = list(csv.DictReader((folder / FILE).open(encoding="utf-8")))
    return held, [{key: cell for key, cell in row.items() if key not in TIMING} for row in rows]


def difference(ours: Outcome, expected: Outcome) -> str:
    """How a run differs from the undisturbed one, in a line; empty if it does not."""
    other = [name for name in expected[0] if ours[0].get(name) != expected[0][name]]
    if other:
        return f"{', '.join(other)} differ from the undisturbed run's"
    return "" if ours[1] == expected[1] else "the log differs from the undisturbed run's"


def kill(process: ForkServerProcess) -> bool:
    """Kill a process by SIGKILL. Returns whether it was still alive."""
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive
