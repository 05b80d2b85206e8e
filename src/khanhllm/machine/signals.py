"""Signals that ask a training to stop: it finishes the step, saves, and ends."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""clusters send the last two ahead of a time limit"""


class Stop:
    """The handler of signals; the loop checks `asked` after each step. A second signal ends the process as usual."""

    asked = ""
    """name of the signal that came; empty if none"""

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        self.asked = signal.Signals(number).name


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Within this context, signals ask the training to stop. Outside the main thread, which alone gets signals, this
    changes nothing."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    # whoever started us with a signal ignored, as nohup does, wants it ignored; None is another library's handler
    wanted = [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, stop) for number in wanted}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
