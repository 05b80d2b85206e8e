"""Laws of reading: text comes through whole, bad input is one line that names the file and the place."""

import csv
import functools
import gzip
import http.server
import io
import json
import os
import threading

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from khanhllm.data import inspect, plain, readers, sources, unpacked, walk
from khanhllm.data.readers import Reader
from khanhllm.data.sources import locate
from khanhllm.errors import UserError

TEXTS = [f"Document {number}.\nIt has «two» lines and a number: {number * 7919}." for number in range(500)]
JSON = "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in TEXTS).encode()


def read(source):
    found = locate(str(source))
    reader = Reader(found, [])
    return [document.text for name in found.files for document in reader.read_file(name)]


def complaint(source):
    with pytest.raises(UserError) as caught:
        read(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path, data):
    path.write_bytes(data)
    return path


def table(path, texts=TEXTS, column="text"):
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), column: texts}), path)
    return path


LINES = [text.replace("\n", " ") for text in TEXTS]
"""for tsv, whose fields hold no line breaks"""


def tabbed(texts=LINES, column="text", end="\r\n"):
    return "".join(f"{number}\t{text}{end}" for number, text in [("id", column), *enumerate(texts)]).encode()


def sheet(texts=TEXTS, column="text", delimiter=",", end="\r\n"):
    out = io.StringIO(newline="")
    rows = [["id", column], *([str(number), text] for number, text in enumerate(texts))]
    csv.writer(out, delimiter=delimiter, lineterminator=end).writerows(rows)
    return out.getvalue().encode()


def packed(tmp_path):
    frames = zstandard.compress(JSON[:1000]) + zstandard.compress(JSON[1000:])
    return [
        write(tmp_path / "a.jsonl", JSON),
        write(tmp_path / "a.json.gz", gzip.compress(JSON)),
        write(tmp_path / "b.jsonl.gz", gzip.compress(JSON[:999]) + gzip.compress(JSON[999:])),
        write(tmp_path / "a.jsonl.zst", frames),
        table(tmp_path / "a.parquet"),
        write(tmp_path / "a.csv", sheet() + b"\r\n"),
        write(tmp_path / "a.tsv", b"\xef\xbb\xbf" + tabbed(column=" text", end="\n")),
        write(tmp_path / "a.csv.gz", gzip.compress(sheet())),
        write(tmp_path / "a.ndjson", JSON),
        write(tmp_path / "lines.json", JSON),
        write(tmp_path / "array.json", b"\xef\xbb\xbf" + json.dumps([{"id": 1, "text": t} for t in TEXTS]).encode()),
        write(tmp_path / "pretty.json", json.dumps([{"text": text} for text in TEXTS], indent=2).encode()),
        write(tmp_path / "b.tsv.gz", gzip.compress(tabbed())),
    ]


def test_every_kind_of_file_gives_the_same_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK", 700)
    for path in packed(tmp_path):
        assert read(path) == (LINES if ".tsv" in path.name else TEXTS), path.name


@pytest.mark.skipif(os.name == "nt", reason="no file of Windows has a ? in its name")
def test_a_question_mark_in_the_name_of_a_file_is_a_letter(tmp_path, capsys):
    for path in packed(tmp_path):
        path = path.rename(tmp_path / f"is this a.txt? {path.name}")
        assert read(path) == (LINES if ".tsv" in path.name else TEXTS), path.name
        assert read(f"{path}#text") == read(path)
    found = locate(str(tmp_path))
    assert len(found.files) == 13 and not found.left_out
    inspect.show(str(tmp_path), None, 0, 1)
    assert "13 files" in capsys.readouterr().out


def test_a_file_cut_in_the_middle_is_named(tmp_path):
    for path in packed(tmp_path):
        if path.suffix not in (".jsonl", ".ndjson", ".tsv") and path.name != "lines.json":
            path.write_bytes(path.read_bytes()[:-9])
            assert path.name in complaint(path)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            assert path.name in complaint(path)
    assert "cut short" in complaint(tmp_path / "a.json.gz")
    assert "cut short" in complaint(tmp_path / "a.jsonl.zst")


def test_a_zstandard_frame_cut_between_two_lines_is_noticed(tmp_path):
    frame = zstandard.ZstdCompressor().compressobj()
    data = frame.compress(JSON) + frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)  # whole lines, but no end of frame
    assert "cut short" in complaint(write(tmp_path / "a.jsonl.zst", data))


