"""Laws of looking up a source: the order is fair and fixed, what is wrong is said in one line and within seconds."""

import socket
import threading
import time

import pytest

from khanhllm.config import UserError
from khanhllm.data import sources
from khanhllm.data.sources import Source, is_remote, locate


@pytest.fixture
def folder(tmp_path):
    for name in ("a.txt", "deep/b.jsonl", "deep/er/c.md", "picture.png", ".hidden/d.txt", "__pycache__/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}", encoding="utf-8")
    return tmp_path


def test_a_folder_is_read_to_its_depth(folder):
    assert set(locate(str(folder)).files) == {"a.txt", "deep/b.jsonl", "deep/er/c.md"}


def test_a_file_and_a_pattern(folder):
    assert locate(str(folder / "a.txt")).files == ("a.txt",)
    assert set(locate(str(folder / "**" / "*.md")).files) == {"c.md"}
    assert set(locate(str(folder / "[ad]*" / "**" / "*")).files) == {"b.jsonl", "er/c.md"}
    assert set(locate(str(folder / "**" / "[abc].*")).files) == {"a.txt", "deep/b.jsonl", "deep/er/c.md"}


def test_shards_inside_a_folder_of_texts_are_no_text(folder):
    for name in ("manifest.json", "tokenizer.json", "vocab.txt"):
        (folder / "deep" / name).write_text("{}", encoding="utf-8")
    assert locate(str(folder)).files == ("a.txt",)
    with pytest.raises(UserError, match="holds prepared shards"):
        locate(str(folder / "deep"))


def test_the_order_depends_on_names_alone_and_is_not_alphabetical(tmp_path):
    for place in ("one", "two"):
        for number in range(50) if place == "one" else reversed(range(50)):
            (tmp_path / place).mkdir(exist_ok=True)
            (tmp_path / place / f"{number:02d}.txt").write_text("x", encoding="utf-8")
    one, two = locate(str(tmp_path / "one")), locate(str(tmp_path / "two"))
    assert one.files == two.files != tuple(sorted(one.files))


def test_the_fingerprint_follows_the_files(folder):
    before = locate(str(folder)).fingerprint
    assert locate(str(folder)).fingerprint == before
    (folder / "a.txt").write_text("changed it", encoding="utf-8")
    assert locate(str(folder)).fingerprint != before


def test_a_column_is_named_behind_the_path(folder):
    plain, named = locate(str(folder)), locate(f"{folder}/#my own")
    assert (plain.column, named.column, named.files) == ("", "my own", plain.files)
    assert len({plain.fingerprint, named.fingerprint, locate(f"{folder}/#body").fingerprint}) == 3
    assert locate(f"{folder}/deep/*.jsonl#body").column == "body"
    assert is_remote("c4#url") and not is_remote(f"{folder}#url")


def test_a_path_that_exists_wins_over_a_column(folder):
    (folder / "a.txt").rename(folder / "a#1.txt")
    (folder / "deep").rename(folder / "deep#2")
    for source in ("a#1.txt", "a#*.txt", "deep#2", "deep#2/b.jsonl", "deep#2/*.jsonl"):
        assert locate(f"{folder}/{source}").column == ""
    assert locate(f"{folder}/deep#2#body").column == "body"


def test_groups_hold_every_file_once_in_order():
    files = tuple(f"{number}.txt" for number in range(100))
    sizes = tuple((number % 7 + 1) * 1000 for number in range(100))
    groups = Source("x", "/", files, sizes, "", 0).groups(least=20_000)
    assert tuple(name for group in groups for name in group) == files
    assert 10 < len(groups) < 40
    unknown = Source("x", "/", files, (0,) * 100, "", 0).groups()
    assert all(len(group) == 1 for group in unknown)


def test_the_standard_library_is_there():
    found = locate("stdlib")
    assert len(found.files) > 100 and found.size > 5e6
    assert not any("site-packages" in name or "__pycache__" in name for name in found.files)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("missing/place", "no file, folder or source named missing/place"),
        ("stdlob", "did you mean stdlib?"),
        ("{}/picture.png", "of unknown kind; known endings: .txt"),
        ("{}/*.png", "only files of unknown kind; known endings"),
        ("{}/*.nothing", "matches nothing"),
        ("{}/__pycache__/../empty", "holds no text files"),
        ("{}/deep/b.jsonl#", "names no column; write it behind the '#'"),
        ("{}/a.txt#body", "is plain text, which has no column 'body'"),
        ("stdlib#body", "stdlib is plain text"),
        ("s3://bucket/x.jsonl", "unknown source s3://bucket/x.jsonl"),
    ],
)
def test_what_is_wrong_is_one_line(folder, source, said):
    (folder / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        locate(source.format(folder))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["c4", "hf://datasets/some/thing/*.parquet"])
def test_no_network_is_said_within_seconds_with_a_way_out(monkeypatch, source):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(sources, "_hub", lambda: f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(UserError, match="no network for") as caught:
            locate(source)
    assert source in str(caught.value) and "stdlib" in str(caught.value)


def test_a_server_that_never_answers_is_no_network(monkeypatch):
    monkeypatch.setattr(sources, "PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(UserError, match="no network for"):
            locate(f"http://127.0.0.1:{silent.getsockname()[1]}/x.txt")
    assert time.monotonic() - started < 3


def test_a_name_that_is_looked_up_for_ever_is_no_network(monkeypatch):
    monkeypatch.setattr(sources, "PATIENCE", 0.3)
    give_up = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: give_up.wait(20) and [])
    started = time.monotonic()
    with pytest.raises(UserError, match="no network for"):
        locate("http://somewhere.invalid/x.txt")
    give_up.set()
    assert time.monotonic() - started < 3
