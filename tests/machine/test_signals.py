"""Signals ask a training to stop, are answered at once, and leave alone what others have arranged."""

import os
import signal

import pytest

from khanhllm.machine.signals import stop_signals

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
