"""Start the processes of one machine that train together, pass signals on to them, and end as they do.

torchrun does this between machines. On one machine this keeps what a run says and the code that it ends with, opens no
port but on the loopback device, and gives a run all the time that it takes to save.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from types import FrameType

from khanhllm.errors import UserError, in_a_line
from khanhllm.machine.group import STORE, environment
from khanhllm.machine.signals import SIGNALS, handled, heard
from khanhllm.schema import Config, MachineConfig
from khanhllm.settings import to_toml

GRACE = 30.0
"""how long the others may take to end once one has failed, or the first has ended (seconds)"""
AT_ONCE = 2.0
"""the same after a second signal"""
Process = subprocess.Popen
LOST = 75
"""exit code where a process was lost: --resume goes on"""
WATCHED = "KHANHLLM_LAUNCHED"
"""set where standard input ends with the launcher"""
WORDS = "KHANHLLM_LAST_WORDS"
"""names the file in which a launched process leaves what it fails with, for the launcher to say"""


class Failed(UserError):
    """The processes have failed. Of one that was launched the text is empty, as the launcher says it."""


def wanted(config: MachineConfig) -> bool:
    """Whether this process is to start others, instead of being one of them."""
    return config.processes > 1 and environment("WORLD_SIZE", 1, default=1) == 1


def train(config: Config, folder: Path, resume: bool) -> str:
    """Train with `machine.processes` processes, each a `khanhllm train`. Returns the name of the signal that stopped
    them; empty if the run is finished. Raises UserError."""
    with TemporaryDirectory(prefix="khanhllm-") as place:
        toml = Path(place) / "config.toml"
        toml.write_text(to_toml(config), encoding="utf-8")
        command = [sys.executable, "-m", "khanhllm", "train", "--config", str(toml), "--run", str(folder)]
        again = ["--resume"] if resume and (folder / "config.toml").exists() else []
        return Hands([*command, *again], config.machine.processes, Path(place)).run()


@dataclass
class Hands:
    """The processes, by rank."""

    command: list[str]
    size: int
    place: Path
    """for their store, their last words, and what all but the first say"""
    children: "list[subprocess.Popen[bytes]]" = field(default_factory=list)
    asked: dict[int, float] = field(default_factory=dict)
    """when each signal came that was passed on (seconds)"""
    again: bool = False
    """whether one came a second time"""

    def run(self) -> str:
        with handled(self._pass_on):
            try:
                for rank in range(self.size):
                    self.children.append(self._start(rank))
                killed = self._wait()
            finally:
                for child in self.children:
                    child.kill()
                    child.wait()
        return self._outcome(killed)

    def _start(self, rank: int) -> "subprocess.Popen[bytes]":
        loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
        alone = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), loopback) if loopback else {}
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.size, "LOCAL_WORLD_SIZE": self.size}
        known = {**alone, **ranks, STORE: self.place / "store", WATCHED: 1, WORDS: self._words(rank)}
        said = None if rank == 0 else self._said(rank).open("wb")
        try:
            # a session of its own: Ctrl-C reaches only the launcher, which passes it on
            return Process(
                self.command,
                env=os.environ | {name: str(value) for name, value in known.items()},
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        finally:
            if said:
                said.close()

    def _said(self, rank: int) -> Path:
        return self.place / f"said-{rank}.txt"

    def _words(self, rank: int) -> Path:
        return self.place / f"words-{rank}.txt"

    def _wait(self) -> set[int]:
        """Wait until all have ended. The ranks that must be killed, as they do not end after another has failed or the
        first has saved, or after a second signal: one that waits for another process hears no signal."""
        deadline: float | None = None
        while None in (codes := [child.poll() for child in self.children]):
            ended = {rank: code for rank, code in enumerate(codes) if code is not None}
            if deadline is None and any(rank == 0 or not self._in_order(code) for rank, code in ended.items()):
                deadline = time.monotonic() + GRACE
            if self.again:
                deadline = min(deadline or math.inf, time.monotonic() + AT_ONCE)
            if deadline is not None and time.monotonic() > deadline:
                return {rank for rank, code in enumerate(codes) if code is None}
            time.sleep(0.05)
        return set()

    def _in_order(self, code: int) -> bool:
        """Whether a process ended because its run is finished or a signal asked for it."""
        return code == 0 or code in (128 + getattr(signal, name, 0) for name in SIGNALS)

    def _outcome(self, killed: set[int]) -> str:
        """What the first process ended with if that was in order, as it has saved then; else what the first that failed
        by itself ended with, for all."""
        codes = {rank: child.returncode for rank, child in enumerate(self.children) if rank not in killed}
        if 0 in codes and self._in_order(codes[0]):
            return signal.Signals(codes[0] - 128).name if codes[0] else ""
        failed = {rank: code for rank, code in codes.items() if not self._in_order(code)}
        asked = next(iter(self.asked), 0)
        if asked and (killed or any(code == -asked for code in failed.values())):  # nothing was saved
            return signal.Signals(asked).name
        for rank, code in failed.items():
            if code < 0:
                raise self._lost(f"process {rank} of {self.size} was ended by {signal.Signals(-code).name}")
        for rank, code in failed.items():
            if code != LOST:
                raise self._failed(rank, code)
        if killed:
            raise self._lost(f"process {min(killed)} of {self.size} did not answer")
        raise self._failed(min(failed), LOST)

    def _lost(self, what: str) -> Failed:
        return Failed(f"{what}; --resume goes on from the last checkpoint", LOST)

    def _failed(self, rank: int, code: int) -> Failed:
        """What a process left for us to say, or at least the last line of what it said."""
        said = next((path for path in (self._words(rank), self._said(rank)) if path.exists()), None)
        line = said.read_text("utf-8", "replace").strip().rpartition("\n")[2].removeprefix("khanhllm: ") if said else ""
        return Failed(line or f"process {rank} of {self.size} ended with exit code {code}", code)

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        """A signal that asks a training to stop goes to all processes."""
        nth = heard(self.asked, number)
        self.again = self.again or nth == 2
        for child in self.children if nth else ():
            with suppress(ProcessLookupError, ValueError):  # it has ended; the console of Windows told it already
                child.send_signal(number)


def place() -> Path | None:
    """The launcher's folder, if this process was launched. What is in it goes with the launcher, also what a process
    that was killed could not remove."""
    return Path(os.environ[STORE]).parent if STORE in os.environ else None


@contextmanager
def last_words() -> Iterator[None]:
    """Where this process was launched, leave to the launcher what it fails with: so a user reads one line, whichever
    process failed, and a program that called `khanhllm.train` has it too."""
    place = os.environ.pop(WORDS, "")
    try:
        yield
    except Exception as error:
        if not place:
            raise
        text, code = in_a_line(error)
        with suppress(OSError):
            Path(place).write_text(text, encoding="utf-8")
        raise Failed("", code) from None


def end_with_launcher() -> None:
    """Where this process was launched, let it stop, as by SIGTERM, when the launcher has gone."""
    if os.environ.pop(WATCHED, ""):
        stdin = sys.stdin

        def watch() -> None:
            os.read(stdin.fileno(), 1)
            if os.name == "nt":
                signal.raise_signal(signal.SIGTERM)  # os.kill would end the process at once
            else:
                os.kill(os.getpid(), signal.SIGTERM)

        Thread(target=watch, daemon=True, name="launcher").start()
