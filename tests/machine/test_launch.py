"""The launcher ends as its processes do: with the code of the first that failed by itself, and one line."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from threading import Thread

import pytest

from khanhllm.machine import launch, signals
from khanhllm.machine.launch import Failed, Hands

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has other signals")


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 0.5)

    def running(program: str, size: int = 2) -> str:
        start = "import os, signal, sys, time; rank = int(os.environ['RANK'])\n"
        return Hands([sys.executable, "-c", start + program], size, tmp_path).run()

    return running


def test_all_finish(run):
    assert run("sys.exit(0)", size=3) == ""


def test_the_first_that_failed_by_itself_counts(run):
    """The others only lost it."""
    with pytest.raises(Failed, match=r"^the cause$") as failed:
        run("print('warning\\nkhanhllm: the cause', file=sys.stderr) if rank else None; sys.exit(2 if rank else 75)")
    assert failed.value.exit_code == 2


def test_the_last_words_of_a_process_are_said_by_the_launcher_alone(run, tmp_path, capfd, monkeypatch):
    """Also those of the first, whose standard error is the user's."""
    leave = "open(os.environ['KHANHLLM_LAST_WORDS'], 'w').write('the cause'); sys.exit(2)"
    with pytest.raises(Failed, match=r"^the cause$") as failed:
        run(f"if rank: sys.exit(75)\n{leave}")
    assert failed.value.exit_code == 2 and capfd.readouterr() == ("", "")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # a report goes there
    for error, text, code in (
        (launch.Failed("said", 75), "said", 75),
        (ModuleNotFoundError(name="tiktoken"), "ModuleNotFoundError", 1),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied", 2),
    ):
        monkeypatch.setenv(launch.WORDS, str(tmp_path / "words"))
        with pytest.raises(Failed, match=r"^$") as failed, launch.last_words():
            raise error
        assert failed.value.exit_code == code and (tmp_path / "words").read_text().startswith(text)
        with pytest.raises(type(error)), launch.last_words():  # not launched
            raise error


def test_one_that_left_no_words_is_named(run):
    with pytest.raises(Failed, match=r"^process 0 of 2 ended with exit code 3$") as failed:
        run("sys.exit(75 if rank else 3)")
    assert failed.value.exit_code == 3


def test_one_that_was_killed_is_named(run):
    with pytest.raises(Failed, match="process 1 of 2 was ended by SIGKILL; --resume") as failed:
        run("os.kill(os.getpid(), 9) if rank else sys.exit(75)")
    assert failed.value.exit_code == 75


def test_one_that_hangs_is_ended(run):
    with pytest.raises(Failed, match="process 1 of 2 did not answer; --resume") as failed:
        run("time.sleep(60 if rank else 0); sys.exit(75)")
    assert failed.value.exit_code == 75


def test_one_that_saves_is_given_its_time(run):
    assert run("time.sleep(0 if rank else 1.2)") == ""
    assert run("time.sleep(0 if rank else 1.2); sys.exit(143)") == "SIGTERM"


LATE = "time.sleep(9); open(os.environ['KHANHLLM_STORE'] + '-late', 'w')"


@pytest.mark.parametrize("others", [LATE, "os.kill(os.getpid(), 9)", "sys.exit(75)"])
def test_what_others_do_once_the_first_has_saved_does_not_count(run, tmp_path, others):
    assert run(f"if rank: {others}") == ""
    assert run(f"if rank: {others}\nsys.exit(143)") == "SIGTERM"
    assert not (tmp_path / "store-late").exists()


@contextmanager
def sent(place, *names, heard=None):
    """Send these signals to this process once two others are ready. heard: grows as signals are handled; each is sent
    after the one before it, as of two that wait only one may arrive."""

    def send():
        while len(list(place.glob("ready-*"))) < 2:
            time.sleep(0.01)
        for nth, name in enumerate(names):
            while heard is not None and len(heard) < nth:
                time.sleep(0.01)
            os.kill(os.getpid(), getattr(signal, name))

    before = [signal.getsignal(getattr(signal, name)) for name in names]
    thread = Thread(target=send)
    thread.start()
    yield
    thread.join()
    assert [signal.getsignal(getattr(signal, name)) for name in names] == before


READY = "open(os.environ['KHANHLLM_STORE'].replace('store', f'ready-{rank}'), 'w'); time.sleep(60)"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_signals_are_passed_on(run, tmp_path, name):
    with sent(tmp_path, name):
        assert run(f"signal.signal(signal.{name}, lambda *_: sys.exit(128 + signal.{name}))\n{READY}") == name


def test_the_same_signal_again_ends_those_that_hear_none(run, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "AT_ONCE", 0.1)
    monkeypatch.setattr(signals, "ECHO", -1)
    heard, pass_on = [], Hands._pass_on
    monkeypatch.setattr(Hands, "_pass_on", lambda *given: (pass_on(*given), heard.append(given)))
    with sent(tmp_path, "SIGINT", "SIGINT", heard=heard):
        deaf = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
        assert run(f"{deaf}\n{READY.replace('60', '20')}") == "SIGINT"


def test_other_signals_and_an_echo_leave_the_time_to_save(run, tmp_path, monkeypatch):
    """As where a machine is shut down: systemd sends TERM and HUP."""
    monkeypatch.setattr(launch, "AT_ONCE", 0)
    saving = f"time.sleep(1), open({str(tmp_path)!r} + f'/saved-{{rank}}', 'w'), sys.exit(128 + signal.SIGTERM)"
    hears = f"signal.signal(signal.SIGTERM, lambda *_: ({saving}))\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)"
    with sent(tmp_path, "SIGTERM", "SIGHUP", "SIGTERM"):
        assert run(f"{hears}\n{READY}") == "SIGTERM"
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_a_signal_that_is_ignored_is_not_passed_on(run):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    program = "signal.signal(signal.SIGHUP, signal.SIG_DFL)\nos.kill(os.getppid(), signal.SIGHUP); time.sleep(0.5)"
    try:
        assert run(program) == ""
    finally:
        signal.signal(signal.SIGHUP, before)


def test_each_has_a_session_and_an_input_of_its_own(run):
    """Ctrl-C reaches the launcher alone, and the input ends with it."""
    assert run("import stat\nassert os.getsid(0) == os.getpid() and stat.S_ISFIFO(os.fstat(0).st_mode)") == ""


def test_processes_stop_when_the_launcher_is_gone():
    program = "from khanhllm.machine.launch import end_with_launcher\nend_with_launcher()\nimport time\ntime.sleep(60)"
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, env=os.environ | {launch.WATCHED: "1"}
    )
    child.stdin.close()
    assert child.wait(60) == -signal.SIGTERM


def test_nothing_listens_beyond_this_machine(run, tmp_path):
    names = "os.environ['GLOO_SOCKET_IFNAME'] + os.environ['NCCL_SOCKET_IFNAME']"
    assert run(f"open({str(tmp_path / 'found')!r}, 'w').write({names})") == ""
    assert (tmp_path / "found").read_text() in ("lolo", "lo0lo0")
