"""A look at text and at shards: what a person sees on a pipe, and wrong input of every kind as one line."""

import gzip
import io
import json
import os
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from rich.console import Console

from khanhllm import cli
from khanhllm.chaos.server import FaultyServer
from khanhllm.data import inspect
from khanhllm.data.prepare import prepare
from khanhllm.data.tokenizer import Tokenizer, train_tokenizer
from khanhllm.errors import UserError

SENTENCE = "The quick brown fox jumps over the lazy dog. Con cáo nâu nhảy qua con chó lười.\n"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("look") / "texts"
    (folder / "deep").mkdir(parents=True)
    records = [{"text": f"{number} {SENTENCE * (number + 1)}"} for number in range(20)] + [{"text": "  "}] * 3
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    (folder / "deep" / "note.txt").write_text("\x1b[31m" + SENTENCE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(texts):
    train_tokenizer([SENTENCE * 20], 330).save(texts.parent / "tokenizer.json")
    return texts.parent / "tokenizer.json"


@pytest.fixture
def shards(texts, tokenizer, tmp_path):
    prepare(str(texts), Tokenizer.load(tokenizer), tmp_path / "shards", validation=0.2, workers=1)
    return tmp_path / "shards"


def seen(capsys, *words: object) -> str:
    assert cli.main(["data", *map(str, words)]) == 0
    return capsys.readouterr().out


def refused(capsys, *words: object) -> tuple[str, str]:
    """What was printed, and the one line of the refusal."""
    assert cli.main(["data", *map(str, words)]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("khanhllm: ")
    assert error.count("\n") == 1
    return out, error


def test_text_is_shown_with_its_tokens(texts, tokenizer, capsys):
    out = seen(capsys, "show", texts, "--tokenizer", tokenizer, "--documents", "30")
    assert f"{texts}: 2 files" in out
    assert "│ quick│ brown│ fox│" in out
    assert ".│↵\n" in out
    assert "\x1b" not in out
    assert "tokens · " in out
    assert "tokens of a document, from" in out
    assert "bytes of a token" in out
    assert "deep/ │" in out
    assert "rejected: 3 blank documents, 0 unreadable files" in out


def test_joined_tokens_are_the_text(texts, tokenizer, capsys):
    out = seen(capsys, "show", texts / "deep" / "note.txt", "--tokenizer", tokenizer, "--documents", "1")
    assert SENTENCE.strip() in out.replace("│", "")
    assert "\\x1b" in out.replace("│", "")


def test_without_a_tokenizer_the_way_to_boundaries_is_told(texts, capsys):
    out = seen(capsys, "show", texts, "--documents", "1")
    assert "│ quick" not in out
    assert "bytes of a document, from" in out
    assert "--tokenizer FILE" in out


def test_a_terminal_gets_colours_instead_of_bars(tokenizer):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="truecolor", no_color=False, soft_wrap=True)
    inspect._print(console, 1, inspect._sample_doc(SENTENCE, "here", Tokenizer.load(tokenizer)))
    assert "\x1b[" in screen.getvalue()
    assert "│" not in screen.getvalue()


def test_shards_are_read_back(shards, capsys):
    out = seen(capsys, "show", shards, "--documents", "2")
    manifest = json.loads((shards / "manifest.json").read_text())
    documents = sum(shard["documents"] for shard in manifest["shards"] if shard["split"] == "train")
    assert f"measured: {documents} documents" in out
    assert f"{manifest['train_tokens']:,}" in out
    assert "│ quick│ brown│ fox│" in out


def test_what_is_shown_is_downloaded_once(texts, tmp_path, capsys):
    (tmp_path / "chats.jsonl").write_text('{"question": "2 + 3?", "answer": "5"}\n')
    (tmp_path / "lines.jsonl").write_bytes((texts / "lines.jsonl").read_bytes())
    for name in ("chats.jsonl", "lines.jsonl"):
        with FaultyServer(tmp_path) as server:
            assert "document 1" in seen(capsys, "show", f"{server.url}/{name}")
        assert len(server.log) == 2  # one of them asks whether it is there


def test_sizes_of_documents_are_those_of_the_manifest(shards):
    manifest = inspect.Manifest.read(shards)
    tokenizer = inspect._own_tokenizer(shards, manifest)
    for shard in manifest.shards:
        documents = list(inspect._documents(shards, shard, manifest, tokenizer))
        assert len(documents) == shard.documents
        assert sum(document.size for document in documents) == shard.bytes
        assert sum(document.tokens + 1 for document in documents) == shard.tokens


@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_blocks_change_no_document(monkeypatch, block):
    monkeypatch.setattr(inspect, "BLOCK", block)
    assert list(inspect._spans(np.array([0, 5, 6, 0, 7, 0, 0, 8, 9]), 0)) == [(1, 3), (4, 5), (7, 9)]


def test_files_that_cannot_be_read_are_listed_and_the_rest_goes_on(texts, tmp_path, capsys):
    (tmp_path / "good.txt").write_text(SENTENCE)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 ")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(os.urandom(2000))[:100])
    out = seen(capsys, "show", tmp_path)
    assert "2 unreadable files" in out
    assert "latin.txt is not UTF-8" in out
    assert "cut.jsonl.gz is cut short" in out
    assert "The quick brown fox" in out


def test_what_is_left_out_is_said(texts, tmp_path, capsys):
    assert "left out" not in seen(capsys, "show", texts)
    (tmp_path / "good.txt").write_text(SENTENCE)
    (tmp_path / "picture.png").write_bytes(b"x")
    assert f"left out of {tmp_path}: 1 .png\n" in seen(capsys, "show", tmp_path)


def test_a_huge_line_takes_no_long_time(tokenizer, tmp_path, capsys):
    (tmp_path / "line.jsonl").write_text(json.dumps({"text": SENTENCE.strip() * 500_000}))
    started = time.monotonic()
    out = seen(capsys, "show", tmp_path, "--tokenizer", tokenizer)
    assert "about " in out
    assert time.monotonic() - started < 10


def test_whole_shards_are_verified(shards, capsys):
    out = seen(capsys, "verify", shards)
    manifest = json.loads((shards / "manifest.json").read_text())
    tokens = manifest["train_tokens"] + manifest["validation_tokens"]
    assert out == f"{len(manifest['shards'])} shards, {tokens:,} tokens: every hash is right\n"


def test_every_damaged_and_missing_file_is_named(shards, capsys):
    ids = np.fromfile(shards / "train-00000.bin", dtype="<u2")
    ids[7] ^= 1
    ids.tofile(shards / "train-00000.bin")
    (shards / "validation-00000.bin").unlink()
    (shards / "tokenizer.json").write_text("{}")
    out, line = refused(capsys, "verify", shards)
    assert len(out.splitlines()) == 3
    for name in ("train-00000.bin is damaged", "cannot read", "validation-00000.bin", "tokenizer.json"):
        assert name in out
    assert "3 of 3 files damaged or missing" in line
    assert "train-00000.bin" in line


def test_a_shard_that_is_cut_short_is_a_fault_of_the_show(shards, capsys):
    shard = shards / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    out, line = refused(capsys, "show", shards)
    assert "1 unreadable shard" in out
    assert "cut short" in line


def wrong(place: Path) -> dict[str, list[object]]:
    (place / "empty").mkdir()
    (place / "bad.jsonl.gz").write_bytes(b"this was never packed")
    (place / "text.txt").write_text(SENTENCE)
    (place / "odd").mkdir()
    (place / "odd" / "manifest.json").write_text("{")
    (place / "blank.txt").write_text(" \n ")
    return {
        "missing": ["show", place / "nowhere"],
        "nobody": ["show", "~nobody-here/texts"],
        "empty": ["show", place / "empty"],
        "bad gzip": ["show", place / "bad.jsonl.gz"],
        "blank": ["show", place / "blank.txt"],
        "odd": ["show", place / "odd"],
        "tokenizer": ["show", place / "text.txt", "--tokenizer", place / "text.txt"],
        "no tokenizer": ["show", place / "text.txt", "--tokenizer", place / "nowhere"],
        "count": ["show", place / "text.txt", "--sample", "0"],
        "not shards": ["verify", place / "empty"],
        "a file": ["verify", place / "text.txt"],
        "nowhere": ["verify", place / "nowhere"],
        "odd shards": ["verify", place / "odd"],
        "verify takes none": ["verify", place / "empty", "--tokenizer", "x"],
    }


def test_wrong_input_is_one_line(tmp_path, capsys):
    for words in wrong(tmp_path).values():
        _, line = refused(capsys, *words)
        assert "unforeseen" not in line


def test_any_number_of_documents_may_be_asked_for(texts, capsys):
    assert "measured: " in seen(capsys, "show", texts, "--documents", "0", "--sample", "1e30")


def test_shards_have_their_own_tokenizer(shards, tokenizer, capsys):
    assert "own tokenizer" in refused(capsys, "show", shards, "--tokenizer", tokenizer)[1]


@pytest.mark.parametrize("words", [["shaw", "x"], ["show"], ["show", "x", "--documents", "many"], ["show", "x", "--b"]])
def test_wrong_words_are_one_line(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["data", *words])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_blank_rows_of_a_table_are_counted(tmp_path, capsys):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": [SENTENCE, "", None]}), tmp_path / "rows.parquet")
    out = seen(capsys, "show", tmp_path)
    assert "1 file," in out
    assert "measured: 1 document\n" in out
    assert "2 blank documents, 0 unreadable files" in out


def test_conversations_show_what_counts(tmp_path, capsys):
    record = {"question": "one?", "answer": "two!", "system": "sun"}
    (tmp_path / "chats.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    inspect.show(str(tmp_path / "chats.jsonl"), None, 3, 100)
    assert "<|system|>sun<|user|>one?<|assistant|>«two!<|end|>»\n" in capsys.readouterr().out
    tokenizer = train_tokenizer(["one? two!"], 270)
    tokenizer.save(tmp_path / "tokenizer.json")
    inspect.show(str(tmp_path / "chats.jsonl"), str(tmp_path / "tokenizer.json"), 3, 100)
    shown = capsys.readouterr().out
    assert "<|endoftext|>│<|system|>│" in shown and "│<|assistant|>«" in shown and "│<|end|>»\n" in shown
    (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": [{"role": "x"}]}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"no document that can be read: .*line 1, message 1 is by 'x'"):
        inspect.show(str(tmp_path / "bad.jsonl"), None, 3, 100)


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(
    ("record", "column"),
    [
        ({"body": "One text."}, "#body"),
        ({"doc": {"text": "One text."}}, "#doc.text"),
        ({"text": "One text.", "label": False}, ""),
        ({"text": "One text.", "messages": 7}, ""),
    ],
)
def test_texts_are_told_from_conversations(tmp_path, capsys, record, column, form):
    path = tmp_path / f"a.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), path)
    else:
        path.write_text(json.dumps(record), encoding="utf-8")
    inspect.show(f"{path}{column}", None, 3, 100)
    out = capsys.readouterr().out
    assert "One text." in out and "conversations" not in out
