"""Signals that ask a training to stop: it finishes the step, saves, and ends."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from khanhllm.machine.group import Group

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""clusters send the last two ahead of a time limit"""
ECHO = 1.0
"""seconds within which the same signal is not a second one: systemd and Slurm send theirs to all processes of a job,
and a launcher among them passes it on"""


def heard(came: dict[int, float], number: int) -> int:
    """Which time a signal came: 1 for the first, 2 for any after that, 0 for an echo. came: when each came first, which
    is noted here (seconds)."""
    now = time.monotonic()
    if number in came:
        return 2 if now > came[number] + ECHO else 0
    came[number] = now
    return 1


class Stop:
    """The handler of signals; the loop checks `asked` after each step. A second signal of the same kind ends the
    process as usual."""

    asked = ""
    """name of the signal that came; empty if none"""
    over_panel = False
    """whether stdout shows a live panel; the answer then covers its bottom line, so that the next drawing fits"""

    def __init__(self) -> None:
        self.came: dict[int, float] = {}
        """when each signal came first (seconds)"""

    def agreed(self, group: Group) -> bool:
        """Whether a signal asks this process, or another of its group, to stop. All processes call it at once."""
        numbers = group.exchange(signal.Signals[self.asked] if self.asked else 0)
        came = next((int(number) for (number,) in numbers if number), 0)
        if came:
            self.asked = signal.Signals(came).name
        return bool(came)

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        nth = heard(self.came, number)
        if nth == 2:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(number)
        if nth != 1:
            return
        name = signal.Signals(number).name
        self.asked = self.asked or name
        text = f"{name}: stopping after this step; again to end at once, without saving"
        stream = sys.stdout if self.over_panel else sys.stderr
        # past the stream's buffer, whose lock the interrupted code may hold; closed or absent streams hear nothing
        with suppress(OSError, ValueError, AttributeError):
            os.write(stream.fileno(), (f"\r{text}" if self.over_panel else f"{text}\n").encode())


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Within this context, signals ask the training to stop."""
    stop = Stop()
    with handled(stop):
        yield stop


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within this context, the signals that ask a training to stop call the handler. Outside the main thread, which
    alone gets signals, this changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    # whoever started us with a signal ignored, as nohup does, wants it ignored; None is another library's handler
    wanted = [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, handler) for number in wanted}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def exit_code(name: str) -> int:
    """What a process that a signal has stopped ends with, as shells have it: 130 for SIGINT. 0 for no name."""
    return 128 + signal.Signals[name] if name else 0
