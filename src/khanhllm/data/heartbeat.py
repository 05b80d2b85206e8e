"""A heartbeat: is the belt worker alive and making progress? It touches a file, and its parent checks the time of that.

A thread touches the file. So a process that is stopped, or gets no time because memory is being swapped, falls silent
at once; one that works slowly, or waits for the network within its patience, does not. The thread also watches the
work: it stops touching the file when the work makes no progress for longer than any real work takes, as when a file
system has gone away. It does not notice work that makes progress but never ends.
"""

import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

from khanhllm.files import signed

BEAT = 1.0
"""seconds between two touches"""
SILENT = 60.0
"""seconds without a touch until a process counts as stopped; they must cover its start, when it imports libraries"""
WORK = 600.0
"""longest real work without progress (seconds), apart from waiting for the network: checking a large packed file"""


def heartbeat_path(folder: Path, process: int) -> Path:
    """The file that a process touches; by its name, it is removed with the unfinished shards of a process that died."""
    return folder / f".train-heartbeat.{signed(process)}"


def beat(path: Path, sign: Callable[[], Any], longest: float) -> None:
    """Touch `path` regularly, until `sign` has returned the same for `longest` seconds. Raises OSError."""
    path.touch()

    def touch_while_working() -> None:
        last, since = sign(), time.monotonic()
        while time.monotonic() - since < longest:
            path.touch()
            time.sleep(BEAT)
            if (now := sign()) != last:
                last, since = now, time.monotonic()

    Thread(target=touch_while_working, daemon=True).start()


class Heartbeat:
    """The parent's view of one child. Only changes of the file's time count, so their clocks need not agree."""

    def __init__(self, folder: Path, process: int) -> None:
        self.process = process
        self.path = heartbeat_path(folder, process)
        self.last, self.since = 0, time.monotonic()

    def silent(self) -> bool:
        """Whether the child has not touched its file for SILENT seconds."""
        try:
            now = self.path.stat().st_mtime_ns
        except FileNotFoundError:
            now = 0
        if now != self.last:
            self.last, self.since = now, time.monotonic()
        return time.monotonic() - self.since > SILENT

    def forget(self) -> None:
        """Remove the file, and what else the child, now dead, left unfinished under its number."""
        for left_over in self.path.parent.glob(f".train-*.{signed(self.process)}"):
            left_over.unlink(missing_ok=True)
