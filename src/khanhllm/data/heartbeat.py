"""Does the child process that makes shards live and get on? It touches a file, and its parent looks whether that stops.

The touching is done by a thread. So a process that is stopped, or that never gets a turn because memory is being
swapped, falls silent at once; one that works slowly, or waits for the network as long as it may, does not. The thread
also watches the work itself: if that shows no sign of progress for longer than honest work can take, as when a file
system has gone away, it ceases to touch. What is not covered is work that shows progress and yet never ends.
"""

import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

BEAT = 1.0
"""seconds between two touches"""
SILENT = 60.0
"""seconds without a touch after which a process counts as stopped; its start, which reads libraries, is within them"""
WORK = 600.0
"""longest honest work without a sign (seconds), besides waiting for the network: checking a large packed file"""


def heartbeat_path(folder: Path, process: int) -> Path:
    """Named so that it is swept up with the unfinished shards of a process that died."""
    return folder / f".train-heartbeat.{process}"


def beat(path: Path, sign: Callable[[], Any], longest: float) -> None:
    """Touch `path` from now on, until what `sign` returns has been the same for `longest` seconds. Raises OSError."""
    path.touch()

    def go_on() -> None:
        last, since = sign(), time.monotonic()
        while time.monotonic() - since < longest:
            path.touch()
            time.sleep(BEAT)
            if (now := sign()) != last:
                last, since = now, time.monotonic()

    Thread(target=go_on, daemon=True).start()


class Heartbeat:
    """The parent's view of one child. Only changes count, so that clocks need not agree."""

    def __init__(self, folder: Path, process: int) -> None:
        self.path = heartbeat_path(folder, process)
        self.last, self.since = 0, time.monotonic()

    def silent(self) -> bool:
        """Whether nothing was heard for SILENT seconds."""
        try:
            now = self.path.stat().st_mtime_ns
        except FileNotFoundError:
            now = 0
        if now != self.last:
            self.last, self.since = now, time.monotonic()
        return time.monotonic() - self.since > SILENT

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)
