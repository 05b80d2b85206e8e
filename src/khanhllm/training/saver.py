"""Save checkpoints beside the training, which waits only for a copy of its tensors in memory.

Where several processes train, the first gathers a small checkpoint and writes it alone. Of a large one each writes its
part: a thread of its own writes the files, as that of the first does otherwise. At the end of a step, once all have
written theirs, they tell the first what they wrote, and it publishes the whole. Threads talk to no other process.
"""

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from khanhllm import limits
from khanhllm.errors import UserError
from khanhllm.machine.group import ALONE, Group
from khanhllm.training import checkpoint
from khanhllm.units import as_size

SHARED_FROM = 20 * 10**9
"""size of a checkpoint above which each process writes its own part (bytes)"""
FAILURES = 3
"""saves that fail in a row until the run stops"""
PATIENCE = 600
"""how long a save that must succeed waits for room on the disk (seconds)"""
BESIDE = 2**20
"""room for what a checkpoint holds beside its tensors (bytes)"""


class Saver:
    """Saves on a thread of its own, one checkpoint at a time. Keeps the newest `keep` of a run, and the one of the step
    that `best` chooses of all those saved.

    group: the processes that write it together; all of them make the same calls, and all learn what became of them.
    """

    def __init__(
        self,
        run: Path,
        keep: int,
        say: checkpoint.Say = checkpoint.to_stderr,
        best: Callable[[list[int]], int | None] | None = None,
        group: Group = ALONE,
    ) -> None:
        self.run, self.keep, self.say, self.best, self.group = run, keep, say, best, group
        self.failures = 0
        """in a row"""
        self.seconds = 0.0
        """that the last one took to write"""
        self._size = 0
        self._noted: checkpoint.Snapshot | None = None
        """what is being written, but for its tensors"""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Any] | None = None

    @property
    def shared(self) -> bool:
        """Whether each process writes its part."""
        return not self.group.alone

    def save(self, part: checkpoint.Snapshot, must: bool) -> None:
        """Begin to save, unless this step is saved, and say what became of the save before. part: as for `begin`.

        must: wait until it is written, if need be for room on the disk too; also if the saves before it have failed
        too often. Raises UserError if that fails.
        """
        self.report(patient=True)
        if self.group.told(lambda: checkpoint.folder(self.run, part.step).exists()):
            return  # and then a belt starved, or a signal came, before the next step
        kept = self.begin(part)
        deadline = time.monotonic() + PATIENCE
        while must or self.failures >= FAILURES - 1:
            try:
                path = self.outcome(patient=True)
                return self.say(f"saved {path}")
            except OSError as error:
                fault = f"a checkpoint could not be saved: {error}"
                if self.group.told(lambda: not self._lacks_room() or time.monotonic() > deadline):
                    raise UserError(f"{fault}; {self._kept()}") from None
                self.say(f"{fault}; make room there: this waits for it up to {PATIENCE / 60:.0f} minutes")
            self.group.told(lambda: self._wait_for_room(deadline))
            self._start(kept)

    def report(self, patient: bool = False) -> None:
        """Say what became of the last save, once it is known. patient: wait for it."""
        try:
            if path := self.outcome(patient):
                self.say(f"saved {path}")
        except OSError as error:
            self.say(f"a checkpoint could not be saved: {error}; training continues; {self._kept()}")

    def begin(self, part: checkpoint.Snapshot) -> checkpoint.Snapshot:
        """Take what is to be saved, now, and return what is kept of it; `part` may be empty afterwards. Where there is
        no memory for a copy, this waits until it is written."""
        room = limits.memory().free > 1.5 * part.bytes * self.group.local_size
        told = self.group.exchange(part.bytes, room)
        self._size = int(sum(size for size, _ in told))
        copy = all(room for _, room in told)
        kept = part.copied() if copy else part
        self._start(kept)
        if not copy:
            self._is_written(patient=True)
        return kept

    def outcome(self, patient: bool = False) -> Path | None:
        """The checkpoint that was written since the last call, if any. Waits for it if `patient`.

        Raises OSError if it could not be written.
        """
        if self._writing is None or not self._is_written(patient):
            return None
        writing, self._writing = self._writing, None
        self.failures += 1
        path = self._joined(*writing.result()) if self.shared else writing.result()
        self.failures = 0
        return path

    def _start(self, kept: checkpoint.Snapshot) -> None:
        if not self.shared:
            best = self._best(kept.step)
            self._writing = self._pool.submit(self._write, kept, best)
            return
        self._noted = replace(kept, model={}, optimizer={})
        fault = self.group.told(lambda: _fault(lambda: checkpoint.prepare(self.run, kept.step, self._size)))
        self._writing = self._pool.submit(self._write_part, kept, fault)

    def _is_written(self, patient: bool) -> bool:
        """Whether all processes have written what they are to write. patient: wait until they have."""
        assert self._writing
        while not all(done for (done,) in self.group.exchange(self._writing.done())):
            if not patient:
                return False
            wait([self._writing], timeout=1)  # no longer, as others wait for this process, and lose patience
        return True

    def _write(self, whole: checkpoint.Snapshot, best: int | None) -> Path:
        started = time.perf_counter()
        path = checkpoint.write(self.run, whole)
        self._prune(whole.state, best)
        self.seconds = time.perf_counter() - started
        return path

    def _write_part(self, part: checkpoint.Snapshot, fault: str) -> tuple[dict[str, Any], str]:
        """What the manifest will say of this process's files, and why they could not be written; empty if they were.
        fault: why it need not try."""
        started, files = time.perf_counter(), {}
        if not fault:
            try:
                files = checkpoint.write_part(self.run, part, self.group.rank, self.group.size)
            except OSError as error:
                fault = f"process {self.group.rank}: {error}"
        self.seconds = time.perf_counter() - started
        return files, fault

    def _joined(self, files: dict[str, Any], fault: str) -> Path:
        """The checkpoint that the first process makes of what all have written. Raises OSError on all of them."""
        told = self.group.heard([files, fault])
        faults = "; ".join(dict.fromkeys(fault for _, fault in told if fault))
        every = {name: entry for part, _ in told for name, entry in part.items()}
        assert self._noted
        noted = self._noted

        def publish() -> None:
            checkpoint.publish(self.run, noted, every)
            self._prune(noted.state, self._best(noted.step))

        if fault := self.group.told(lambda: faults or _fault(publish)):
            self.group.told(lambda: checkpoint.discard(self.run, noted.step))
            raise OSError(fault)
        return checkpoint.folder(self.run, noted.step)

    def _best(self, step: int) -> int | None:
        kept = map(checkpoint.step_of, checkpoint.steps(self.run))
        return self.best([step, *kept]) if self.best else None

    def _prune(self, state: dict[str, Any], best: int | None) -> None:
        if not state.get("guard", {}).get("rejected"):  # else the last good one may be among those
            checkpoint.prune(self.run, self.keep, best)

    def _lacks_room(self) -> bool:
        with suppress(OSError):
            return checkpoint.room(self.run) < self._size + BESIDE
        return False

    def _wait_for_room(self, deadline: float) -> None:
        while self._lacks_room() and time.monotonic() <= deadline:
            time.sleep(1)

    def _kept(self) -> str:
        if not self.run.exists():
            return f"{self.run} is gone (moved or removed)"
        found = checkpoint.steps(self.run)
        return f"the last one saved is {found[0].name}, for --resume" if found else "nothing of this run is saved"

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def _fault(make: Callable[[], object]) -> str:
    """Why it cannot be done; empty if it is done."""
    try:
        make()
    except OSError as error:
        return str(error)
    return ""


def writers(run: Path, size: int, group: Group) -> tuple[Path, Group]:
    """Where the checkpoints of a run go, of so many bytes, and which processes write them. run: this process's folder.

    Raises UserError if another process cannot write where the first one does, and should.
    """
    if group.alone or size <= SHARED_FROM:
        return run, ALONE
    place = Path(group.told(lambda: str(run.resolve())))
    home, mark = checkpoint.home(place), ""
    with suppress(OSError):
        handle, mark = tempfile.mkstemp(dir=home, prefix=".write-test-")
        os.close(handle)
    marks = group.heard(Path(mark).name)
    apart = group.told(lambda: [rank for rank, name in enumerate(marks) if not (name and (home / name).exists())])
    if mark:
        Path(mark).unlink()
    if apart:
        raise UserError(
            f"process {apart[0]} cannot write into {home} of process 0: a checkpoint takes {as_size(size)}, of which "
            "each process writes its part; choose a run folder on a disk that all of them see (--run)"
        )
    return place, group


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