def test_garbage_is_named(tmp_path):
    for name in ("a.json.gz", "a.jsonl.zst", "a.parquet"):
        assert name in complaint(write(tmp_path / name, b"this is not packed at all" * 100))
        assert f"{name} is empty" in complaint(write(tmp_path / name, b""))


def test_a_bad_line_is_named_with_its_number(tmp_path):
    path = tmp_path / "a.jsonl"
    good = b'{"text": "fine"}\n'
    for bad, expected in {
        b'{"text": "cut': "line 3 is not valid JSON",
        b'{"url": "x", "id": 1}': "line 3 has no text column 'text'; it has: url, id; name one: SRC#column",
        b'["text"]': "line 3 is not a JSON object",
        b'{"text": 7}': "line 3: 'text' must be text, not int",
        b'{"text": "caf\xe9"}': "line 3 is not UTF-8 text (byte 13 of the line)",
    }.items():
        said = complaint(write(path, good * 2 + bad + b"\n" + good))
        assert f"{path}, {expected}" in said


def test_lone_surrogates_null_and_blank_lines_are_no_fault(tmp_path):
    data = b'{"text": "a\\ud800b"}\n\n{"text": null}\n{"text": "  "}\r\n{"text": "\\ud83d\\ude00"}'
    assert read(write(tmp_path / "a.jsonl", data)) == ["a\ufffdb", "😀"]


def test_a_table_without_a_text_column_says_what_it_has(tmp_path):
    said = complaint(table(tmp_path / "a.parquet", column="words"))
    assert "no text column 'text'; it has: id, words; name one: SRC#column" in said
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "b.parquet")
    assert "'text' must be text, not int" in complaint(tmp_path / "b.parquet")


@pytest.mark.parametrize("column", ["content", "document", "body", "article"])
def test_a_column_of_another_usual_name_is_found(tmp_path, column):
    assert read(table(tmp_path / "a.parquet", column=column)) == TEXTS
    lines = "".join(json.dumps({"zzz": 1, column: text}) + "\n" for text in TEXTS)
    assert read(write(tmp_path / "a.jsonl", lines.encode())) == TEXTS


def test_a_table_of_books_is_read_book_by_book(tmp_path):
    books = [f"{number} {'a very long book ' * 2**16}" for number in range(40)]
    path = tmp_path / "books.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": books}), path, use_dictionary=False, write_batch_size=1)
    source = locate(str(path))
    before, most, found = pyarrow.total_allocated_bytes(), 0, []
    for document in Reader(source, []).read_file(source.files[0]):
        most = max(most, pyarrow.total_allocated_bytes() - before)
        found.append(document.text)
    assert found == books
    assert most < 8 * len(books[0])


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abab\nsize 123456789\n"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.csv"])
def test_a_git_lfs_pointer_is_no_text(tmp_path, name):
    said = complaint(write(tmp_path / name, POINTER))
    assert f"{name} is only a Git LFS pointer" in said and "git lfs pull" in said


@pytest.mark.parametrize("page", [b"<!DOCTYPE html>\n<p>text", b"\xef\xbb\xbf \n<html lang='en'><p>text"])
def test_a_page_is_no_text(tmp_path, page):
    for name in ("a.txt", "a.md", "a.jsonl", "a.csv"):
        assert f"{name} is a web page" in complaint(write(tmp_path / name, page))
    assert read(write(tmp_path / "b.txt", b"Of <html> and its friends.")) == ["Of <html> and its friends."]


def test_a_page_on_the_web_is_refused_at_once(tmp_path):
    write(tmp_path / "a.txt", b"no doctype here")
    write(tmp_path / "b.jsonl.gz", b"<!doctype html>a login page")
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def guess_type(self, path):
            asked.append(path)
            return "text/html; charset=utf-8"

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        assert "a.txt is a web page (text/html)" in complaint(f"{root}/a.txt")
        assert "b.jsonl.gz is a web page" in complaint(f"{root}/b.jsonl.gz")
        server.shutdown()
    assert len(asked) == 4  # a look and a download of each


