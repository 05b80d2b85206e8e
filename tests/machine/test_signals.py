"""Signals ask a training to stop, are answered at once, and leave alone what others have arranged."""

import os
import signal
import subprocess
import sys

import pytest

from khanhllm.machine.signals import Stop, exit_code, stop_signals

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has SIGINT alone")


@pytest.fixture(params=["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def number(request):
    """A signal, whose handler is what it was after the test."""
    number = getattr(signal, request.param)
    before = signal.getsignal(number)
    yield number
    signal.signal(number, before)


def test_one_that_was_ignored_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    with stop_signals() as stop:
        os.kill(os.getpid(), number)
        assert not stop.asked
    assert signal.getsignal(number) is signal.SIG_IGN


def test_it_is_answered_at_once(number, capfd):
    default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    signal.signal(number, default)
    with stop_signals() as stop:
        os.kill(os.getpid(), number)
        assert stop.asked == number.name
        os.kill(os.getpid(), number)  # the same one, from a launcher that got it too
    said = f"{number.name}: stopping after this step; again to end at once, without saving\n"
    assert capfd.readouterr().err == said
    assert signal.getsignal(number) is default


def test_the_second_ends_the_process(number):
    code = f"""
import signal
from khanhllm.machine import signals
signals.ECHO = 0.0
with signals.stop_signals():
    signal.raise_signal({int(number)})
    signal.raise_signal({int(number)})
"""
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    assert done.returncode == -number


def test_the_first_one_is_named():
    stop = Stop()
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        for number in before:
            stop(number, None)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert stop.asked == "SIGUSR1"


def test_over_a_panel_the_answer_leaves_the_cursor_in_its_line(capfd):
    before = signal.getsignal(signal.SIGUSR1)
    stop = Stop()
    stop.over_panel = True
    stop(signal.SIGUSR1, None)
    signal.signal(signal.SIGUSR1, before)
    out, err = capfd.readouterr()
    assert out.startswith("\rSIGUSR1: stopping") and "\n" not in out and not err


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full"])
def test_nobody_who_listens_is_no_fault(closed):
    code = "import os, signal\nfrom khanhllm.machine.signals import stop_signals\n"
    code += "with stop_signals() as stop:\n os.kill(os.getpid(), signal.SIGTERM); assert stop.asked\nprint('on')"
    done = subprocess.run(f'{sys.executable} -c "{code}" {closed}', shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "on\n")


def test_exit_codes_are_those_of_shells():
    assert [exit_code(name) for name in ("", "SIGINT", "SIGTERM", "SIGHUP")] == [0, 130, 143, 129]
