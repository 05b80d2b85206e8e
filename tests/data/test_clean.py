"""Laws of cleaning: a rule removes the page it is about and no other, the counts add up, and nothing else shows."""

import importlib.util
import json
import threading
from hashlib import sha256
from itertools import islice

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_executors import run_tasks, slurm  # noqa: F401
from test_prepare import TOKENIZER, documents

from khanhllm import cli
from khanhllm.data import clean as module
from khanhllm.data import prepare as preparation
from khanhllm.data.belt import Belt
from khanhllm.data.belt_notes import Made, note_path
from khanhllm.data.belt_worker import BeltWorker
from khanhllm.data.clean import Cleaner, steps_of
from khanhllm.data.ensure import ensure
from khanhllm.data.executors import Execution
from khanhllm.data.prepare import prepare
from khanhllm.data.shards import Manifest
from khanhllm.data.sources import Source
from khanhllm.errors import UserError
from khanhllm.schema import DataConfig

pytestmark = pytest.mark.slow

WORDS = """the of and to that have with be river mountain garden winter letter window silver morning engine doctor
village harbour captain music paper bridge forest teacher market kitchen summer island carpenter painting journey
thunder compass lantern orchard sailor castle meadow evening shadow blanket""".split()


def page(number, sentences=8):
    """Prose that every rule lets pass."""
    chosen = np.random.default_rng(number)
    lines = [" ".join(chosen.choice(WORDS, 12, replace=False)) for _ in range(sentences)]
    return "\n".join(f"The {line} of it." for line in lines)


def lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Six files, each a task of its own; a third of the pages is too short for C4."""
    whole = Source.groups
    monkeypatch.setattr(Source, "groups", lambda self: whole(self, least=1))
    folder = tmp_path / "corpus"
    folder.mkdir()
    for part in range(6):
        texts = [page(part * 30 + nth, 2 if nth % 3 == 2 else 8) for nth in range(30)]
        (folder / f"{part}.jsonl").write_text(lines(texts), "utf-8")
    return folder


def said(manifest):
    return {lost.step: lost.documents for lost in manifest.cleaning.removed}


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ("c4", page(1).replace(".\n", "\n")),
        ("c4", page(1, 4)),
        ("c4", page(1) + "\nLorem ipsum is here to stay."),
        ("c4", page(1) + "\nif it { is code, it goes."),
        ("c4", page(1, 4) + "\nPlease switch javascript on to read."),
        ("c4", page(1, 4) + "\nYes."),
        ("c4", page(1, 4) + "\nHe went on and on..."),
        ("c4", page(1, 4) + "\nWe use cookies on this page."),
        ("paragraphs", page(1)),
        ("gopher-quality", page(1, 2)),
        ("gopher-quality", "\n".join(f"- {line}" for line in page(1).split("\n"))),
        ("gopher-quality", page(1).replace(" ", " #")),
        ("gopher-quality", " ".join(word for word in page(1).split() if word.lower() not in WORDS[:8])),
        ("gopher-quality", page(1).replace(" the ", " 1234567 ") + " 12 34" * 40),
        ("gopher-repetition", "\n".join([page(1, 1)] * 8)),
        ("gopher-repetition", page(1) + " the castle of the king" * 20),
    ],
)
def test_each_rule_removes_the_page_it_is_about_and_no_good_one(step, text):
    cleaner = Cleaner(step)
    good = page(2) if step != "paragraphs" else "\n".join([page(2).replace("\n", " ")[:300]] * 3)
    assert cleaner.clean(good) == good
    assert cleaner.clean(text) == ""
    size = len(text.encode())
    assert cleaner.tally == ((2, len(good.encode()) + size), (1, size))


ODD = st.sampled_from([*WORDS[:9], "\n", "\n\n", "...", "# ", "- ", "{", "Đ", "\u2028", "\x00", "’"]) | st.text()


@given(st.lists(st.lists(ODD).map(" ".join).filter(str.strip), max_size=5))
def test_whatever_the_text_the_counts_add_up(texts):
    for steps in ("c4, gopher, paragraphs", "gopher-repetition, c4"):
        cleaner = Cleaner(steps)
        kept = [text for text, _ in cleaner.run(texts)]
        (documents, size), *removed = cleaner.tally
        assert (documents, size) == (len(texts), sum(len(text.encode()) for text in texts))
        assert len(kept) == documents - sum(lost for lost, _ in removed)
        assert sum(len(text.encode()) for text in kept) == size - sum(lost for _, lost in removed)


def test_c4_keeps_of_a_page_the_lines_that_are_sentences():
    cleaner = Cleaner("c4")
    assert cleaner.clean(f"Home | News\n{page(1)}\nShare this[3]\nAs he said so.[12]") == f"{page(1)}\nAs he said so."
    assert cleaner.tally[1][0] == 0 and cleaner.tally[1][1] == len("Home | News\n\nShare this[3][12]")


def test_other_languages_go():
    pytest.importorskip("py3langid")
    german = "Der Hund und die Katze gehen am Abend durch den Wald nach Hause, weil es dort warm ist."
    english = "The dog and the cat walk home through the wood in the evening, because it is warm there."
    assert (Cleaner("language:en").clean(english), Cleaner("language:en").clean(german)) == (english, "")
    assert (Cleaner("language:de").clean(english), Cleaner("language:de").clean(german)) == ("", german)
    with pytest.raises(UserError, match=r"no language 'xx'; known: .*\bvi\b"):
        Cleaner("language:xx")


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ("gofer", r"no step named 'gofer' \(did you mean gopher\?\); known: c4, "),
        ("badwords", "no step named 'badwords'"),
        ("c4, c4", "named twice"),
        ("gopher, gopher-quality", "named twice"),
    ],
)
def test_wrong_steps_are_one_line(steps, told, tmp_path):
    with pytest.raises(UserError, match=told):
        steps_of(steps)
    for call in (
        lambda: prepare("stdlib", TOKENIZER, tmp_path / "out", validation=0.1, clean=steps),
        lambda: ensure(DataConfig(source="stdlib", cache=str(tmp_path), clean=steps), 300, 1),
    ):
        with pytest.raises(UserError, match=told):
            call()


def test_a_missing_extra_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs py3langid, .* pip install 'khanhllm\[clean\]'"):
        prepare("stdlib", TOKENIZER, tmp_path / "out", validation=0.1, clean="language:en")


@pytest.mark.parametrize("tokens", [0, 1500])
def test_the_number_of_workers_does_not_show_and_the_counts_add_up(corpus, tmp_path, tokens):
    copies = [page(number).replace("river", "stream", 1) for number in range(0, 90, 9)]
    (corpus / "copies.jsonl").write_text(lines(copies), "utf-8")
    out = [tmp_path / str(workers) for workers in (1, 3)]
    one, three = (
        prepare(
            str(corpus), TOKENIZER, folder, validation=0.1, tokens=tokens, workers=int(folder.name), clean="c4, minhash"
        )
        for folder in out
    )
    assert one == three == Manifest.read(out[1])
    cleaning = one.cleaning
    kept = sum(shard.documents for shard in one.shards), sum(shard.bytes for shard in one.shards)
    assert cleaning.kept == kept and cleaning.steps == "c4, minhash"
    assert said(one)["c4"]
    if not tokens:
        texts = [*documents(out[0], "train"), *documents(out[0], "validation")]
        assert len(texts) == cleaning.documents - 60 - 10 and said(one) == {"c4": 60, "minhash": 10}


def test_minhash_removes_altered_copies_across_the_split_and_keeps_what_differs(tmp_path):
    pages = [page(number, 20) for number in range(40)]
    altered = [text.replace(text.split()[50], "changed", 1) for text in pages]
    (tmp_path / "a.jsonl").write_text(lines(pages + altered + pages[:5]), "utf-8")
    manifest = prepare(str(tmp_path / "a.jsonl"), TOKENIZER, tmp_path / "out", validation=0.4, clean="minhash")
    left = [text for split in ("train", "validation") for text in documents(tmp_path / "out", split)]
    origin = {text: number for texts in (pages, altered) for number, text in enumerate(texts)}
    assert sorted(origin[text] for text in left) == list(range(40))
    assert said(manifest) == {"minhash": 45}


def test_of_spans_that_come_again_one_stays_wherever_it_stands_and_nothing_else_goes(corpus, tmp_path):
    span = "All rights are reserved here. Nothing may be copied at all. Ask the owner of the page first."
    pages = [page(number) for number in range(200, 240)]
    (corpus / "0.jsonl").write_text(lines([f"{span}\n{text}" for text in pages[:20]]), "utf-8")
    (corpus / "1.jsonl").write_text(lines([f"{text}\n{span.upper()}" for text in pages[20:]]), "utf-8")
    out = [tmp_path / str(workers) for workers in (1, 3)]
    one, three = (
        prepare(str(corpus), TOKENIZER, folder, validation=0.1, workers=int(folder.name), clean="spans")
        for folder in out
    )
    assert one == three
    texts = [text.strip() for split in ("train", "validation") for text in documents(out[0], split)]
    assert len(texts) == one.cleaning.documents
    assert len(set(pages) & set(texts)) == 39 and sum("reserved" in text.lower() for text in texts) == 1
    (lost,) = one.cleaning.removed
    assert (lost.step, lost.documents, lost.bytes) == ("spans", 0, 39 * len(f"{span}\n"))


def test_a_copy_is_nothing_but_spans_that_come_again_and_two_sentences_are_none(tmp_path):
    pair = "Only two sentences are here. They are on every page."
    pages = [f"{page(number)}\n{pair}" for number in range(10)]
    (tmp_path / "a.jsonl").write_text(lines([*pages, *pages[:4]]), "utf-8")
    manifest = prepare(str(tmp_path / "a.jsonl"), TOKENIZER, tmp_path / "out", validation=0.2, clean="spans, minhash")
    left = [text for split in ("train", "validation") for text in documents(tmp_path / "out", split)]
    assert sorted(left) == sorted(pages) and said(manifest) == {"spans": 4, "minhash": 0}


@pytest.mark.parametrize("step", ["spans", "minhash"])
def test_the_name_of_a_folder_is_no_pattern(tmp_path, step):
    pages = [page(number) for number in range(20)]
    (tmp_path / "a.jsonl").write_text(lines([*pages, *pages[:4]]), "utf-8")
    made = [
        prepare(str(tmp_path / "a.jsonl"), TOKENIZER, tmp_path / name / "out", validation=0.2, clean=step)
        for name in ("plain", "[v2]")
    ]
    assert made[0] == made[1] and said(made[1]) == {step: 4}


def test_spans_of_a_very_long_document_are_found_as_far_as_their_numbers_reach(tmp_path):
    book = " ".join(f"Sentence {'abcdefghij'[n % 10]} {n:b} is one of many." for n in range(70_000))
    book = book.replace("0", "o").replace("1", "i")  # numbers are all alike to datatrove
    (tmp_path / "a.jsonl").write_text(lines([book, page(1), page(2)]), "utf-8")
    prepare(str(tmp_path / "a.jsonl"), TOKENIZER, tmp_path / "out", validation=0.4, clean="spans")
    left = [text for split in ("train", "validation") for text in documents(tmp_path / "out", split)]
    assert book in left


def test_an_interrupted_search_for_copies_goes_on(corpus, tmp_path, monkeypatch):
    bad = corpus / "3.jsonl"
    whole = bad.read_text("utf-8")
    bad.write_text(whole + "not json", "utf-8")
    with pytest.raises(UserError, match=r"3\.jsonl, line 31"):
        prepare(str(corpus), TOKENIZER, tmp_path / "out", validation=0.1, workers=1, clean="c4, spans, minhash")
    bad.write_text(whole, "utf-8")
    again, other = (
        prepare(str(corpus), TOKENIZER, tmp_path / out, validation=0.1, workers=1, clean="c4, spans, minhash")
        for out in ("out", "other")
    )
    assert again == other


def test_on_slurm_the_search_for_copies_is_a_job_of_its_own(corpus, tmp_path, slurm):  # noqa: F811
    (corpus / "copies.jsonl").write_text(lines([page(number) for number in range(9)]), "utf-8")
    expected = prepare(str(corpus), TOKENIZER, tmp_path / "expected", validation=0.1, workers=1, clean="c4, minhash")
    place = Execution("slurm", tasks=2, partition="cpu")
    for _ in range(2):
        assert (
            prepare(str(corpus), TOKENIZER, tmp_path / "out", validation=0.1, execution=place, clean="c4, minhash")
            is None
        )
        run_tasks(slurm, [0, 1])
        (slurm / "gone").touch()
    made = prepare(str(corpus), TOKENIZER, tmp_path / "out", validation=0.1, execution=place, clean="c4, minhash")
    assert made == expected and said(made) == {
        "c4": 60,
        "minhash": 6,
    }  # three copies of what c4 removed are the only ones


def test_what_leaves_nothing_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(["short", "shorter"]), "utf-8")
    with pytest.raises(UserError, match="cleaning it by c4 leaves nothing"):
        prepare(str(tmp_path / "a.jsonl"), TOKENIZER, tmp_path / "out", validation=0.1, clean="c4")


def settings(source, tmp_path, clean="", **more):
    return DataConfig(source=str(source), cache=str(tmp_path / "cache"), workers=1, validation=0.1, clean=clean, **more)


def test_another_cleaning_is_another_folder_and_none_is_the_same_as_before(corpus, tmp_path):
    plain, once = ensure(settings(corpus, tmp_path), 300, 1), ensure(settings(corpus, tmp_path, "c4"), 300, 1)
    assert len({plain, once, ensure(settings(corpus, tmp_path, "gopher"), 300, 1)}) == 3
    assert ensure(settings(corpus, tmp_path, " C4 ,"), 300, 1) == once
    assert '"cleaning":' not in (plain / "manifest.json").read_text("utf-8")
    assert Manifest.read(plain).cleaning is None and Manifest.read(once).cleaned_by == "c4"
    with pytest.raises(UserError, match=r"was prepared with cleaning by nothing; leave out data\.clean c4"):
        ensure(settings(plain, tmp_path, "c4"), 300, 1)
    assert ensure(settings(once, tmp_path, "c4"), 300, 1) == once


def test_the_tokenizer_learns_from_what_is_kept(corpus):
    sample = list(preparation._sample(preparation.Reader(preparation.locate(str(corpus)), []), 10**9, 0.1, "c4"))
    assert 90 < len(sample) <= 120 and all(text.count("\n") == 7 for text in sample)


@pytest.fixture
def belt(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "WHOLE", 1)
    TOKENIZER.save(tmp_path / "given.json")

    def belt(cache, **more):
        given = {"tokenizer": str(tmp_path / "given.json"), "shard_tokens": 3000, "clean": "c4"}
        data = DataConfig(source=str(corpus), cache=str(tmp_path / cache), validation=0.1, **given | more)
        return Belt(ensure(data, 300, 1), 16, 1, 10**9, 5.0)

    return belt


def test_a_cleaned_belt_goes_on_in_the_middle_of_a_file_the_same(belt):
    whole, stopped = belt("whole"), belt("stopped")
    worker = BeltWorker(whole.folder, 5.0)
    made = [worker.make(0)]
    while not made[-1].last:
        made.append(worker.make(len(made)))
    assert len(made) > 4 and any(note.following.positions[0].document % 30 for note in made)
    for nth, note in enumerate(made):  # each shard by a new process
        assert BeltWorker(stopped.folder, 5.0).make(nth) == note
    (read, size), (removed, _) = made[-1].following.positions[0].tally
    assert (removed, size) > (50, 0) and 150 < read <= 180


def test_rows_of_a_cleaned_belt_come_from_any_place(belt):
    def rows(found, start, number):
        stream = found.rows_from(start, 0, threading.Event())
        taken = [row.tobytes() for row in islice(stream, number)]
        stream.close()
        return taken

    whole = rows(belt("whole"), 0, 900)
    assert rows(belt("other"), 613, 200) == whole[613:813]


def test_both_sides_of_a_belt_are_cleaned_and_apart(belt, corpus):
    found = belt("cache")
    made = BeltWorker(found.folder, 5.0).make(0)
    texts = [
        set(TOKENIZER.decode(np.fromfile(found.folder / name, "<u2")).split("<|endoftext|>")[1:])
        for name in (made.shard.file, "validation-00000.bin")
    ]
    assert texts[0] and texts[1] and not texts[0] & texts[1]
    assert all(text.count("\n") == 7 for text in texts[0] | texts[1])


def test_the_belt_knows_its_cleaning_and_an_old_one_keeps_its_identity(belt):
    plain, cleaned = belt("cache", clean=""), belt("cache", clean=" C4,")
    assert cleaned.recipe.clean == "c4"
    assert plain.folder != cleaned.folder and plain.sha256 != cleaned.sha256
    recipe = plain.folder / "belt.json"
    old = json.loads(recipe.read_text("utf-8"))
    del old["clean"]
    recipe.write_text(json.dumps(old, separators=(",", ":")), "utf-8")
    assert Belt(plain.folder, 16, 1, 1, 1.0).sha256 == plain.sha256 == sha256(recipe.read_bytes()).hexdigest()


@pytest.mark.parametrize("step", ["spans", "minhash"])
def test_a_merge_opens_more_files_than_a_system_allows_at_first(step, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(Source, "groups", lambda source: [(name,) for name in source.files])
    (tmp_path / "texts").mkdir()
    for number in range(60):
        (tmp_path / "texts" / f"{number}.txt").write_text(page(number), "utf-8")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + 30, hard))
    try:
        assert prepare(str(tmp_path / "texts"), TOKENIZER, tmp_path / "out", validation=0.1, workers=1, clean=step)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("step", ["spans", "minhash"])
def test_a_belt_refuses_what_compares_all_documents(belt, step):
    with pytest.raises(UserError, match=rf"{step} compares all documents .* khanhllm prepare --clean"):
        belt("cache", clean=f"c4, {step}")


def test_data_show_tells_what_was_removed(corpus, belt, tmp_path, capsys):
    words = ["prepare", "--data", corpus, "--tokenizer", tmp_path / "given.json", "--out", tmp_path / "out"]
    assert cli.main([*map(str, words), "--clean", "c4"]) == 0
    said = capsys.readouterr().err
    assert cli.main(["data", "show", str(tmp_path / "out"), "--documents", "0"]) == 0
    shown = capsys.readouterr().out
    for out in (said, shown):
        assert [line.split()[:2] for line in out.splitlines() if line.startswith(("read", "c4", "kept"))] == [
            ["read", "180"],
            ["c4", "-60"],
            ["kept", "120"],
        ]
    found = belt("cache")
    BeltWorker(found.folder, 5.0).make(0)
    read = Made.read(note_path(found.folder, 0)).following.positions[0].tally[0][0]
    assert cli.main(["data", "show", str(found.folder), "--documents", "0"]) == 0
    assert ["read", f"{read}"] in [line.split()[:2] for line in capsys.readouterr().out.splitlines()]


def test_words_and_sentences():
    words = module.WORDS
    assert words.word_tokenize("It's 3 o’clock, well-known... Nghĩa là gì?") == [
        *["It's", "3", "o’clock", ",", "well", "-", "known", "...", "Nghĩa", "là", "gì", "?"]
    ]
    assert words.sent_tokenize('He said: "No!" Then 3.5 left. And so') == ['He said: "No!"', "Then 3.5 left.", "And so"]
