"""Laws of looking up a source: the order is fair and fixed, what is wrong is said in one line and within seconds."""

import errno
import http.server
import os
import socket
import threading
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest

from khanhllm.data import sources
from khanhllm.data.source_syntax import common_folder, expanded, of_split
from khanhllm.data.sources import Source, components, is_remote, locate
from khanhllm.errors import UserError


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
    with pytest.raises(UserError, match=r"has a manifest\.json, as prepared shards have"):
        locate(str(folder / "deep"))


def test_a_run_inside_a_folder_of_texts_is_no_text(folder):
    before = locate(str(folder))
    for name in ("config.toml", "training_log.csv", "samples.txt", "checkpoints/notes.txt"):
        (folder / "runs/nano" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "runs/nano" / name).write_text("x", encoding="utf-8")
    found = locate(str(folder))
    assert (found.files, found.fingerprint) == (before.files, before.fingerprint)
    assert dict(found.left_out) == {**dict(before.left_out), "run": 1}


def test_what_is_left_out_is_counted_by_kind(folder):
    for name in ("b.png", "deep/c.PNG", "x.tar.gz", "Makefile", ".secret", "package.json", "shards/manifest.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('{"name": "x"}', encoding="utf-8")
    (folder / "shards" / "tokenizer.json").write_text("{}", encoding="utf-8")
    found = locate(str(folder))
    assert dict(found.left_out) == {
        ".png": 3,
        ".tar.gz": 1,
        "without ending": 1,
        "hidden": 1,
        ".json without texts": 1,
        ".hidden/": 1,
        "__pycache__/": 1,
        "folder of shards": 1,
    }
    assert found.left_out_line().startswith(f"left out of {folder}: 3 .png, 1 ")
    assert dict(locate(f"{folder}/*").left_out)[".png"] == 2
    assert locate(str(folder / "a.txt")).left_out_line() == ""
    with pytest.raises(UserError, match=r"these are 1 \.png$"):
        locate(f"{folder}/deep/*.PNG")


def test_a_json_of_texts_is_told_from_settings(folder):
    for name, content in {
        "array.json": '[\n {"id": 1, "text": "x"}]',
        "lines.json": '{"id": 1, "content": "x"}\n{"id": 2, "content": "y"}\n',
        "named.json": '{"title": "x"}',
        "numbers.json": '[1, 2, "text"]',
    }.items():
        (folder / name).write_text(content, encoding="utf-8")
    texts = {name for name in locate(str(folder)).files if name.endswith(".json")}
    assert texts == {"array.json", "lines.json"}
    assert "named.json" in locate(f"{folder}#title").files


def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    disk, folder = tmp_path / "disk", tmp_path / "texts"
    for place in (disk / "wiki" / "deep", folder / "own"):
        place.mkdir(parents=True)
        (place / "a.txt").write_text("text", encoding="utf-8")
    for link, target in {
        "wiki": disk / "wiki",
        "zwiki": disk / "wiki",
        "again": folder / "own",
        "own/loop": folder,
        "up": tmp_path,
    }.items():
        (folder / link).symlink_to(target)
    (disk / "wiki" / "back").symlink_to(disk)
    found = locate(str(folder))
    assert set(found.files) == {"own/a.txt", "wiki/deep/a.txt"}
    assert dict(found.left_out) == {"link to a folder above": 2}
    assert len(locate(f"{folder}/**/*.txt").files) == len(locate(f"{folder}/*/**/*.txt").files) == 2


def test_a_column_behind_a_pattern_sends_nobody_round_a_loop(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"body": "text"}\n', encoding="utf-8")
    for number in range(3):
        (tmp_path / f"loop{number}").symlink_to(tmp_path)
    left, scan = iter(range(100)), os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (next(left), scan(path))[1])
    assert locate(f"{tmp_path}/**/*.jsonl#body").files == ("a.jsonl",)


