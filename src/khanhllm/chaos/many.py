"""Faults of several processes that train one model: of one of them, of their launcher, of the network between them.

They do what `khanhllm train --machine.processes N` does. Each has one micro-batch of a step, so that the
run must equal that of one process bit for bit, and one process may finish what several have begun.
"""

import ctypes
import os
import random
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from functools import cache, partial
from itertools import count
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import torch

from khanhllm.chaos.arena import PATIENCE, Arena, difference, end, outcome, output, processes, wait_until
from khanhllm.chaos.trainers import SIGNALS, TOGETHER, rows, rows_beyond, to_the_end
from khanhllm.machine import launch
from khanhllm.model import losses
from khanhllm.schema import Config
from khanhllm.training import checkpoint

SIZES = (2, 2, 3, 4)
WAIT, GRACE = 8.0, 4.0
"""machine.patience, and how long the launcher waits for the others (seconds)"""
SLACK = 20.0
"""seconds beyond both after which a process counts as hung: the machine may be busy"""
START = 1.0
"""a guess at how long processes take to start (seconds)"""
USER, NETWORK = 0x10000000, 0x40000000
"""CLONE_NEWUSER and CLONE_NEWNET of Linux"""
SET_FLAGS, UP = 0x8914, 1
"""SIOCSIFFLAGS and IFF_UP of Linux"""