def test_a_file_packed_in_secret_is_named_with_the_way_out(tmp_path):
    secret = gzip.compress(JSON)
    for name, way in (("a.jsonl", "rename it to a.jsonl.gz"), ("a.parquet", "unpack it first")):
        said = complaint(write(tmp_path / name, secret))
        assert f"{name} is packed by gzip" in said and way in said
    said = complaint(write(tmp_path / "b.jsonl", zstandard.compress(JSON)))
    assert "is packed by zstd" in said and "rename it to b.jsonl.zst" in said
    assert "packed by zip, though its name does not say so; unpack it first" in complaint(
        write(tmp_path / "a.txt", b"PK\x03\x04")
    )


def test_a_zstandard_window_that_is_too_large_is_said(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    said = complaint(write(tmp_path / "a.jsonl.zst", packer.compress(JSON) + packer.flush()))
    assert "a window above 128 MB" in said and "zstd -d --long=31" in said and "damaged" not in said


def test_lines_that_end_in_carriage_returns_are_said(tmp_path):
    assert "row 1: a carriage return ends a line" in complaint(write(tmp_path / "a.csv", b"id,text\r1,a\r2,b\r"))


def test_an_empty_text_beside_a_full_column_gives_the_full_one(tmp_path):
    rows = [{"text": "", "content": "one"}, {"text": "two", "content": "x"}, {"text": None, "content": "three"}]
    whole = ["one", "two", "three"]
    assert read(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)).encode())) == whole
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == whole
    assert read(write(tmp_path / "a.csv", b"text,content\n,one\ntwo,x\n ,three\n")) == whole
    assert read(f"{tmp_path}/a.parquet#text") == ["two"]


def test_text_comes_first_and_a_named_column_wins(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"body": "x", "article": "y", "text": "z", "my own": "w"}\n')
    assert [read(f"{path}{end}") for end in ("", "#body", "#my own")] == [["z"], ["x"], ["w"]]
    assert read(f"{table(tmp_path / 'deep.parquet', column='a.b')}#a.b") == TEXTS
    said = complaint(f"{path}#title")
    assert f"{path}, line 1 has no text column 'title'; it has: body, article, text, my own; name one" in said


def test_a_row_without_the_outer_field_of_a_column_is_blank_in_every_form(tmp_path):
    rows = [{"a": None}, {"a": {"b": "one"}}, {"a": {"b": None}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)).encode())
    write(tmp_path / "a.json", json.dumps(rows).encode())
    for ending in ("parquet", "jsonl", "json"):
        assert read(f"{tmp_path}/a.{ending}#a.b") == ["one"]


@given(st.lists(st.text(alphabet='ab,"\t\n\ré€😀', min_size=1).filter(str.strip)))
def test_a_csv_field_comes_through_whole(tmp_path_factory, texts):
    path = tmp_path_factory.getbasetemp() / "a.csv"
    assert read(write(path, sheet(texts))) == texts


@given(st.lists(st.text(alphabet="ab,\"' é€😀", min_size=1).filter(str.strip)))
def test_a_tsv_field_comes_through_whole_and_its_quotes_are_text(tmp_path_factory, texts):
    path = tmp_path_factory.getbasetemp() / "a.tsv"
    assert read(write(path, tabbed(texts))) == texts


def test_every_row_of_a_tsv_is_a_document_whatever_its_quotes(tmp_path):
    rows = [f"row {number} is here" for number in range(40)]
    rows[5], rows[9], rows[20] = '"opened and never closed', 'closed late" and on', '"quoted" at its start'
    assert read(write(tmp_path / "a.tsv", tabbed(rows))) == rows
    said = complaint(write(tmp_path / "b.tsv", b'id\ttext\n1\t"two\nlines"\n'))
    assert "row 3 has 1 fields, but the header names 2; tsv has no quoting" in said


def test_a_csv_field_may_be_long_and_its_column_named(tmp_path):
    long = "a long text " * 100_000
    path = write(tmp_path / "a.csv", sheet([long], column="my own"))
    assert read(f"{path}#my own") == [long] and read(f"{path}#id") == ["0"]