@pytest.mark.parametrize(("closed", "source"), [("deep", ""), ("deep/er", "**/*.md"), (".", ""), ("link", "")])
def test_a_folder_that_cannot_be_opened_is_named(folder, tmp_path_factory, monkeypatch, closed, source):
    disk = tmp_path_factory.mktemp("disk")
    (folder / "link").symlink_to(disk)
    scan = os.scandir

    def scandir(path):
        if Path(path) == folder / closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"^cannot read .*: Permission denied; make it readable") as refused:
        locate(str(folder / source))
    assert f"cannot read {folder / closed}: " in str(refused.value)


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
        ("http://127.0.0.1:1/my text.txt", "http://127.0.0.1:1/my text.txt is not an address: "),
        ("http://127.0.0.1:port/a.txt", "is not an address: nonnumeric port"),
        ("{}/picture.png", "of unknown kind; known endings: .txt"),
        ("{}/*.png", "only files of unknown kind; known endings"),
        ("{}/*.nothing", "matches nothing"),
        ("{}/__pycache__/../empty", "holds no text files"),
        ("{}/deep/b.jsonl#", "names no column; write it behind the '#'"),
        ("{}/a.txt#body", "is plain text, which has no column 'body'"),
        ("stdlib#body", "stdlib is plain text"),
        ("s3://bucket/x.jsonl", "unknown source s3://bucket/x.jsonl"),
        ("~nobody-here/a.csv#title", "no file, folder or source named ~nobody-here/a.csv"),
        ("http://[host/a.txt", "http://[host/a.txt is not an address"),
        ("hf://", "names no dataset; write hf://datasets/ORG/NAME"),
        ("hf://openai-community/gpt2", "names no dataset; write hf://datasets/ORG/NAME"),
        ("hf://datasets/some/test@refs/convert/parquet/x", "without @REVISION"),
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


def test_braces_stand_for_many_files_of_one_source():
    c4 = "https://host/c4/c4-train.{00000..00003}-of-00004.json.gz"
    assert expanded(c4) == [f"https://host/c4/c4-train.0000{n}-of-00004.json.gz" for n in range(4)]
    root, names = common_folder(expanded("https://host/c4/{en,de}/{3..1..2}.csv?to=a/b"))
    assert (root, names) == ("https://host/c4", [f"{one}.csv?to=a/b" for one in ("en/3", "en/1", "de/3", "de/1")])
    assert expanded("https://host/{a,a,b}{8..10}.txt")[2:4] == ["https://host/a10.txt", "https://host/b8.txt"]
    assert len(expanded("https://host/{00001..100000}.txt")) == 100_000


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://host/{a,b.txt", "braces must come in pairs"),
        ("https://host/a}.txt", "braces must come in pairs"),
        ("https://host/{a,{b,c}}.txt", "not inside each other"),
        ("https://{a,b}/c.txt", "not in the host's name"),
        ("https://host/{a}.txt", "{a} is neither a list {a,b} nor a range"),
        ("https://host/{a..c}.txt", "{a..c} is neither"),
        ("https://host/{0..100000}.txt", "more than 100,000 files"),
        ("https://host/{0..999}/{0..999}.txt", "more than 100,000 files"),
        ("https://host/{0..999999999999999999}.txt", "more than 100,000 files"),
    ],
)
def test_wrong_braces_are_one_line_and_ask_no_network(url, said):
    with pytest.raises(UserError) as caught:
        locate(url)
    assert said in str(caught.value) and url in str(caught.value) and "\n" not in str(caught.value)


def test_a_pattern_on_the_web_is_knocked_at_once():
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = locate(f"http://127.0.0.1:{server.server_port}/x/{{a,b}}/{{0..9}}.csv#body")
        server.shutdown()
    assert asked == ["/x/a/0.csv"] and len(found.files) == 20 and found.column == "body"
    assert found.root.endswith("/x") and {"a/0.csv", "b/9.csv"} < set(found.files)


HUB = [
    "README.md",
    "data/train-00000-of-00002.parquet",
    "data/train-00001-of-00002.parquet",
    "data/valid.parquet",
    "latest/testing/0.parquet",
    "unsupervised/train/0.parquet",
    "train/dev_notes.jsonl",
]


