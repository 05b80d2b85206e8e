"""Inject seeded faults into a tiny run and count those that it survives, so that anybody can test the promises."""

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from khanhllm.chaos import belt, clients, many, numbers, saves, trainers
from khanhllm.chaos.arena import Arena
from khanhllm.errors import UserError

Kind = Callable[[Arena, random.Random], Iterator[str]]
KINDS: dict[str, tuple[Kind, int]] = {
    "kill -9 of the trainer": (trainers.killed, 200),
    "signals, five in a chain": (trainers.asked_to_stop, 250),
    "a second run in the folder": (trainers.met_by_a_rival, 20),
    "files that may not grow": (trainers.out_of_quota, 20),
    "a save cut short": (saves.cut_short, 0),
    "a damaged checkpoint": (saves.flipped, 500),
    "NaN and infinity": (numbers.not_finite, 1000),
    "network faults": (belt.failing_network, 500),
    "deaths of belt worker and server": (belt.dying_helpers, 100),
    "clients of the model's server": (clients.vanishing, 1000),
    "processes: kill -9 of one": (many.killed, 40),
    "processes: one halted": (many.halted, 20),
    "processes: signals": (many.signalled, 50),
    "processes: kill -9 of the launcher": (many.orphaned, 20),
    "processes: NaN on some": (many.not_finite, 40),
    "processes: no memory on one": (many.out_of_memory, 10),
    "processes: files that may not grow": (many.out_of_room, 10),
    "processes: no network": (many.cut_off, 10),
}
"""each kind with its share of the faults; 0: a save is cut short at every system call that it makes"""


@dataclass
class Tally:
    """Faults of one kind and how many were survived."""

    faults: int = 0
    survived: int = 0
    seconds: float = 0.0
    first: str = ""
    """what went wrong first"""


def run(seed: int, faults: int, minutes: float, only: str = "", console: Console | None = None) -> int:
    """Inject faults and print a table of how many of each kind the run survived. Returns how many it did not.

    minutes: no fault begins after this time; 0 for no limit. only: leave out the kinds without this in their name. The
    same seed gives the same faults.
    """
    console = console or Console()
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    tallies: dict[str, Tally] = {}
    kinds = {name: kind for name, kind in KINDS.items() if only in name}
    scale = faults / (sum(share for _, share in kinds.values()) or faults)
    with (
        tempfile.TemporaryDirectory(prefix="khanhllm-chaos-") as folder,
        console.status("an undisturbed run") as status,
    ):
        arena = Arena(Path(folder).resolve())
        arena.undisturbed  # noqa: B018
        with suppress(KeyboardInterrupt):  # the table then says what was thrown so far
            for name, (kind, share) in kinds.items():
                number = _number(share, scale, arena)
                tally = tallies[name] = Tally()
                begun = time.monotonic()
                for fault in islice(kind(arena, random.Random(f"{seed}/{name}")), number):
                    tally.faults += 1
                    tally.survived += not fault
                    tally.first = tally.first or fault
                    status.update(f"{name}: {tally.survived} of {tally.faults} survived, {number} to be thrown")
                    if time.monotonic() > deadline:
                        break
                tally.seconds = time.monotonic() - begun
    console.print(_table(tallies, seed))
    for name, tally in tallies.items():
        if tally.first:
            console.print(f"{name}: {tally.first}", markup=False)
    return sum(tally.faults - tally.survived for tally in tallies.values())


def _number(share: int, scale: float, arena: Arena) -> int:
    if share:
        return max(1, round(share * scale))
    every = saves.boundaries(arena)
    return min(every, max(1, round(every * scale))) if every else 0


def _table(tallies: dict[str, Tally], seed: int) -> Table:
    table = Table(title=f"khanhllm chaos --seed {seed}", title_justify="left")
    for column in ("fault", "thrown", "survived", "seconds", ""):
        table.add_column(column, justify="left" if column in ("fault", "") else "right")
    for name, tally in tallies.items():
        verdict = "ok" if tally.faults and tally.survived == tally.faults else "FAILED" if tally.faults else "not here"
        table.add_row(name, f"{tally.faults:,}", f"{tally.survived:,}", f"{tally.seconds:.0f}", verdict)
    return table


def checked(seed: int, faults: int, minutes: float, only: str) -> int:
    """`run` as a command. Returns its exit code: 1 if the run did not survive a fault. Raises UserError for arguments
    out of range."""
    if faults < 1 or minutes < 0:
        raise UserError("--faults must be at least 1 and --minutes at least 0")
    if not any(only in name for name in KINDS):
        raise UserError(f"--only {only[:60]!r} is in no kind of fault; they are: {', '.join(KINDS)}")
    return 1 if run(seed, faults, minutes, only) else 0
