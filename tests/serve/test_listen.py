"""A server on a real socket: clients that vanish, stall or never ask, signals, and an engine that dies."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from conftest import exit_code, house
from khanhllm.errors import UserError
from khanhllm.serve import listen

pytestmark = pytest.mark.slow
KIND = {"content-type": "application/json"}


def until(condition):
    """Wait for what must come; only a failing test waits long."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def refuses(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return True
    return False


class Steps:
    """Lets an engine write only so many tokens as are released."""

    def __init__(self, engine):
        self.gate, self.real = threading.Semaphore(0), engine._write
        engine._write = self

    def __call__(self, rows):
        self.gate.acquire(timeout=60)
        self.real(rows)


class Served:
    """A server that runs in this thread while `visit` runs in another."""

    def __init__(self, run, monkeypatch, **settings):
        self.house = house(run, **settings)
        self.engine, self.real = self.house.server.engine, listen.listen
        monkeypatch.setattr(listen, "listen", self._listen)
        self.found, self.bound = [], threading.Event()

    def _listen(self, host, port):
        bound = self.real(host, port)
        self.port = bound.getsockname()[1]
        self.bound.set()
        return bound

    def visited(self, visit, host="127.0.0.1", key="", end=True):
        """What `visit` returned; then a signal ends the server."""

        def visiting():
            assert self.bound.wait(60)
            until(lambda: not refuses(self.port))
            try:
                self.found.append(visit(self))
            finally:
                if end:
                    os.kill(os.getpid(), signal.SIGINT)

        visitor = threading.Thread(target=visiting, daemon=True)
        visitor.start()
        try:
            listen.serve(lambda: self.house, host, 0, key, [], [])
        finally:
            visitor.join(60)
        return self.found[0]

    @contextmanager
    def asked(self, **body):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        # without a seed the model ends its text now and then before a test has looked
        asked = {"prompt": "def main(", "seed": 1, **body}
        connection.request("POST", "/v1/completions", json.dumps(asked), KIND)
        try:
            yield connection
        finally:
            connection.close()

    def answer(self, **body):
        with self.asked(max_tokens=3, **body) as connection:
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())


@pytest.fixture
def serving(served, monkeypatch):
    return lambda **settings: Served(served, monkeypatch, **settings)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_row_and_what_was_read_stays(serving, stream):
    site = serving(rows=2)
    steps = Steps(site.engine)

    def visit(site):
        with site.asked(max_tokens=20, stream=stream) as connection:
            steps.gate.release(2)
            until(lambda: site.engine.counts["written"] >= 3)
            if stream:
                assert connection.getresponse().readline().startswith(b"data: ")
            (row,) = [row for row in site.engine.rows if row.job]
            job = row.job
        connection.sock = None
        until(lambda: job.cancelled)
        steps.gate.release(1)  # the step that was under way
        until(lambda: not site.engine.busy)
        steps.gate.release(100)
        status, _ = site.answer()
        return status, site.engine.counts

    status, counts = site.visited(visit)
    assert status == 200
    assert counts["written"] <= 5 + 3 and counts["reused"] > 0


def test_a_hundred_who_never_ask_keep_nobody_out(serving, monkeypatch):
    monkeypatch.setattr(listen, "SILENT", 32)

    def visit(site):
        silent = [socket.create_connection(("127.0.0.1", site.port)) for _ in range(100)]
        for one in silent:
            one.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx-slow: ")
        until(lambda: len(listen.Protocol.silent) <= listen.SILENT)
        found = site.answer()
        for one in silent:
            one.close()
        return found

    status, _ = serving().visited(visit)
    assert status == 200


HALF = {
    "a further one": ("GET /health HTTP/1.1\r\n", b"G"),
    "one refused": ("POST /tokenize HTTP/1.1\r\ncontent-type: text/plain\r\ncontent-length: 9\r\n", b"body"),
}


@pytest.mark.parametrize("half", HALF)
def test_after_an_answer_a_request_must_come_in_time_too(serving, half):
    head, rest = HALF[half]

    def visit(site):
        with socket.create_connection(("127.0.0.1", site.port), timeout=60) as one:

            def silent():
                return [other for other in list(listen.Protocol.silent) if other.client == one.getsockname()]

            one.sendall(f"{head}host: localhost\r\n\r\n".encode())
            answer = one.recv(10_000)
            while b"}" not in answer:
                answer += one.recv(10_000)
            assert not silent()
            one.sendall(rest)
            until(silent)
            (waiting,) = silent()
            assert not waiting.late.cancelled()
            waiting.loop.call_soon_threadsafe(waiting._late)  # as if its time were over
            return one.recv(1)

    assert serving().visited(visit) == b""


def test_what_is_no_http_harms_nobody(serving):
    def visit(site):
        for noise in (b"\x16\x03\x01\x00", b"GET / HTTP/9\r\n\r\n", b"\r\n" * 50_000, b"A" * 200_000, b""):
            with socket.create_connection(("127.0.0.1", site.port)) as one:
                one.sendall(noise)
        return site.answer()

    assert serving().visited(visit)[0] == 200