class Training:
    """Several processes at work, after a moment that chance chooses: while they start, or some steps further."""

    def __init__(
        self, arena: Arena, launcher: ForkServerProcess, folder: Path, chance: random.Random, starting: float
    ) -> None:
        self.arena, self.launcher, self.folder = arena, launcher, folder
        wait_until(self._started, launcher)
        if chance.random() < starting:
            time.sleep(chance.uniform(0, START))
        else:
            wait_until(partial(rows_beyond, folder, rows(folder) + chance.randrange(8)), launcher)
            time.sleep(chance.uniform(0, 0.05))
        self.ranks = self._started()

    def _started(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return sorted(psutil.Process(self.launcher.pid).children(), key=lambda child: child.pid)
        return []

    def fault(self, *codes: int, saved: bool = False) -> str:
        """What is wrong with how they end; empty if nothing. codes: that they may end with if the run is not finished,
        soon; without any the run must finish. saved: whether the last step must be saved."""
        code = end(self.launcher, WAIT + GRACE + SLACK if codes else PATIENCE)
        alive = [rank for rank in psutil.wait_procs(self.ranks, SLACK)[1] if rank.status() != psutil.STATUS_ZOMBIE]
        for rank in alive:
            rank.kill()
        newest = checkpoint.newest(self.folder)
        at = checkpoint.step_of(newest) if newest else 0
        if code is None or alive:
            return f"it hung, with {len(alive)} processes: {output(self.folder)[-300:]}"
        if code not in codes and not (code == 0 and self.arena.finished(self.folder)):
            return f"exit code {code}: {output(self.folder)[-300:]}"
        return f"step {at} of {rows(self.folder)} is saved" if saved and at != rows(self.folder) else ""


Strike = Callable[[Training, random.Random], str]


def _as_launcher(root: str, fault: str = "", numbers: Container[int] = ()) -> None:
    """Let this process be a launcher that does not wait long. Its processes meet `fault` in these micro-batches."""
    launch.GRACE = GRACE
    os.environ["TMPDIR"] = tempfile.tempdir = root  # those that are killed leave files behind
    launch.Process = partial(_forked, partial(_meet, fault, numbers))  # type: ignore[misc,assignment]


def _forked(before: Callable[[], None], command: list[str], env: dict[str, str], **more: Any) -> Any:
    """A process for this command, forked from this one, so that it need not load torch again."""

    def be_it() -> None:
        os.closerange(3, 1024)  # among them the pipe through which Popen hears that the command has begun
        os.environ.clear()
        os.environ.update(env)
        for number in SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        sys.stdin, sys.argv, code = open(0), command[2:], 1  # noqa: SIM115
        before()
        try:
            runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            os._exit(code)

    # Python ignores SIGPIPE and SIGXFSZ, and Popen would undo that for a new program
    return subprocess.Popen(command, env=env, preexec_fn=be_it, restore_signals=False, **more)


def _meet(kind: str, numbers: Container[int]) -> None:
    """Let the training of this process meet "NaN" or "memory" in these micro-batches. They are numbered through all
    steps and processes, of which each has one micro-batch of a step."""
    honest = losses.micro_batch_loss
    own = count(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    def loss_of(*arguments: Any) -> Any:
        loss, nll, routing_L = honest(*arguments)
        if next(own) not in numbers:
            return loss, nll, routing_L
        if kind == "memory":
            raise torch.OutOfMemoryError("a fault of chaos")
        return loss * torch.nan, nll * torch.nan, routing_L

    losses.micro_batch_loss = loss_of  # type: ignore[assignment]


def _config(arena: Arena, size: int, processes: int) -> Config:
    return arena.config(train={"accumulation": size}, machine={"processes": processes, "patience": WAIT})


@cache
def _calm(arena: Arena, size: int) -> Path:
    """The folder of an undisturbed run of one process, with so many micro-batches in a step."""
    return arena.calm(_config(arena, size, 1))


def _chains(
    arena: Arena,
    chance: random.Random,
    strike: Strike,
    starting: float = 0.2,
    before: Callable[[], None] | None = None,
) -> Iterator[str]:
    """Runs with several faults each, one to a start. starting: share of the faults before the first step. before: what
    the launcher does first."""
    before = before or partial(_as_launcher, str(arena.root))
    while True:
        size, folder = chance.choice(SIZES), arena.folder()
        config = _config(arena, size, size)
        faults: list[str] = []
        while len(faults) < TOGETHER and not arena.finished(folder):
            training = Training(arena, arena.start(config, folder, before), folder, chance, starting)
            with suppress(psutil.NoSuchProcess, ProcessLookupError):  # all may have ended by themselves
                faults += [strike(training, chance)] if training.ranks else []
            training.fault()
        last = to_the_end(arena, folder, _calm(arena, size), chance.choice([config, _config(arena, size, 1)]))
        yield from [fault or last for fault in faults]


def killed(arena: Arena, chance: random.Random) -> Iterator[str]:
    """Kill one process: the others must end, with exit code 75."""

    def strike(training: Training, chance: random.Random) -> str:
        chance.choice(training.ranks).kill()
        return training.fault(launch.LOST)

    return _chains(arena, chance, strike)


def halted(arena: Arena, chance: random.Random) -> Iterator[str]:
    """Halt one process: for a while, and the others must wait for it; or for ever, and they must not."""

    def strike(training: Training, chance: random.Random) -> str:
        rank = chance.choice(training.ranks)
        rank.suspend()
        if chance.random() < 0.5:
            return training.fault(launch.LOST)
        time.sleep(chance.uniform(0, WAIT / 2))
        rank.resume()
        return training.fault()

    return _chains(arena, chance, strike)


def signalled(arena: Arena, chance: random.Random) -> Iterator[str]:
    """Send a signal to one process, to the launcher, or to all, as systemd does: all must stop after the same step,
    saved."""

    def strike(training: Training, chance: random.Random) -> str:
        number, everybody = chance.choice(SIGNALS), [training.launcher, *training.ranks]
        for process in chance.choice([everybody, *([one] for one in everybody)]):
            os.kill(process.pid, number)
        return training.fault(128 + number, saved=True)

    return _chains(arena, chance, strike, starting=0)


def orphaned(arena: Arena, chance: random.Random) -> Iterator[str]:
    """Kill the launcher: its processes must save and end."""

    def strike(training: Training, chance: random.Random) -> str:
        training.launcher.kill()
        return training.fault(-signal.SIGKILL, saved=True)

    return _chains(arena, chance, strike)


def out_of_room(arena: Arena, chance: random.Random) -> Iterator[str]:
    """Let no file of the first process, which saves, grow beyond a random size: all must stop with a message. Needs
    Linux."""
    if not hasattr(psutil, "RLIMIT_FSIZE"):
        return
    whole = checkpoint.newest(_calm(arena, SIZES[0]))
    assert whole
    most = max(path.stat().st_size for path in whole.iterdir())

    def strike(training: Training, chance: random.Random) -> str:
        training.ranks[0].rlimit(psutil.RLIMIT_FSIZE, (chance.randrange(1, most),) * 2)
        fault = training.fault(2)
        return fault or ("Traceback" in output(training.folder) and output(training.folder)[-300:]) or ""

    yield from _chains(arena, chance, strike, starting=0)


def cut_off(arena: Arena, chance: random.Random) -> Iterator[str]:
    """Take down the network between the processes: all must end, with exit code 75. Needs Linux, and that a user may
    have a network of his own."""
    trial = processes.Process(target=_in_own_network, args=("", arena.root / "cut"))
    trial.start()
    if end(trial):
        return

    def strike(training: Training, chance: random.Random) -> str:
        (arena.root / "cut").touch()
        return training.fault(launch.LOST)

    before = partial(_in_own_network, str(arena.root), arena.root / "cut")
    yield from _chains(arena, chance, strike, before=before)


def _in_own_network(root: str, cut: Path) -> None:
    """Let this process be a launcher in a network of its own, which is taken down when the file `cut` appears."""
    import fcntl

    _as_launcher(root)
    cut.unlink(missing_ok=True)
    if not hasattr(ctypes.CDLL(None), "unshare") or ctypes.CDLL(None).unshare(USER | NETWORK):
        raise SystemExit(1)

    def set_loopback(flags: int) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            fcntl.ioctl(asking, SET_FLAGS, struct.pack("16sh22x", b"lo", flags))

    def watch() -> None:
        while not cut.exists():
            time.sleep(0.01)
        set_loopback(0)
        cut.unlink()

    set_loopback(UP)
    Thread(target=watch, daemon=True).start()


def not_finite(arena: Arena, chance: random.Random) -> Iterator[str]:
    """Let micro-batches of some processes be NaN: what is left must be that of one process that met the same."""
    while True:
        size, one, many = chance.choice(SIZES), arena.folder(), arena.folder()
        numbers = sorted(chance.sample(range(size * arena.config().train.steps), TOGETHER))
        faults = [
            _met(arena, _config(arena, size, 1), one, partial(_meet, "NaN", numbers)),
            _met(arena, _config(arena, size, size), many, partial(_as_launcher, str(arena.root), "NaN", numbers)),
        ]
        fault = "".join(faults) or difference(outcome(many), outcome(one))
        rejected = any(int(row["rejected"]) for row in outcome(many)[1])
        yield from [fault or ("" if rejected else "no step was rejected")] * TOGETHER


def out_of_memory(arena: Arena, chance: random.Random) -> Iterator[str]:
    """Let memory run out on one process: all must take smaller micro-batches, whichever process it was."""
    while True:
        size, runs = chance.choice(SIZES), [arena.folder(), arena.folder()]
        step, faults = chance.randrange(arena.config().train.steps), []
        for rank, folder in zip(chance.sample(range(size), 2), runs, strict=True):
            before = partial(_as_launcher, str(arena.root), "memory", [step * size + rank])
            faults.append(_met(arena, _config(arena, size, size), folder, before))
            faults.append("" if "out of memory" in output(folder) else "no process ran out of memory")
        one, other, calm = map(outcome, (*runs, _calm(arena, size)))
        read = [[(row["step"], row["tokens"]) for row in log] for _, log in (one, calm)]
        yield "".join(faults) or difference(one, other) or ("" if read[0] == read[1] else "other rows were read")


def _met(arena: Arena, config: Config, folder: Path, before: Callable[[], None]) -> str:
    """What is wrong with a run that goes on to its end with faults."""
    code = end(arena.start(config, folder, before))
    return f"exit code {code}: {output(folder)[-300:]}" if code else ""