def test_a_bad_csv_row_is_named_with_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "FIELD", 1000)
    path = tmp_path / "a.csv"
    good = b'id,text\n1,"two\nlines"\n'
    for bad, expected in {
        b"": " has no header",
        b"\n1,2\n": " has no header",
        b"id,words\n1,x\n": ", row 1 has no text column 'text'; it has: id, words; name one: SRC#column",
        good + b"2,caf\xe9\n": ", row 3 is not UTF-8 text (byte 5 of the line); convert it to UTF-8",
        good + b"2,a\0b\n": ", row 3 holds NUL bytes",
        good + b'2,"cut here\n\nand': ", row 3: a quoted field is never closed; is the file cut?",
        good + b'2,"' + b"long\n" * 500: ", row 3: field larger than field limit",
        good + b'2,"a" b\n': ", row 3: ',' expected after '\"'",
        good + b"2,a,b\n": ", row 3 has 3 fields, but the header names 2",
        good + b"2\n": ", row 3 has 1 fields, but the header names 2",
    }.items():
        assert f"{path}{expected}" in complaint(write(path, bad))


@pytest.mark.parametrize("block", [1, 7, 2**18])
def test_text_that_is_not_utf8_is_named_with_its_offset(tmp_path, monkeypatch, block):
    monkeypatch.setattr(readers, "BLOCK", block)
    path = tmp_path / "latin.txt"
    for data, offset in ((b"plain caf\xe9 au lait", 9), ("é".encode() * 50 + b"\xff", 100), (b"abc\xc3", 3)):
        said = complaint(write(path, data))
        assert f"{path} is not UTF-8 text (byte {offset})" in said and "convert it to UTF-8" in said


@given(st.text(alphabet="ab \n\ré€😀", max_size=400), st.integers(1, 50), st.integers(1, 60))
def test_pieces_of_a_text_joined_are_the_text(text, most, block):
    pieces = list(plain._pieces(iter([text[at : at + block] for at in range(0, len(text), block)]), most))
    assert "".join(pieces) == text and max(map(len, pieces)) <= most
    assert pieces == list(plain._pieces(iter([text]), most))


def test_a_single_novel_becomes_many_documents_cut_at_blank_lines(tmp_path):
    novel = "".join(f"Chapter {number}. {'It was a dark night. ' * 20}\n\n" for number in range(300))
    texts = read(write(tmp_path / "novel.txt", b"\xef\xbb\xbf" + novel.encode()))
    assert "".join(texts) == novel
    assert 20 < len(texts) < 200 and all(text.endswith("\n\n") for text in texts)


def test_a_bad_item_of_a_json_file_is_named_with_its_number(tmp_path):
    path, good = tmp_path / "a.json", '{"text": "fine"}'
    for content, expected in {
        f'[{good}, {{"text": }}]': ", item 2 is not valid JSON",
        f'[{good}, {{"text": "cut': ", item 2 is not valid JSON",
        f"[{good},{good}": "the array has no end",
        f'[{good}, {{"text": 7}}]': ", item 2: 'text' must be text, not int",
        f"[{good}, 7]": ", item 2 is not a JSON object",
        f"{good}\n{good} x": ", item 3 is not valid JSON",
        f'{good}\n{{"text": {"[" * 100_000}': ", item 2 is not valid JSON",
        f"[{good}] garbage": ", item 2 is not valid JSON",
        f"[{good}]]": ", item 2 is not valid JSON",
        f"[{good}]\n[{good}": "the array has no end",
    }.items():
        assert expected in complaint(write(path, content.encode()))
    assert read(write(path, f"[ {good} ,\n{good}]\n".encode())) == ["fine", "fine"]
    assert read(write(path, f"{good}{good}".encode())) == ["fine", "fine"]


@pytest.mark.parametrize("block", [1, 7, 2**20])
def test_arrays_that_follow_one_another_are_read_to_the_last(tmp_path, monkeypatch, block):
    monkeypatch.setattr(plain, "BLOCK", block)
    monkeypatch.setattr(unpacked, "BLOCK", block)
    texts = iter(TEXTS)
    arrays = [[{"text": next(texts)} for _ in range(number)] for number in (1, 0, 3, 2)]
    for between in ("", " ", "\n\n"):
        path = write(tmp_path / "a.json", between.join(map(json.dumps, arrays)).encode())
        assert read(path) == TEXTS[:6]
    assert read(write(path, (json.dumps(arrays[0]) + '{"text": "behind"}').encode())) == [TEXTS[0], "behind"]


