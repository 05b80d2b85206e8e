"""Laws of preparation: the source alone decides the shards, nothing is lost, both splits live, all or nothing."""

import errno
import gzip
import json
import os
import shutil
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from words import TOKENIZER, lines, text

from khanhllm.data import prepare as module
from khanhllm.data.ensure import ensure
from khanhllm.data.prepare import prepare, train_on
from khanhllm.data.readers import Reader
from khanhllm.data.shards import Manifest, Shards
from khanhllm.data.sources import Source, locate
from khanhllm.data.tokenizer import train_tokenizer
from khanhllm.errors import UserError
from khanhllm.schema import DataConfig


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for part in range(6):
        content = lines(text(part * 100 + line) for line in range(100))
        (folder / f"{part}.json.gz").write_bytes(gzip.compress(content.encode()))
    return folder


@pytest.fixture
def small_groups(monkeypatch):
    """Each file a task of its own."""
    whole = Source.groups
    monkeypatch.setattr(Source, "groups", lambda self: whole(self, least=1))


def documents(folder, split):
    manifest = Manifest.read(folder)
    for shard in manifest.of(split):
        ids = np.fromfile(folder / shard.file, dtype=manifest.dtype)
        assert ids[0] == TOKENIZER.end_of_text
        starts = [*np.flatnonzero(ids == TOKENIZER.end_of_text), len(ids)]
        texts = [TOKENIZER.decode(ids[a + 1 : b]) for a, b in pairwise(starts)]
        assert (len(texts), sum(len(found.encode()) for found in texts)) == (shard.documents, shard.bytes)
        yield from texts


def test_every_document_is_there_exactly_once(corpus, tmp_path, small_groups):
    manifest = prepare(str(corpus), TOKENIZER, tmp_path / "out", validation=0.1, workers=1)
    found = [*documents(tmp_path / "out", "train"), *documents(tmp_path / "out", "validation")]
    assert sorted(found) == sorted(text(number) for number in range(600))
    assert 20 < len(list(documents(tmp_path / "out", "validation"))) < 120
    assert manifest == Manifest.read(tmp_path / "out") and manifest.dtype == "uint16"
    assert manifest.train_tokens == Shards.open(tmp_path / "out", "train", 8).tokens


def test_the_number_of_workers_does_not_show(corpus, tmp_path, small_groups):
    few = corpus / locate(str(corpus)).files[0]  # so few that the next wave is larger than it need be
    few.write_bytes(gzip.compress(json.dumps({"text": text(1000)}).encode()))
    for tokens in (0, 9000):
        manifests = [
            prepare(
                str(corpus), TOKENIZER, tmp_path / f"{tokens}-{workers}", validation=0.1, tokens=tokens, workers=workers
            )
            for workers in (1, 3)
        ]
        assert manifests[0] == manifests[1]
        for folder in (tmp_path / f"{tokens}-1", tmp_path / f"{tokens}-3"):
            Shards.open(folder, "train", 8).verify()
            on_disk = {path.name for path in folder.glob("*.bin")}
            assert on_disk == {shard.file for shard in manifests[0].shards}


def test_no_more_is_read_than_needed(corpus, tmp_path, small_groups, monkeypatch):
    opened = []
    read = Reader.read_file
    monkeypatch.setattr(Reader, "read_file", lambda self, name: (opened.append(name), read(self, name))[1])
    whole = prepare(str(corpus), TOKENIZER, tmp_path / "whole", validation=0.1, workers=1)
    assert len(opened) == 6
    opened.clear()
    need = whole.train_tokens // 3
    part = prepare(str(corpus), TOKENIZER, tmp_path / "part", validation=0.1, tokens=need, workers=1)
    assert need <= part.train_tokens < 2 * need and len(opened) in (2, 3)
    prefix = list(documents(tmp_path / "whole", "train"))
    assert list(documents(tmp_path / "part", "train")) == prefix[: len(list(documents(tmp_path / "part", "train")))]


def test_one_huge_file_is_left_early(tmp_path):
    path = tmp_path / "huge.jsonl"
    path.write_text(lines(text(number) for number in range(12_000)) + "not json", "utf-8")
    part = prepare(str(path), TOKENIZER, tmp_path / "part", validation=0.1, tokens=1000, workers=1)
    assert 1000 <= part.train_tokens < 1200


