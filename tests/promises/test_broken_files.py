"""Whatever is wrong with a file: one line that names it and the cause, or its text whole. Never anything else."""

import gzip
import hashlib
import io
import json
import os
import re
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from khanhllm import cli
from khanhllm.data.ensure import ensure
from khanhllm.data.prepare import prepare
from khanhllm.data.readers import Reader
from khanhllm.data.shards import Shards
from khanhllm.data.sources import locate
from khanhllm.data.tokenizer import Tokenizer, train_tokenizer
from khanhllm.errors import UserError
from khanhllm.schema import DataConfig

GOOD = b'{"text": "one fine text"}\n'
FINE = ["one fine text"]
LINES = b"".join(b'{"text": "%d %s"}\n' % (n, hashlib.sha256(b"%d" % n).hexdigest().encode()) for n in range(400))
TEXTS = [json.loads(line)["text"] for line in LINES.splitlines()]
GZ = gzip.compress(LINES)
ZST = zstandard.ZstdCompressor(write_checksum=True).compress(LINES)
LONG = b"0123456789 abcde" * (50 * 2**20 // 16)


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


def parquet(column, name="text", **options):
    out = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"id": list(range(len(column))), name: column}), out, **options)
    return out.getvalue()


def page_flipped():
    data = parquet(TEXTS, write_page_checksum=True, compression="none", use_dictionary=False)
    return flipped(data, data.index(TEXTS[200].encode()))


def open_frame():
    frame = zstandard.ZstdCompressor().compressobj()
    return frame.compress(LINES) + frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)


PARQUET = parquet(TEXTS)
CUT = "is cut short: its end is missing"
UTF8 = r"is not UTF-8 text \(byte {}\); convert it"

