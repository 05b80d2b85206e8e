"""Save checkpoints beside the training, which waits only for a copy of its tensors in memory."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from khanhllm import limits
from khanhllm.errors import UserError
from khanhllm.training import checkpoint
from khanhllm.units import as_size

FAILURES = 3
"""saves that fail in a row until the run stops"""
PATIENCE = 600
"""how long a save that must succeed waits for room on the disk (seconds)"""
BESIDE = 2**20
"""room for what a checkpoint holds beside its tensors (bytes)"""


class Saver:
    """Saves on a thread of its own, one checkpoint at a time. Keeps the newest `keep` of a run, and the one of the step
    that `best` chooses of all those saved."""

    def __init__(
        self,
        run: Path,
        keep: int,
        say: checkpoint.Say = checkpoint.to_stderr,
        best: Callable[[list[int]], int | None] = lambda _steps: None,
    ) -> None:
        self.run, self.keep, self.say, self.best = run, keep, say, best
        self.failures = 0
        """in a row"""
        self.seconds = 0.0
        """that the last one took to write"""
        self._size = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        must: bool,
        moments: checkpoint.Moments | None = None,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        """Begin to save, and say what became of the save before.

        must: wait until it is written, if need be for room on the disk too; also if the saves before it have failed
        too often. Raises UserError if that fails.
        """
        self.report(patient=True)
        self.begin(step, model, optimizer, state, moments, weights)
        deadline = time.monotonic() + PATIENCE
        while must or self.failures >= FAILURES - 1:
            try:
                path = self.outcome(patient=True)
                return self.say(f"saved {path}")
            except OSError as error:
                fault = f"a checkpoint could not be saved: {error}"
                if not self._lacks_room() or time.monotonic() > deadline:
                    raise UserError(f"{fault}; {self._kept()}") from None
                self.say(f"{fault}; make room there: this waits for it up to {PATIENCE / 60:.0f} minutes")
            while self._lacks_room() and time.monotonic() <= deadline:
                time.sleep(1)
            self.begin(step, model, optimizer, state, moments, weights)

    def report(self, patient: bool = False) -> None:
        """Say what became of the last save, once it is known. patient: wait for it."""
        try:
            if path := self.outcome(patient):
                self.say(f"saved {path}")
        except OSError as error:
            self.say(f"a checkpoint could not be saved: {error}; training continues; {self._kept()}")

    def begin(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        moments: checkpoint.Moments | None = None,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        """Take what is to be saved, now; see checkpoint.snapshot. Where there is no memory for a copy, this waits until
        it is written."""
        whole = checkpoint.snapshot(step, model, optimizer, state, moments, weights)
        self._size = whole.bytes
        copy = limits.memory().free > 1.5 * whole.bytes
        best = self.best([step, *map(checkpoint.step_of, checkpoint.steps(self.run))])
        self._writing = self._pool.submit(self._write, whole.copied() if copy else whole, best)
        if not copy:
            wait([self._writing])

    def outcome(self, patient: bool = False) -> Path | None:
        """The checkpoint that was written since the last call, if any. Waits for it if `patient`.

        Raises OSError if it could not be written.
        """
        if self._writing is None or not (patient or self._writing.done()):
            return None
        writing, self._writing = self._writing, None
        self.failures += 1
        path = writing.result()
        self.failures = 0
        return path

    def _write(self, whole: checkpoint.Snapshot, best: int | None) -> Path:
        started = time.perf_counter()
        path = checkpoint.write(self.run, whole)
        if not whole.state.get("guard", {}).get("rejected"):  # else the last good one may be among those
            checkpoint.prune(self.run, self.keep, best)
        self.seconds = time.perf_counter() - started
        return path

    def _lacks_room(self) -> bool:
        with suppress(OSError):
            return checkpoint.room(self.run) < self._size + BESIDE
        return False

    def _kept(self) -> str:
        found = checkpoint.steps(self.run)
        return f"the last one saved is {found[0].name}, for --resume" if found else "nothing of this run is saved"

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def room_for(run: Path, size: int, keep: int, saves: int) -> str:
    """One line of warning if the disk has no room for as many of the coming `saves` as are there at the same time;
    empty if it has. size: bytes of a checkpoint. keep: of them that are kept.

    Raises UserError if there is no room for one: the training would be for nothing.
    """
    # the newest is written before the oldest is deleted
    together = min(saves, max(1, keep + 1 - len(checkpoint.steps(run))))
    free = checkpoint.room(run)
    has = f"the disk of {run} has {as_size(free)} free"
    if together and free < size:
        raise UserError(f"{has}, a checkpoint takes {as_size(size)}: make room, or choose another folder (--run)")
    if free < together * size:
        needs = f"{together} checkpoints will take {as_size(together * size)}"
        return f"{has}, {needs}: make room, or lower --train.keep"
    return ""