def test_copies_of_a_text_never_straddle(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(text(number % 50) for number in range(500)), encoding="utf-8")
    prepare(str(tmp_path / "a.jsonl"), TOKENIZER, tmp_path / "out", validation=0.3)
    kept, held = (set(documents(tmp_path / "out", split)) for split in ("train", "validation"))
    assert kept and held and not kept & held


@pytest.mark.parametrize("validation", [1e-9, 0.499999])
@pytest.mark.parametrize("number", [2, 3])
def test_two_documents_are_enough_for_both_splits(tmp_path, validation, number):
    for seed in range(4):
        content = lines(text(seed * 10 + nth) for nth in range(number))
        (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
        manifest = prepare(str(tmp_path / "a.jsonl"), TOKENIZER, tmp_path / f"out{seed}", validation=validation)
        assert manifest.train_tokens and manifest.validation_tokens
        assert sum(shard.documents for shard in manifest.shards) == number


def test_a_held_out_share_far_from_the_one_asked_for_is_said(corpus, tmp_path, capfd):
    (tmp_path / "two.jsonl").write_text(lines([text(1, 20), text(2, 2000)]), encoding="utf-8")
    manifest = prepare(str(tmp_path / "two.jsonl"), TOKENIZER, tmp_path / "out", validation=0.01)
    held = sum(shard.bytes for shard in manifest.of("validation"))
    share = held / sum(shard.bytes for shard in manifest.shards)
    heard = " ".join(capfd.readouterr().err.split())
    assert f"held out for validation: {share:.1%} of the text, where data.validation asks for 1.0%" in heard
    assert "only 2 of them" in heard
    prepare(str(corpus), TOKENIZER, tmp_path / "fair", validation=0.1, workers=1)
    assert "held out for validation" not in capfd.readouterr().err


def test_what_is_left_out_is_said_once_each_time(corpus, tmp_path, capfd, monkeypatch):
    for name in ("a.png", "b.png", "settings.json"):
        (corpus / name).write_bytes(b"{}")
    said = f"left out of {corpus}: 2 .png, 1 .json without texts"

    def heard():
        return [line for line in capfd.readouterr().err.splitlines() if "left out" in line]

    prepare(str(corpus), TOKENIZER, tmp_path / "out", validation=0.1, workers=1)
    assert heard() == [said]
    for _ in range(2):
        ensure(settings(corpus, tmp_path), 300, 1000)
        assert heard() == [said]
    monkeypatch.setattr(module, "WHOLE", 100)
    for _ in range(2):
        ensure(settings(corpus, tmp_path), 300, 1000)
        assert heard() == [said]


def test_one_document_or_none_is_said(tmp_path):
    path = tmp_path / "a.jsonl"
    for content, said in (
        (lines(["only one"]), "one document"),
        (lines(["same"] * 9), "all 9 documents .* are the same text"),
        ("\n", "holds no text"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=said):
            prepare(str(path), TOKENIZER, tmp_path / "out", validation=0.1)
    with pytest.raises(UserError, match="holds no text"):
        train_on(str(path), 300, 1000)


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_is_one_line_and_the_same_call_goes_on_when_it_is_repaired(
    corpus, tmp_path, small_groups, capfd, workers
):
    bad = corpus / "3.json.gz"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"3\.json\.gz is cut short") as caught:
        prepare(str(corpus), TOKENIZER, tmp_path / "new" / "out", validation=0.1, workers=workers)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new" / "out").exists()
    heard = capfd.readouterr()
    assert "Traceback" not in heard.err and "INFO" not in heard.err and heard.out == ""
    bad.write_bytes(whole)
    again = prepare(str(corpus), TOKENIZER, tmp_path / "new" / "out", validation=0.1, workers=workers)
    assert again == prepare(str(corpus), TOKENIZER, tmp_path / "other", validation=0.1, workers=1)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_an_existing_folder_is_never_touched(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(UserError, match="exists already"):
        prepare(str(corpus), TOKENIZER, tmp_path / "out", validation=0.1)
    assert (tmp_path / "out" / "mine.txt").read_text(encoding="utf-8") == "precious"


def test_an_empty_folder_is_filled_also_where_a_rename_replaces_none(corpus, tmp_path, monkeypatch):
    rename = Path.rename

    def as_on_windows(path, target):
        if Path(target).exists():
            raise FileExistsError(errno.EEXIST, "File exists", str(target))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", as_on_windows)
    (tmp_path / "out").mkdir()
    made = prepare(str(corpus), TOKENIZER, tmp_path / "out", validation=0.1, workers=1)
    assert Manifest.read(tmp_path / "out") == made


def test_the_folder_one_is_in_is_refused_before_any_work(corpus, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = sorted(tmp_path.rglob("*"))
    for out in (Path(), tmp_path / "here"):
        with pytest.raises(UserError, match="is the folder that this command runs in; name a new one in it"):
            prepare(str(corpus), TOKENIZER, out, validation=0.1)
    assert sorted(tmp_path.rglob("*")) == before


def test_prepared_again_there_is_nothing_to_do_unless_something_changed(corpus, tmp_path, capsys):
    text = tmp_path / "text"
    shutil.copytree(corpus, text)
    made = prepare(str(text), TOKENIZER, tmp_path / "out", validation=0.1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert prepare(str(text), TOKENIZER, tmp_path / "out", validation=0.1) == made
    assert "prepared already" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="from other text or otherwise"):
        prepare(str(text), TOKENIZER, tmp_path / "out", validation=0.2)
    (text / "more.jsonl").write_text('{"text": "one more"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="from other text or otherwise"):
        prepare(str(text), TOKENIZER, tmp_path / "out", validation=0.1)


def test_the_sample_is_capped_spread_and_free_of_held_out_text(corpus):
    found = locate(str(corpus))
    sample = list(module._sample(Reader(found, []), 6000, 0.2, ""))
    assert 5900 < sum(len(part.encode()) for part in sample) <= 6000
    parts = {int(part.split()[0]) // 100 for part in sample if " " in part}
    assert parts == set(range(6))
    everything = list(module._sample(Reader(found, []), 10**9, 0.2, ""))
    assert 0.7 * 600 < len(everything) < 0.9 * 600


def settings(source, tmp_path, **more):
    return DataConfig(source=str(source), cache=str(tmp_path / "cache"), workers=1, validation=0.1, **more)


def test_ensure_prepares_once_and_again_only_when_something_changed(corpus, tmp_path, monkeypatch):
    made = []
    whole = module._make
    monkeypatch.setattr(module, "_make", lambda folder, *rest: (made.append(folder), whole(folder, *rest)))
    first = ensure(settings(corpus, tmp_path), 300, 1000)
    assert ensure(settings(corpus, tmp_path), 300, 999_999) == first and len(made) == 1
    assert ensure(settings(corpus, tmp_path), 301, 1000) != first
    assert ensure(settings(corpus, tmp_path, tokens=2000), 300, 1000) != first
    (corpus / "more.txt").write_text("another text", encoding="utf-8")
    assert ensure(settings(corpus, tmp_path), 300, 1000) != first
    assert len(made) == 4


def test_ensure_makes_a_belt_of_a_large_source(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WHOLE", 100)
    folder = ensure(settings(corpus, tmp_path), 300, 2000)
    assert (folder / "belt.json").exists() and Manifest.read(folder).train_tokens == 0
    assert ensure(settings(corpus, tmp_path), 300, 9999) == folder


def test_ensure_takes_prepared_shards_as_they_are_and_checks_the_tokenizer(corpus, tmp_path):
    out = tmp_path / "out"
    prepare(str(corpus), TOKENIZER, out, validation=0.1, workers=1)
    assert ensure(settings(out, tmp_path), 300, 1) == out
    assert ensure(settings(out, tmp_path, tokenizer=str(out / "tokenizer.json")), 300, 1) == out
    with pytest.raises(UserError, match=r"more than model\.vocab_size"):
        ensure(settings(out, tmp_path), TOKENIZER.vocab_size - 1, 1)
    other = tmp_path / "other.json"
    train_tokenizer(["something else entirely"], 270).save(other)
    with pytest.raises(UserError, match="does not match the shards"):
        ensure(settings(out, tmp_path, tokenizer=str(other)), 300, 1)
    (out / "tokenizer.json").write_bytes(other.read_bytes())
    with pytest.raises(UserError, match="does not match the shards"):
        ensure(settings(out, tmp_path), 300, 1)


def test_ensure_knows_the_home_of_shards_cache_and_tokenizer(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = ensure(settings(corpus, Path("~")), 300, 1000)
    assert made.parent == tmp_path / "cache"
    TOKENIZER.save(tmp_path / "given.json")
    given = ensure(settings(corpus, tmp_path, tokenizer="~/given.json"), 4000, 1)
    assert Manifest.read(given).tokenizer == TOKENIZER.sha256
    assert ensure(settings(f"~/cache/{made.name}", tmp_path), 300, 1000) == made


def test_ensure_uses_the_tokenizer_given(corpus, tmp_path):
    TOKENIZER.save(tmp_path / "given.json")
    folder = ensure(settings(corpus, tmp_path, tokenizer=str(tmp_path / "given.json")), 4000, 1)
    assert Manifest.read(folder).tokenizer == TOKENIZER.sha256
    with pytest.raises(UserError, match=r"more than model\.vocab_size 280"):
        ensure(settings(corpus, tmp_path, tokenizer=str(tmp_path / "given.json")), 280, 1)


def test_two_that_prepare_the_same_at_once_share_one_result(corpus, tmp_path, monkeypatch):
    made = []
    whole = module.prepare
    monkeypatch.setattr(module, "prepare", lambda *args, **more: (made.append(1), whole(*args, **more)))
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(ensure(settings(corpus, tmp_path), 300, 1))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 3 and len(made) == 1


@pytest.fixture
def partly_bad(tmp_path):
    """A folder of 30 files, of which three cannot be read."""
    folder = tmp_path / "partly"
    folder.mkdir()
    for number in range(27):
        (folder / f"{number}.txt").write_text(text(number), "utf-8")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "latin2.txt").write_bytes(b"\xe9")
    (folder / "cut.csv").write_bytes(b'id,text\n1,"never closed')
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_files_that_cannot_be_read_are_skipped_if_asked_and_counted(partly_bad, tmp_path, capsys, workers):
    with pytest.raises(UserError, match=r"latin|cut"):
        prepare(str(partly_bad), TOKENIZER, tmp_path / "refused", validation=0.2, workers=workers)
    manifest = prepare(str(partly_bad), TOKENIZER, tmp_path / "out", validation=0.2, workers=workers, bad="skip")
    assert manifest.skipped == {".txt": 2, ".csv": 1}
    assert "2 .txt, 1 .csv" in " ".join(capsys.readouterr().err.split())
    found = [*documents(tmp_path / "out", "train"), *documents(tmp_path / "out", "validation")]
    assert sorted(found) == sorted(text(number) for number in range(27))
    with pytest.raises(UserError, match=r"nothing of it can be read \(data.bad = skip\)"):
        train_on(str(partly_bad / "latin.txt"), 300, 10**6, bad="skip")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes among its files")
def test_what_is_no_file_of_text_at_all_is_skipped_too(partly_bad):
    whole = locate(str(partly_bad))
    (partly_bad / "empty.jsonl.gz").touch()
    (partly_bad / "gone.txt").symlink_to("nowhere")
    os.mkfifo(partly_bad / "pipe.txt")
    for place in (partly_bad, partly_bad / "empty.jsonl.gz"):
        with pytest.raises(UserError, match=r"empty|gone|pipe"):
            locate(str(place))
    skipping = locate(str(partly_bad), "skip")
    assert skipping.files == whole.files
    assert skipping.left_out_line().endswith("2 .txt that cannot be read, 1 .jsonl.gz that cannot be read")
    with pytest.raises(UserError, match="empty"):
        locate(str(partly_bad / "empty.jsonl.gz"), "skip")


def test_skipping_makes_other_shards_and_says_so_each_time(partly_bad, tmp_path, capsys):
    data = DataConfig(source=str(partly_bad), cache=str(tmp_path / "cache"), validation=0.2, workers=1)
    with pytest.raises(UserError, match=r"latin|cut"):
        ensure(data, 300, 100)
    skipping = data.model_copy(update={"bad": "skip"})
    folder = ensure(skipping, 300, 100)
    capsys.readouterr()
    assert ensure(skipping, 300, 100) == folder
    assert "2 .txt, 1 .csv" in " ".join(capsys.readouterr().err.split())
    for name in ("latin.txt", "latin2.txt", "cut.csv"):
        (partly_bad / name).unlink()
    assert ensure(data, 300, 100) != ensure(skipping, 300, 100)