@pytest.mark.parametrize(
    ("split", "places"),
    [
        ("", [1, 2, 5]),
        ("training", [1, 2, 5]),
        ("dev", [3, 6]),
        ("validation", [3, 6]),
        ("test", [4]),
        ("unsupervised", [5]),
        ("dev_notes", [6]),
    ],
)
def test_a_split_is_found_in_the_names(split, places):
    assert of_split(HUB, split) == [HUB[place] for place in places]


def test_what_is_not_marked_is_trained_on_before_what_is_held_out():
    assert of_split(["a.jsonl", "contest.jsonl", "test.jsonl"]) == ["a.jsonl", "contest.jsonl"]
    assert of_split(["test/a.jsonl", "val.jsonl"]) == ["test/a.jsonl", "val.jsonl"]
    with pytest.raises(UserError, match=r"^no file of x belongs to the split 'test'; splits seen: train, validation$"):
        of_split(["train.csv", "latest.csv", "dev.csv"], "test", "x")


class Hub:
    files = tuple(
        f"datasets/some/test/{name}"
        for name in ("data/train.csv", "data/test.csv", "data/more/x.csv", "infos.json", "x.png")
    )

    def isfile(self, path):
        return path in self.files

    def glob(self, pattern):
        return [name for name in self.files if fnmatch(name, pattern)]

    def find(self, path):
        return [name for name in self.files if name.startswith(path + "/")]


@pytest.mark.parametrize(
    ("end", "root", "files"),
    [
        ("", "/data", {"train.csv"}),
        ("/*.json", "", {"infos.json"}),
        (":test", "/data", {"test.csv"}),
        ("/data/:train#body", "/data", {"train.csv"}),
        ("/data/test.csv", "/data", {"test.csv"}),
        ("/data/more", "/data/more", {"x.csv"}),
    ],
)
def test_a_split_of_the_hub(monkeypatch, end, root, files):
    monkeypatch.setattr(sources, "_ask", lambda *_: 0)
    monkeypatch.setattr("huggingface_hub.HfFileSystem", Hub)
    found = locate(f"hf://datasets/some/test{end}")
    assert (found.root, set(found.files)) == (f"hf://datasets/some/test{root}", files)
    if not end:
        assert dict(found.left_out) == {".json": 1, ".png": 1, "of other splits": 2}
    for wrong, said in ((":dev", "splits seen: test, train"), (":train[:9%]", "is not the name of a split")):
        with pytest.raises(UserError, match=said):
            locate(f"hf://datasets/some/test{wrong}")


def test_a_mixture_has_components_with_shares(tmp_path):
    assert components("c4:4, ./my-notes:1") == [("c4", 0.8), ("./my-notes", 0.2)]
    assert components("hf://datasets/a/b:train : .5,x.csv#body:5e-1") == [
        ("hf://datasets/a/b:train", 0.5),
        ("x.csv#body", 0.5),
    ]
    assert components("http://h/{a,b}.txt:1, ./x:1,http://h/{c,d}/{e,f}:2") == [
        ("http://h/{a,b}.txt", 0.25),
        ("./x", 0.25),
        ("http://h/{c,d}/{e,f}", 0.5),
    ]
    for single in ("c4", "http://localhost:8000", "http://x/{a,b}.txt", "a:1,b", "a,b:1"):
        assert components(single) == [(single, 1.0)]
    there = f"{tmp_path}/a:1,b:2"
    Path(there).mkdir()
    assert components(there) == [(there, 1.0)]
    assert is_remote("./x:1, c4:1") and not is_remote("./x:1, ./y:1")
    with pytest.raises(UserError, match="one by one: c4, x"):
        locate("c4:1, x:1")
    for wrong, why in (("a:0, b:1", "above 0"), ("a:-1, b:1", "got -1"), ("a:1e999, b:1", "inf"), ("a:1,a:2", "twice")):
        with pytest.raises(UserError, match=why):
            components(wrong)
