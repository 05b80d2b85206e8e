"""Laws of plain text: marks part documents, other text is cut and nothing of it is lost, UTF-16 with a mark is read."""

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_readers import complaint, read, write

from khanhllm.data import plain, readers

STORIES = [f"Once upon a time, number {number}.\n\n" + "They went on and on.\n" * number for number in range(120)]


@pytest.mark.parametrize("mark", ["<|endoftext|>\n", "  <|endoftext|> \t\r\n", "\n<|endoftext|>\n\n"])
def test_lines_of_end_of_text_part_a_file_into_its_documents(tmp_path, monkeypatch, mark):
    monkeypatch.setattr(readers, "BLOCK", 7)
    path = write(tmp_path / "stories.txt", (mark.join(STORIES) + mark).encode())
    assert read(path) == [story.strip("\n") for story in STORIES]  # whole, though a file of this size is cut at 2 KiB
    assert read(write(tmp_path / "packed.txt.gz", gzip.compress(path.read_bytes()))) == read(path)


def test_a_mark_inside_a_line_is_text(tmp_path):
    text = 'END_OF_TEXT = "<|endoftext|>"\nThe end.<|endoftext|>Next\n'
    assert read(write(tmp_path / "a.py", text.encode())) == [text]


@given(st.lists(st.sampled_from(["<|endoftext|>", "a", " b", ""])), st.integers(1, 30))
def test_how_a_stream_is_cut_does_not_matter(lines, block):
    text = "\n".join(lines)
    parts = "\n".join("\0" if line == "<|endoftext|>" else line for line in lines).split("\0")
    expected = [part.strip("\r\n") for part in parts if part.strip()]
    found = plain.documents(iter([text[at : at + block] for at in range(0, len(text), block)]), 10**6)
    if "<|endoftext|>" in lines:
        assert list(found) == expected
    else:
        assert list(found) == [text]


def test_a_first_mark_far_into_a_file_parts_it_too(tmp_path):
    tale = "They went on and on.\n" * 100_000
    path = write(tmp_path / "a.txt", f"{tale}<|endoftext|>\nThe next.\n".encode())
    assert read(path) == [tale.strip("\n"), "The next."]


def test_a_document_between_marks_has_a_limit(monkeypatch):
    monkeypatch.setattr(plain, "LONGEST", 100)
    text = "a\n<|endoftext|>\n" + "word " * 1_000
    found = list(plain.documents(iter([text]), 10))
    assert found[0] == "a" and max(map(len, found)) <= 100 and "".join(found[1:]) == "word " * 1_000


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_with_a_mark_is_read(tmp_path, monkeypatch, encoding):
    monkeypatch.setattr(readers, "BLOCK", 5)  # cuts characters in two
    text = "Zwölf 😀 Boxkämpfer\nlaufen."
    mark = "" if encoding == "utf-16" else "\ufeff"
    assert read(write(tmp_path / "a.txt", (mark + text).encode(encoding))) == [text]
    assert read(write(tmp_path / "a.csv", (mark + 'id,text\r\n1,"' + text + '"\r\n').encode(encoding))) == [text]
    lines = mark + '{"text": "Zwölf"}\n{"text": "😀"}\n'
    assert read(write(tmp_path / "a.jsonl", lines.encode(encoding))) == ["Zwölf", "😀"]
    assert read(write(tmp_path / "a.json", ("" + lines).encode(encoding))) == ["Zwölf", "😀"]


def test_what_only_looks_like_utf_16_is_named(tmp_path):
    for data in (b"\xff\xfea", b"\xff\xfe\x00\xd8a\x00"):
        said = complaint(write(tmp_path / "odd.txt", data))
        assert "odd.txt" in said and "UTF-16" in said
    assert "NUL" in complaint(write(tmp_path / "no_mark.txt", "abc".encode("utf-16-le")))