def test_eight_rows_serve_a_hundred_clients_or_tell_them_to_wait(serving):
    def visit(site):
        found = []
        clients = [threading.Thread(target=lambda: found.append(site.answer())) for _ in range(100)]
        for one in clients:
            one.start()
        for one in clients:
            one.join(120)
        return found

    found = serving(rows=8, waiting=8).visited(visit)
    assert len(found) == 100 and {status for status, _ in found} <= {200, 429}
    assert all(answer["choices"] for status, answer in found if status == 200)


def test_a_signal_lets_a_stream_finish(serving):
    site = serving()
    steps = Steps(site.engine)

    def visit(site):
        with site.asked(max_tokens=8, stream=True) as connection:
            answer = connection.getresponse()
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: refuses(site.port))
            steps.gate.release(100)
            return answer.read()

    assert site.visited(visit, end=False).endswith(b"data: [DONE]\n\n")


def test_an_engine_that_dies_ends_the_server_with_an_error(serving):
    site = serving()
    site.engine._write = lambda _rows: 1 / 0
    with pytest.raises(RuntimeError, match="the engine has ended by an error: ZeroDivisionError"):
        site.visited(lambda site: site.answer(), end=False)
    assert site.found[0][0] == 500


def test_off_loopback_a_key_is_made_and_demanded(serving, capsys):
    def visit(site):
        status, _ = site.answer()
        key = capsys.readouterr().out.split()[-1]
        connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=60)
        connection.request("GET", "/v1/models", headers={"authorization": f"Bearer {key}"})
        return status, connection.getresponse().status

    assert serving().visited(visit, host="0.0.0.0") == (401, 200)


def test_a_port_that_is_taken_and_a_host_that_is_none():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="try another --port"):
            listen.serve(lambda: pytest.fail("loaded a model"), "127.0.0.1", taken.getsockname()[1], "", [], [])
    for host in ("no such host.invalid", "192.0.2.1", "a" * 70):  # no name, nobody's address, too long for a name
        with pytest.raises(UserError, match=r"cannot serve on .*; try another --host$"):
            listen.listen(host, 0)


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("KHANHLLM_KEY", " from-the-environment\n")
    assert listen.read_key(None) == "from-the-environment"
    for wrong in ("short", " ", "\udcff" * 20, "ü" * 20, "two lines of\ntext, in a variable"):
        monkeypatch.setenv("KHANHLLM_KEY", wrong)
        with pytest.raises(UserError, match="the key in KHANHLLM_KEY must"):
            listen.read_key(None)
    monkeypatch.setenv("KHANHLLM_KEY", "")
    assert listen.read_key(None) == ""
    file = tmp_path / "key"
    file.write_text("from-a-file-of-mine\n")
    assert listen.read_key(file) == "from-a-file-of-mine"
    for wrong in ("short", "", "ü" * 20, "two lines of\ntext, in a file"):
        file.write_text(wrong, "utf-8")
        with pytest.raises(UserError, match="the key in"):
            listen.read_key(file)
    with pytest.raises(UserError, match="cannot read the key"):
        listen.read_key(tmp_path / "none")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "nowhere is not a run folder"),
        (["--port", "70000"], "--port must be"),
        (["--rows", "0"], "--rows must be"),
        (["--cors", "*"], "--cors needs"),
        (["--cors", "https://a.example/path"], "--cors needs"),
        (["--cors", "https://"], "--cors needs"),
        (["--allow-host", "my.host:8126"], "--allow-host needs"),
        (["--allow-host", "http://foo"], "--allow-host needs"),
        (["--allow-host", "foo/"], "--allow-host needs"),
        (["--allow-host", "*"], "--allow-host needs"),
        (["--allow-host", "fd00::1"], "--allow-host needs"),
        (["--allow-host", "My-box.example", "--allow-host", "[fd00::1]"], "nowhere is not a run folder"),
        (["--waiting", "-1"], "--waiting"),
    ],
)
def test_a_wrong_command_line_is_one_line(words, says, capsys):
    code = exit_code(["serve", "nowhere", *words])
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("khanhllm") and said.count("\n") == 1 and says in said


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads of OpenMP as Linux has them")
def test_only_the_engine_s_thread_has_helpers(served):
    """Two threads with helpers of OpenMP's are more threads than cores, and every operation then waits."""
    code = f"""
import psutil, torch
from khanhllm import cli
from khanhllm.serve import house, listen, server
torch.zeros(1)
before = psutil.Process().num_threads()
listen.serve = lambda enter, *_: print(enter() and psutil.Process().num_threads() - before, torch.get_num_threads())
cli.main(["serve", {str(served.checkpoint.parents[1])!r}, "--machine.device", "cpu"])
torch.ones(2000, 2000).exp()
print(psutil.Process().num_threads() - before)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["0", "2", "1"], done.stderr
