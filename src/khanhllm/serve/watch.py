"""Follow the files of a run that trains: its logs, from where the last look ended, and the ends of its texts.

A log may have millions of lines. It is read once, and kept as at most `POINTS` points for each curve: when they are
full, each two become one. A training may cut its log back at any time, or write it anew; then it is read again.
"""

import math
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np

from khanhllm.draw import Floats

POINTS = 512
"""of a curve, at most; at least half as many once there were more"""
CHUNK = 2**20
"""bytes of a log that are read at a time"""
MOST_COLUMNS = 1000
RANGED = ("loss", "grad_norm", "val_bpb")
"""columns of which the least and the largest are told too"""
TAIL = 2**16
"""bytes at the end of a text that are shown"""


class Curves:
    """Rows of numbers as points: of each column the mean, the least and the largest of the rows behind a point."""

    def __init__(self, columns: int) -> None:
        self.rows, self.width = 0, 1
        self.sum_PC, self.count_PC = np.zeros((0, columns)), np.zeros((0, columns))
        self.least_PC, self.most_PC = np.zeros((0, columns)), np.zeros((0, columns))
        self.last_C = np.full(columns, np.nan)
        """of each column, what was measured last"""

    def add(self, rows_NC: Floats) -> None:
        """Take more rows; nan where nothing was measured."""
        point_N = (self.rows + np.arange(len(rows_NC))) // self.width
        self.rows += len(rows_NC)
        known_NC = np.isfinite(rows_NC)
        latest_C = len(rows_NC) - 1 - known_NC[::-1].argmax(0)
        self.last_C = np.where(known_NC.any(0), rows_NC[latest_C, np.arange(rows_NC.shape[1])], self.last_C)
        more = ((0, (self.rows - 1) // self.width + 1 - len(self.sum_PC)), (0, 0))
        self.sum_PC, self.count_PC = np.pad(self.sum_PC, more), np.pad(self.count_PC, more)
        self.least_PC = np.pad(self.least_PC, more, constant_values=np.inf)
        self.most_PC = np.pad(self.most_PC, more, constant_values=-np.inf)
        np.add.at(self.sum_PC, point_N, np.where(known_NC, rows_NC, 0))
        np.add.at(self.count_PC, point_N, known_NC)
        np.minimum.at(self.least_PC, point_N, np.where(known_NC, rows_NC, np.inf))
        np.maximum.at(self.most_PC, point_N, np.where(known_NC, rows_NC, -np.inf))
        while len(self.sum_PC) > POINTS:
            self._halve()

    def _halve(self) -> None:
        first = np.arange(0, len(self.sum_PC), 2)
        self.width *= 2
        self.sum_PC, self.count_PC = np.add.reduceat(self.sum_PC, first), np.add.reduceat(self.count_PC, first)
        self.least_PC = np.minimum.reduceat(self.least_PC, first)
        self.most_PC = np.maximum.reduceat(self.most_PC, first)

    def columns(self, names: list[str]) -> dict[str, dict[str, list[float | None]]]:
        """The points of each column, null where nothing was measured."""
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_PC = self.sum_PC / self.count_PC
        kinds = {"mean": mean_PC, "least": self.least_PC, "most": self.most_PC}
        return {
            name: {
                kind: [_short(value) for value in values_PC[:, nth].tolist()]
                for kind, values_PC in kinds.items()
                if kind == "mean" or name in RANGED
            }
            for nth, name in enumerate(names)
        }


def _short(value: float) -> float | None:
    return float(f"{value:.8g}") if math.isfinite(value) else None


class Watch:
    """A log that somebody else writes. `split`: the column that says which curve a row belongs to; empty: all rows are
    one curve, of the name 0."""

    def __init__(self, path: Path, split: str = "") -> None:
        self.path, self.split = path, split
        self.version = secrets.randbelow(2**40)
        """grows with each change, and is another in another process"""
        self._lock = Lock()
        self._forget()

    def _forget(self) -> None:
        self.offset, self.last, self.inode = 0, b"", -1
        self.names: list[str] = []
        self.curves: dict[int, Curves] = {}

    def look(self, known: str = "") -> dict[str, Any]:
        """The curves as they are now; nothing but the version if that is the one `known`. A log that is missing, or is
        no regular file, has none."""
        with self._lock:
            try:
                with open(self.path, "rb", opener=_carefully) as file:
                    self._follow(file)
            except OSError:
                if self.offset:
                    self._forget()
                    self.version += 1
            if known == str(self.version):
                return {"version": self.version}
            curves = {str(name): curve.columns(self.names) for name, curve in sorted(self.curves.items())}
            last = {
                str(name): dict(zip(self.names, map(_short, curve.last_C.tolist()), strict=True))
                for name, curve in sorted(self.curves.items())
            }
            return {"version": self.version, "curves": curves, "last": last}

    def _follow(self, file: BinaryIO) -> None:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError
        file.seek(max(self.offset - len(self.last), 0))
        if status.st_ino != self.inode or file.read(len(self.last)) != self.last:  # cut back, or written anew
            self.version += bool(self.offset)
            self._forget()
            self.inode = status.st_ino
        file.seek(self.offset)
        while chunk := file.read(CHUNK):
            whole, line_feed, _half = chunk.rpartition(b"\n")
            if not line_feed:  # half a line, to be read again when it is whole, or a line of no log
                break
            self.offset += len(whole) + 1
            file.seek(self.offset)
            self.last = b"\n" + whole.rpartition(b"\n")[2] + b"\n" if b"\n" in whole else whole + b"\n"
            self._take(whole.decode(errors="replace").split("\n"))
            self.version += 1

    def _take(self, lines: list[str]) -> None:
        if not self.names:
            self.names = lines.pop(0).split(",")[:MOST_COLUMNS]
        found: dict[int, list[list[float]]] = {}
        at = self.names.index(self.split) if self.split in self.names else None
        for row in _numbers(lines, len(self.names)):
            key = row[at] if at is not None else 0
            if 0 <= key < MOST_COLUMNS:
                found.setdefault(int(key), []).append(row)
        for name, rows in found.items():
            self.curves.setdefault(name, Curves(len(self.names))).add(np.array(rows))


def _numbers(lines: list[str], columns: int) -> Iterator[list[float]]:
    """The rows of numbers; a line that a crash has cut is none."""
    for line in lines:
        cells = line.split(",")
        if len(cells) == columns:
            try:
                row = [float(cell) if cell else np.nan for cell in cells]
            except ValueError:
                continue
            yield row


def _carefully(path: str, flags: int) -> int:
    """Open without waiting for the writer of a pipe, and without following a link out of the run."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))


def tail(path: Path) -> str:
    """The last lines of a text that others write; empty if it is missing or no regular file."""
    try:
        with open(path, "rb", opener=_carefully) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return ""
            file.seek(max(status.st_size - TAIL, 0))
            end = file.read(TAIL)
    except OSError:
        return ""
    if status.st_size > TAIL:
        end = end.partition(b"\n")[2]
    return end.decode(errors="replace")