# name: (file name, bytes, the texts that must be read or what the one line says after the file's name)
FILES = {
    "text, empty": ("a.txt", b"", []),
    "text, only blanks": ("a.txt", b" \n\t\r\n" * 9999, []),
    "text, a mark alone": ("a.txt", b"\xef\xbb\xbf", []),
    "text, byte order mark": ("a.txt", b"\xef\xbb\xbfhello", ["hello"]),
    "text, not UTF-8 at the start": ("a.txt", b"\xffhello", UTF8.format(0)),
    "text, not UTF-8 in the middle": ("a.txt", b"x" * 300_000 + b"\xe9 " + b"x" * 300_000, UTF8.format(300_000)),
    "text, not UTF-8 at the end": ("a.txt", b"x" * 600_000 + b"\xe9", UTF8.format(600_000)),
    "text, cut in a character": ("a.txt", "hello €".encode()[:-1], UTF8.format(6)),
    "text, a surrogate": ("a.txt", b"ab\xed\xa0\x80", UTF8.format(2)),
    "text, NUL bytes": ("a.txt", b"hello\0\0\0", r"holds a NUL byte \(byte 5\); is it text"),
    "text, UTF-16 with a mark": ("a.txt", "hello".encode("utf-16"), ["hello"]),
    "text, UTF-16 without": ("a.txt", "hello".encode("utf-16-le"), r"holds a NUL byte \(byte 1\)"),
    "text, a line of 50 MB": ("a.txt", LONG, len(LONG)),
    "jsonl, empty": ("a.jsonl", b"", []),
    "jsonl, blank lines": ("a.jsonl", b"\n \n" + GOOD + b"\n\r\n", FINE),
    "jsonl, carriage returns": ("a.jsonl", GOOD.replace(b"\n", b"\r\n") * 2, FINE * 2),
    "jsonl, no last line feed": ("a.jsonl", GOOD.strip(), FINE),
    "jsonl, byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + GOOD, FINE),
    "jsonl, cut": ("a.jsonl", GOOD + GOOD[:12], r", line 2 is not valid JSON .*is the file cut"),
    "jsonl, no JSON": ("a.jsonl", GOOD * 2 + b"hello\n", ", line 3 is not valid JSON"),
    "jsonl, not UTF-8": ("a.jsonl", b'{"text": "caf\xe9"}', r", line 1 is not UTF-8 text \(byte 13 of the line\)"),
    "jsonl, UTF-16": ("a.jsonl", (GOOD * 2).decode().encode("utf-16"), FINE * 2),
    "jsonl, lone surrogate": ("a.jsonl", b'{"text": "a\\ud800b"}', ["a\ufffdb"]),
    "jsonl, null": ("a.jsonl", b'{"text": null}\n' + GOOD, FINE),
    "jsonl, a number": ("a.jsonl", b'{"text": 7}', ", line 1: 'text' must be text, not int"),
    "jsonl, a list": ("a.jsonl", GOOD + b'{"text": ["a"]}', ", line 2: 'text' must be text, not list"),
    "jsonl, no column": ("a.jsonl", b'{"id": 1}', ", line 1 has no text column 'text'; it has: id"),
    "jsonl, an empty object": ("a.jsonl", b"{}", ", line 1 has no text column"),
    "jsonl, arrays": ("a.jsonl", b'["a", "b"]\n', ", line 1 is not a JSON object"),
    "jsonl, 100,000 brackets": ("a.jsonl", b'{"text": ' + b"[" * 100_000, ", line 1 is not valid JSON"),
    "jsonl, 100,000 pairs": ("a.jsonl", b'{"text": "a", "x": %s}' % (b"[" * 100_000 + b"]" * 100_000), ", line 1 "),
    "jsonl, a huge integer": ("a.jsonl", b'{"text": "a", "n": %s}' % (b"9" * 100_000), ", line 1 is not valid JSON"),
    "jsonl, NaN": ("a.jsonl", b'{"text": "a", "score": NaN}', ["a"]),
    "jsonl, a key twice": ("a.jsonl", b'{"text": "a", "text": "b"}', ["b"]),
    "jsonl, a line of 50 MB": ("a.jsonl", b'{"text": "%s"}' % LONG, len(LONG)),
    "jsonl, NUL bytes": ("a.jsonl", GOOD + b"\0\0\0\0", ", line 2 is not valid JSON"),
    "jsonl, garbage behind": ("a.jsonl", GOOD.strip() + b"}}", ", line 1 is not valid JSON"),
    "gz, whole": ("a.jsonl.gz", GZ, TEXTS),
    "gz, empty": ("a.jsonl.gz", b"", "is empty"),
    "gz, cut in its header": ("a.jsonl.gz", GZ[:5], CUT),
    "gz, half": ("a.jsonl.gz", GZ[: len(GZ) // 2], CUT),
    "gz, last byte missing": ("a.jsonl.gz", GZ[:-1], CUT),
    "gz, a byte flipped": ("a.jsonl.gz", flipped(GZ, len(GZ) // 2), "cannot read.*damaged"),
    "gz, wrong checksum": ("a.jsonl.gz", flipped(GZ, len(GZ) - 8), "cannot read.*CRC"),
    "gz, wrong length": ("a.jsonl.gz", flipped(GZ, len(GZ) - 1), "cannot read.*length"),
    "gz, garbage behind": ("a.jsonl.gz", GZ + b"garbage", "cannot read.*gzip"),
    "gz, plain text": ("a.jsonl.gz", LINES, "cannot read.*gzip"),
    "gz, two members": ("a.jsonl.gz", GZ + GZ, TEXTS * 2),
    "gz, second member cut": ("a.jsonl.gz", GZ + GZ[:-20], CUT),
    "zst, whole": ("a.jsonl.zst", ZST, TEXTS),
    "zst, empty": ("a.jsonl.zst", b"", "is empty"),
    "zst, cut in its header": ("a.jsonl.zst", ZST[:3], CUT),
    "zst, half": ("a.jsonl.zst", ZST[: len(ZST) // 2], CUT),
    "zst, last byte missing": ("a.jsonl.zst", ZST[:-1], CUT),
    "zst, a byte flipped": ("a.jsonl.zst", flipped(ZST, len(ZST) // 2), "cannot read.*damaged"),
    "zst, garbage behind": ("a.jsonl.zst", ZST + b"garbage", "cannot read"),
    "zst, plain text": ("a.jsonl.zst", LINES, "cannot read"),
    "zst, no end of frame": ("a.jsonl.zst", open_frame(), CUT),
    "zst, second frame cut": ("a.jsonl.zst", ZST + ZST[:-9], CUT),
    "parquet, whole": ("a.parquet", PARQUET, TEXTS),
    "parquet, no rows": ("a.parquet", parquet(pa.array([], "string")), []),
    "parquet, nulls": ("a.parquet", parquet(["a", None, "b"]), ["a", "b"]),
    "parquet, empty": ("a.parquet", b"", "is empty"),
    "parquet, half": ("a.parquet", PARQUET[: len(PARQUET) // 2], "cannot read"),
    "parquet, last byte missing": ("a.parquet", PARQUET[:-1], "cannot read"),
    "parquet, only its footer": ("a.parquet", b"PAR1" + PARQUET[-1000:], "cannot read"),
    "parquet, garbage": ("a.parquet", LINES, "cannot read"),
    "parquet, a byte of a page flipped": ("a.parquet", page_flipped(), "cannot read.*(?i:crc|checksum)"),
    "parquet, not UTF-8": ("a.parquet", PARQUET.replace(TEXTS[9].encode(), b"\xff" * len(TEXTS[9])), "cannot read"),
    "parquet, no column": ("a.parquet", parquet(["a"], "words"), "has no text column 'text'; it has: id, words"),
    "parquet, integers": ("a.parquet", parquet([1, 2]), ", row 1: 'text' must be text, not int"),
    "parquet, bytes": ("a.parquet", parquet([b"a"]), ["a"]),
    "parquet, bytes that are no text": ("a.parquet", parquet([b"\xff"]), r", row 1 is not UTF-8 text \(byte 0"),
    "csv, whole": ("a.csv", b"id,text\n1,a\n\n2,b\n", ["a", "b"]),
    "csv, empty": ("a.csv", b"", "has no header"),
    "csv, no header": ("a.csv", b"1,hello\n2,there\n", ", row 1 has no text column 'text'; it has: 1, hello"),
    "csv, wrong column": ("a.csv#title", b"id,text\n1,a\n", ", row 1 has no text column 'title'"),
    "csv, a quote never closed": ("a.csv", b'id,text\n1,"a\n2,b\n', ", row 2: a quoted field is never closed"),
    "csv, too few fields": ("a.csv", b"id,text\n1,a\n2\n", ", row 3 has 1 fields, but the header names 2"),
    "csv, too many fields": ("a.csv", b"id,text\n1,a,b\n", ", row 2 has 3 fields, but the header names 2"),
    "csv, NUL bytes": ("a.csv", b"id,text\n1,a\0\n", ", row 2 holds NUL bytes"),
    "csv, not UTF-8": ("a.csv", b"id,text\n1,\xe9\n", r", row 2 is not UTF-8 text \(byte 2 of the line\)"),
    "csv, UTF-16": ("a.csv", "id,text\n1,a\n".encode("utf-16"), ["a"]),
    "a line feed in the name": ("a\nb.jsonl", b"hello", ", line 1 is not valid JSON"),
    "an unknown ending": ("a.docx", b"hello", "is of unknown kind; known endings"),
}


def read(source):
    found = locate(str(source))
    reader = Reader(found, [])
    return [document.text for name in found.files for document in reader.read_file(name)]


def one_line(work, name, said):
    """What `work` is refused with: one line that names the file and says `said` behind or before it."""
    with pytest.raises(UserError) as caught:
        work()
    line = str(caught.value)
    assert "\n" not in line and name in line and re.search(said, line), line
    return line


@pytest.mark.parametrize("kind", FILES)
def test_a_broken_source(tmp_path, kind):
    name, data, expected = FILES[kind]
    (tmp_path / name.partition("#")[0]).write_bytes(data)
    if isinstance(expected, list):
        assert read(tmp_path / name) == expected
    elif isinstance(expected, int):
        assert sum(map(len, read(tmp_path / name))) == expected
    else:
        one_line(lambda: read(tmp_path / name), name.partition("#")[0].replace("\n", "\\n"), expected)


def hole(folder, name="a.jsonl"):
    (folder / name).symlink_to(folder / "nowhere")
    return folder / name


def pipe(folder):
    os.mkfifo(folder / "a.txt")
    return folder / "a.txt"


def packed_folder(folder):
    (folder / "a.jsonl.gz").mkdir()
    return folder / "a.jsonl.gz"


def loop(folder):
    (folder / "a.txt").symlink_to(folder / "a.txt")
    return folder / "a.txt"


def closed(folder):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (folder / "a.txt").write_bytes(b"hello")
    (folder / "a.txt").chmod(0)
    return folder / "a.txt"


@pytest.mark.parametrize(
    ("make", "alone", "inside"),
    [
        (hole, "there is no file", "cannot read .*No such file"),
        (loop, "there is no file", "cannot read "),
        (pipe, "there is no file", "it is not a regular file"),
        (packed_folder, "holds no text files", ""),
        (closed, "Permission denied", "Permission denied"),
    ],
)
def test_what_is_no_file(tmp_path, make, alone, inside):
    path = make(tmp_path)
    one_line(lambda: read(path), path.name, alone)
    (tmp_path / "fine.jsonl").write_bytes(GOOD)
    if inside:
        one_line(lambda: read(tmp_path), path.name, inside)
    else:
        assert read(tmp_path) == FINE


def test_a_file_that_vanishes_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    found = locate(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").unlink()
    one_line(lambda: list(Reader(found, []).read_file("a.jsonl")), "a.jsonl", "cannot read")


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_file_made_to_fill_the_memory_does_not(tmp_path, ending):
    blanks = b" " * 1_000_000 + b"\n"
    path = tmp_path / f"a.jsonl.{ending}"
    with (gzip.open if ending == "gz" else zstandard.open)(path, "wb") as file:
        for _ in range(60):
            file.write(blanks)
        file.write(GOOD)
    assert path.stat().st_size < 300_000
    tracemalloc.start()
    assert read(path) == FINE
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 45_000_000  # of the 60 MB


TOKENIZER = train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 3, 280)
OTHER = train_tokenizer(["sphinx of black quartz, judge my vow"] * 3, 270)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "a.jsonl").write_bytes(LINES)
    prepare(str(folder / "a.jsonl"), TOKENIZER, folder / "shards", validation=0.1, workers=1)
    return {path.name: path.read_bytes() for path in (folder / "shards").iterdir()}


SHARD = "train-00000.bin"


def manifest(**changes):
    return "manifest.json", lambda raw: json.dumps(json.loads(raw) | changes).encode()


def of_shard(**changes):
    def change(raw):
        layout = json.loads(raw)
        next(shard for shard in layout["shards"] if shard["file"] == SHARD).update(changes)
        return json.dumps(layout).encode()

    return "manifest.json", change


NOT_OURS = "is damaged or not a shard manifest"

# name: (file and what becomes of its bytes, the name in the line, what it says; empty: reads)
PREPARED = {
    "whole": ((SHARD, bytes), SHARD, ""),
    "manifest missing": (("manifest.json", None), "manifest.json", "is not a folder of prepared shards|No such file"),
    "manifest empty": (("manifest.json", lambda raw: b""), "manifest.json", NOT_OURS),
    "manifest cut": (("manifest.json", lambda raw: raw[:-20]), "manifest.json", NOT_OURS),
    "manifest not JSON": (("manifest.json", lambda raw: b"hello"), "manifest.json", NOT_OURS),
    "manifest not UTF-8": (("manifest.json", lambda raw: b"\xff" + raw), "manifest.json", NOT_OURS),
    "manifest an array": (("manifest.json", lambda raw: b"[]"), "manifest.json", NOT_OURS),
    "manifest of brackets": (("manifest.json", lambda raw: b"[" * 100_000), "manifest.json", NOT_OURS),
    "manifest of tomorrow": (manifest(version=2), "manifest.json", "has version 2, this program reads 1"),
    "manifest, extra key": (manifest(colour="red"), "manifest.json", r"colour: Extra"),
    "manifest, odd type": (manifest(dtype="float16"), "manifest.json", r"\(dtype"),
    "manifest, no vocabulary": (manifest(vocab_size=0), "manifest.json", r"\(vocab_size"),
    "manifest, path upwards": (of_shard(file="../x.bin"), "manifest.json", r"shards\.\d+\.file"),
    "manifest, absolute path": (of_shard(file="/x.bin"), "manifest.json", r"shards\.\d+\.file"),
    "manifest, line feed in a name": (of_shard(file="x.bin\n"), "manifest.json", r"shards\.\d+\.file"),
    "manifest, negative tokens": (of_shard(tokens=-1), "manifest.json", r"shards\.\d+\.tokens"),
    "shard missing": ((SHARD, None), SHARD, "cannot read .*No such file"),
    "shard empty": ((SHARD, lambda raw: b""), SHARD, "has 0 bytes, but"),
    "shard cut": ((SHARD, lambda raw: raw[:-2]), SHARD, "it is cut short or changed"),
    "shard of odd length": ((SHARD, lambda raw: raw[:-1]), SHARD, "it is cut short or changed"),
    "shard too long": ((SHARD, lambda raw: raw + b"\0\0"), SHARD, "it is cut short or changed"),
    "shard, a byte flipped": ((SHARD, lambda raw: flipped(raw, len(raw) // 2 & ~1)), SHARD, "sha256 is not"),
    "shard, an id too large": ((SHARD, lambda raw: b"\xff\xff" + raw[2:]), SHARD, "sha256 is not"),
    "tokenizer missing": (("tokenizer.json", None), "tokenizer.json", "cannot read the tokenizer.*No such file"),
    "tokenizer empty": (("tokenizer.json", lambda raw: b""), "tokenizer.json", "is not a byte-level BPE"),
    "tokenizer cut": (("tokenizer.json", lambda raw: raw[:-9]), "tokenizer.json", "is not a byte-level BPE"),
    "tokenizer garbage": (("tokenizer.json", lambda raw: b"\xff\0" * 99), "tokenizer.json", "not UTF-8"),
    "tokenizer an array": (("tokenizer.json", lambda raw: b"[1]"), "tokenizer.json", "is not a byte-level BPE"),
    "tokenizer of brackets": (("tokenizer.json", lambda raw: b"[" * 100_000), "tokenizer.json", "is not a byte-level"),
    "tokenizer of another": (
        ("tokenizer.json", lambda raw: OTHER.canonical.encode()), "tokenizer.json", "does not match the shards"
    ),
}  # fmt: skip


def spoilt(folder, prepared, name, change):
    folder.mkdir()
    for file, raw in prepared.items():
        if file != name or change:
            (folder / file).write_bytes(change(raw) if file == name else raw)
    return folder


def use(folder):
    """All that a run does with a folder of shards, and what `data verify` does."""
    shards = Shards.open(folder, "train", 16)
    Tokenizer.load(folder / "tokenizer.json")
    assert ensure(DataConfig(source=str(folder)), 300, 100) == folder
    for index in range(shards.rows):
        shards.row(index)
    shards.verify()


@pytest.mark.parametrize("kind", PREPARED)
def test_a_broken_folder_of_shards(tmp_path, prepared, kind):
    (file, change), name, said = PREPARED[kind]
    folder = spoilt(tmp_path / "shards", prepared, file, change)
    if said:
        one_line(lambda: use(folder), name, said)
    else:
        use(folder)


def test_a_shard_of_one_token_reads(tmp_path, prepared):
    raw = np.full(len(prepared[SHARD]) // 2, 7, "<u2").tobytes()
    folder = spoilt(tmp_path / "shards", prepared, SHARD, lambda _: raw)
    name, change = of_shard(sha256=hashlib.sha256(raw).hexdigest())
    (folder / name).write_bytes(change(prepared[name]))
    use(folder)
    assert set(Shards.open(folder, "train", 16).row(0).tolist()) == {7}


def said(capfd, *arguments):
    """The exit code of a command, and what it wrote."""
    code = cli.main([str(argument) for argument in arguments])
    out, error = capfd.readouterr()
    assert "Traceback" not in out + error and "unforeseen" not in error
    return code, out, error


# kind: the exit code of `data show`, which shows what can be read before the fault and counts the rest as rejected
SHOWN = {
    "text, not UTF-8 in the middle": 0, "text, NUL bytes": 2, "jsonl, cut": 0, "jsonl, 100,000 brackets": 2,
    "gz, half": 2, "gz, wrong checksum": 2, "zst, no end of frame": 0, "zst, plain text": 2, "parquet, half": 2,
    "parquet, integers": 2, "csv, no header": 2, "csv, a quote never closed": 2, "a line feed in the name": 2,
}  # fmt: skip


@pytest.mark.parametrize("kind", SHOWN)
def test_the_commands_say_it_in_one_line(tmp_path, capfd, kind):
    name, data, _ = FILES[kind]
    folder = tmp_path / "texts"
    folder.mkdir()
    path = folder / name
    path.write_bytes(data)
    TOKENIZER.save(tmp_path / "tokenizer.json")
    out = tmp_path / "out"
    code, _, error = said(
        capfd, "prepare", "--data", path, "--tokenizer", tmp_path / "tokenizer.json", "--out", out, "--workers", "1"
    )
    assert code == 2 and not out.exists()
    assert error.splitlines()[-1].startswith("khanhllm: ") and name.replace("\n", "\\n") in error.splitlines()[-1]
    code, _, error = said(capfd, "data", "show", path)
    assert code == SHOWN[kind]
    assert error.count("\n") == (code == 2)
    (folder / "fine.csv").write_bytes(b"text\nfine\n")
    code, shown, error = said(capfd, "data", "show", folder)
    assert code == 0 and not error and "1 unreadable file" in shown and "✗" in shown


@pytest.mark.parametrize("kind", ["manifest cut", "shard cut", "tokenizer of brackets", "tokenizer of another"])
def test_shards_are_shown_and_verified_in_one_line(tmp_path, prepared, capfd, kind):
    (file, change), name, _ = PREPARED[kind]
    folder = spoilt(tmp_path / "shards", prepared, file, change)
    for action in ("show", "verify"):
        code, _, error = said(capfd, "data", action, folder)
        assert code == 2 and error.count("\n") == 1 and name in error


def test_verify_refuses_what_it_does_not_heed(tmp_path, capfd):
    for words in (["--documents", "5"], ["--sample", "10"], ["--tokenizer", "x"]):
        assert "verify takes no" in said(capfd, "data", "verify", tmp_path, *words)[2]