def test_a_json_value_costs_no_copy_of_what_follows_it(tmp_path, monkeypatch):
    seen = []

    class Decoder(json.JSONDecoder):
        def raw_decode(self, text, *at):
            seen.append(text)
            return super().raw_decode(text, *at)

    monkeypatch.setattr(json, "JSONDecoder", Decoder)
    assert read(write(tmp_path / "a.json", json.dumps([{"text": text} for text in TEXTS]).encode())) == TEXTS
    assert len(seen) == len(TEXTS) and len({id(text) for text in seen}) == 1


def test_text_of_other_endings_is_read(tmp_path):
    novel = "".join(f"Chapter {number}. {'It was a dark night. ' * 20}\n\n" for number in range(300))
    for name, data in {"a.text": novel.encode(), "a.txt.gz": gzip.compress(novel.encode())}.items():
        assert "".join(read(write(tmp_path / name, data))) == novel


def test_a_page_gives_its_main_text(tmp_path, monkeypatch):
    body = "".join(f"<p>Paragraph {number} of the café tells a story of its own.</p>" for number in range(20))
    page = f"<html><title>t</title><body><nav><a href=x>Menu</a></nav><main>{body}</main></body></html>"
    path = write(tmp_path / "a.html", page.encode())
    (text,) = read(path)
    assert "Paragraph 7 of the café" in text and "<p>" not in text and "Menu" not in text
    write(tmp_path / "b.txt", b"text")
    assert set(locate(str(tmp_path)).files) == {"a.html", "b.txt"}
    for room in (sources, walk):
        monkeypatch.setattr(room, "can_read_pages", lambda: False)
    assert locate(str(tmp_path)).left_out == ((".html (needs khanhllm[web])", 1),)
    with pytest.raises(UserError, match=r"pip install 'khanhllm\[web\]'"):
        locate(str(path))


def test_files_of_a_folder_stay_whole(tmp_path):
    for number in range(100):
        write(tmp_path / f"{number}.txt", f"file {number}\n\n".encode() * 100)
    assert len(read(tmp_path)) == 100


def test_the_standard_library_reads_without_a_fault():
    found = locate("stdlib")
    reader = Reader(found, [])
    assert any(True for name in found.files[:200] for _ in reader.read_file(name))


def test_the_web_is_read_from_front_to_back(tmp_path):
    packed(tmp_path)
    write(tmp_path / "novel.txt", b"A line.\n\n" * 700_000)  # larger than one block of a ranged read
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), quiet_handler(tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        for name in ("a.jsonl", "a.json.gz", "a.jsonl.zst"):
            assert read(f"{root}/{name}") == TEXTS
        assert "".join(read(f"{root}/novel.txt?download=true")) == "A line.\n\n" * 700_000
        assert "404" in complaint(f"{root}/missing.jsonl")
        server.shutdown()


def quiet_handler(folder):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    return functools.partial(Handler, directory=str(folder))


def test_a_field_inside_a_column_is_named_with_dots_and_an_exact_name_comes_first(tmp_path):
    texts = ["one", "two", None]
    rows = [{"id": 1, "doc": {"meta": {"text": text}, "n": 3}} for text in texts]
    write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    write(tmp_path / "a.json", json.dumps(rows).encode())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows, {"id": 2, "doc": None}]), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.parquet"):
        assert read(f"{tmp_path / name}#doc.meta.text") == ["one", "two"]
        for wrong in ("doc.text", "doc.meta.text.more", "other.text"):
            assert "has no text column" in complaint(f"{tmp_path / name}#{wrong}")
        assert "must be text, not int" in complaint(f"{tmp_path / name}#doc.n")
    both = {"doc.text": "exact", "doc": {"text": "inside"}}
    write(tmp_path / "b.jsonl", json.dumps(both).encode())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([both]), tmp_path / "b.parquet")
    for name in ("b.jsonl", "b.parquet"):
        assert read(f"{tmp_path / name}#doc.text") == ["exact"]


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary()])
def test_text_in_a_binary_column_is_read(tmp_path, kind):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(["für".encode(), None, b"x"], kind)}), path)
    assert read(path) == ["für", "x"]
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([b"ok", b"caf\xe9"], kind)}), path)
    assert f"{path}, row 2 is not UTF-8 text (byte 3 of the cell)" in complaint(path)
