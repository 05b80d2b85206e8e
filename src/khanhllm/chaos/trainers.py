"""Faults of a training as a whole: kills, signals to stop, a second run in its folder, a quota that is used up.

Each kind is a generator: it injects one fault after the other, and yields for each what went wrong, empty if nothing.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from khanhllm.chaos.arena import Arena, difference, end, kill, outcome, output, wait_until
from khanhllm.log.run_log import FILE
from khanhllm.schema import Config
from khanhllm.training import checkpoint

TOGETHER = 5
"""faults in one run"""
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")]


def killed(arena: Arena, chance: random.Random) -> Iterator[str]:
    """Kill the trainer at a random moment: in the end the run must equal the undisturbed one."""
    calm, seconds = arena.undisturbed
    while True:
        folder = arena.folder()
        kills = 0
        while kills < TOGETHER and not arena.finished(folder):
            process = arena.start(arena.config(), folder)
            process.join(chance.uniform(0, seconds))
            kills += kill(process)
        yield from [to_the_end(arena, folder, calm)] * kills


def asked_to_stop(arena: Arena, chance: random.Random) -> Iterator[str]:
    """Send signals at random moments: each run must save the step that it is at, and the last must equal the
    undisturbed one."""
    calm, seconds = arena.undisturbed
    while True:
        folder = arena.folder()
        faults: list[str] = []
        while len(faults) < TOGETHER and not arena.finished(folder):
            process = arena.start(arena.config(), folder)
            wait_until(partial(rows_beyond, folder, rows(folder)), process)  # it has begun to train
            time.sleep(chance.uniform(0, seconds / TOGETHER / 2))
            number = chance.choice(SIGNALS)
            if process.is_alive() and process.pid:
                os.kill(process.pid, number)
            code = end(process)
            newest = checkpoint.newest(folder)
            at = checkpoint.step_of(newest) if newest else 0
            expected = 0 if arena.finished(folder) else 128 + number
            faults.append("" if code == expected and at == rows(folder) else f"exit code {code}, saved step {at}")
        last = to_the_end(arena, folder, calm)
        yield from [fault or last for fault in faults]


def met_by_a_rival(arena: Arena, chance: random.Random) -> Iterator[str]:
    """Start a second training in the same folder: it must be refused and not harm the first."""
    calm, _ = arena.undisturbed
    while True:
        folder = arena.folder()
        process = arena.start(arena.config(), folder)
        wait_until(partial(rows_beyond, folder, 0), process)
        code = end(arena.start(arena.config(), folder))
        refused = "another training is at work" in output(folder)
        first = end(process)
        if code != 2 or not refused:
            yield f"the rival ended with {code}"
        else:
            yield f"the first ended with {first}" if first else difference(outcome(folder), outcome(calm))


def out_of_quota(arena: Arena, chance: random.Random) -> Iterator[str]:
    """Let no file grow beyond a random size: the run must stop with a message, and continue once it has room."""
    calm, _ = arena.undisturbed
    newest = checkpoint.newest(calm)
    assert newest
    most = max(path.stat().st_size for path in newest.iterdir())
    while True:
        folder = arena.folder()
        code = end(arena.start(arena.config(), folder, partial(_limit_files, chance.randrange(1, most))))
        fault = "" if code == 2 and "Traceback" not in output(folder) else f"exit code {code} without room"
        yield fault or to_the_end(arena, folder, calm)


def _limit_files(size: int) -> None:
    """Let no file grow beyond this (bytes), as under a quota."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def to_the_end(arena: Arena, folder: Path, calm: Path, config: Config | None = None) -> str:
    """Let a run finish and compare it with the undisturbed one."""
    code = 0 if arena.finished(folder) else end(arena.start(config or arena.config(), folder))
    if code:
        return f"exit code {code}: {output(folder)[-200:]}"
    return difference(outcome(folder), outcome(calm))


def rows(folder: Path) -> int:
    path = folder / FILE
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def rows_beyond(folder: Path, number: int) -> bool:
    return rows(folder) > number
