"""Laws of downloads: whatever the network does, the file arrives whole and right, or one line says why not."""

import gzip
import itertools
import random
from types import SimpleNamespace

import pytest

from khanhllm.chaos.server import KINDS, FaultyServer
from khanhllm.data import fetch as module
from khanhllm.data.fetch import fetch
from khanhllm.data.readers import _check_packed
from khanhllm.errors import UserError

DATA = random.Random(0).randbytes(300_000)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(module, "LONGEST_WAIT", 0.01)
    monkeypatch.setattr(module, "STALL", 0.2)
    monkeypatch.setattr(module, "BLOCK", 4096)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.bin.gz").write_bytes(gzip.compress(DATA, 1))
    with FaultyServer(tmp_path / "there", stall=0.5) as server:
        yield server


def bring(server, path, **more):
    return gzip.decompress(fetch(f"{server.url}/a.bin.gz", path, check=_check_packed, patience=5, **more).read_bytes())


@pytest.mark.parametrize("kind", KINDS)
def test_after_each_kind_of_fault_the_file_is_whole_and_nothing_else_is_left(server, tmp_path, kind):
    server.faults = [kind, kind]
    assert bring(server, tmp_path / "got.gz") == DATA
    assert len(server.log) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["got.gz", "there"]


def test_a_download_goes_on_where_it_broke_and_a_file_that_is_there_is_not_asked_for(server, tmp_path):
    server.faults = ["reset", "short"]
    assert bring(server, tmp_path / "got.gz") == DATA
    asked = [int(said[6:-1]) for _, said, _ in server.log[1:]]
    assert asked[0] > 100_000 and asked[1] > asked[0]
    bring(server, tmp_path / "got.gz")
    assert len(server.log) == 3


def test_without_a_sign_of_its_version_a_file_is_begun_again(server, tmp_path):
    server.etags, server.faults = False, ["reset"]
    assert bring(server, tmp_path / "got.gz") == DATA
    assert [said for _, said, _ in server.log] == ["", ""]


def test_a_file_that_changed_in_between_is_begun_again(server, tmp_path):
    part = tmp_path / "got.gz.part"
    part.write_bytes(b"of another version")
    part.with_name("got.gz.part.json").write_text('"\\"old\\""', encoding="utf-8")
    assert bring(server, tmp_path / "got.gz") == DATA
    assert server.log[0][1] == "bytes=18-"


def test_many_faults_in_random_order(server, tmp_path):
    choice = random.Random(1)
    for number in range(20):
        server.faults = [choice.choice([kind for kind in KINDS if kind != "stall"]) for _ in range(10)]
        server.faults = [kind if number % 2 or kind not in ("404", "wrong") else "reset" for kind in server.faults]
        while True:
            try:
                assert bring(server, tmp_path / f"{number}.gz") == DATA
                break
            except UserError as error:  # three times no, or five times wrong
                assert "times in a row" in str(error)
    assert not list(tmp_path.glob("*.part*"))


def test_the_published_hash_is_held_against_the_bytes(server, tmp_path):
    with pytest.raises(UserError, match=r"sha256 is not the published one\), 5 times in a row"):
        fetch(f"{server.url}/a.bin.gz", tmp_path / "got.gz", sha256="0" * 64)
    assert not list(tmp_path.glob("got*"))


def test_wrong_bytes_that_arrive_slowly_are_no_lack_of_network(server, tmp_path, monkeypatch):
    hours = itertools.count(step=3600)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(hours), sleep=lambda _: None))
    with pytest.raises(UserError, match=r"sha256 is not the published one\), 5 times in a row"):
        fetch(f"{server.url}/a.bin.gz", tmp_path / "got.gz", sha256="0" * 64, patience=10_000)


def test_what_cannot_be_had_is_one_line(server, tmp_path):
    with pytest.raises(UserError, match=r"/none: answer 404 Not Found, 3 times in a row"):
        fetch(f"{server.url}/none", tmp_path / "got")
    with pytest.raises(UserError, match=r"no network for 0\.05 s: nowhere\.invalid sends nothing") as caught:
        fetch("http://nowhere.invalid/x.txt", tmp_path / "got", patience=0.05)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot write"):
        fetch(f"{server.url}/a.bin.gz", tmp_path / "no" / "folder" / "got")
    server.faults = ["503"] * 1000
    with pytest.raises(UserError, match=r"no network for 0\.1 s: 127\.0\.0\.1 sends nothing \(answer 503"):
        fetch(f"{server.url}/a.bin.gz", tmp_path / "got", patience=0.1)
