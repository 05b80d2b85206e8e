"""The suite scores what it says, on the questions that the files hold, and tells what it could not ask."""

import gzip
import http.server
import io
import json
import math
import os
import shutil
import threading

import numpy as np
import pytest
from evaluated import a_run, write_sets
from rich.console import Console

from conftest import exit_code
from khanhllm.cli import main
from khanhllm.data import fetch
from khanhllm.errors import UserError
from khanhllm.inference.likelihood import Likelihood
from khanhllm.lab import answers, scores, sets, suite, synthetic
from khanhllm.lab.answers import Question
from khanhllm.lab.sample import take
from khanhllm.runs.run import open_run
from khanhllm.schema import MachineConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return a_run(tmp_path_factory.mktemp("suite") / "runs" / "mine")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def found(run, files):
    return suite.examine(run, files, 10)


def first(files, name, delimiter):
    return sets.question(sets.load(sets.found(files)[name]), 0, delimiter)


def test_each_shape_of_file_becomes_the_question_that_its_authors_ask(files):
    assert first(files, "causative", "") == Question(
        [("", "The cat saw the dog."), ("", "The cat saw dog the.")], 0, "syntax"
    )
    assert first(files, "passive_1", "").field == "syntax_semantics"
    asked = "Question: which cat?\nAnswer: "
    shown = [(asked, text) for text in ("dog", "red lamp", "the box", "an old key")]
    assert first(files, "arc_easy", "\nAnswer: ") == Question(shown, 0)
    assert first(files, "copa", " ") == Question(
        [("The cat sat, ", "a dog saw."), ("The cat sat, ", "on the red mat.")], 1
    )
    options = ["The cat saw the dog so the cat ", "The cat saw the dog so the dog "]
    assert first(files, "winogrande", " ") == Question([(option, "sat on the mat.") for option in options], 0)
    assert first(files, "lambada_openai", " ") == Question([("The cat has a dog. A ", "dog")], 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no questions"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 0}\n{"query"', "copa.jsonl, line 2 is not valid JSON"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "copa.jsonl, question 1 has not sentence_good and"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 0.5}', "question 1 has not"),
        ('{"query": "a", "choices": ["b", 3], "gold": 0}', "question 1 has not"),
        ('{"query": "a", "gold": 0}', "question 1 has not"),
        ("[1]", "question 1 has not"),
        ('{"context": null, "continuation": "b"}', "question 1 has not"),
    ],
)
def test_a_file_that_is_no_set_is_told_in_one_line(run, tmp_path, capsys, text, says):
    (tmp_path / "copa.jsonl").write_text(text, encoding="utf-8")
    assert main(["evaluate", str(run.checkpoint.parents[1]), "--suite", "--files", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("late", ["winogrande", "boolq"])
def test_a_bad_row_is_told_before_anything_is_measured(run, files, tmp_path, late):
    shutil.copytree(files, tmp_path / "files")
    for file in (tmp_path / "files").rglob(f"{late}*"):
        file.unlink()
    (tmp_path / "files" / f"{late}.jsonl").write_text("[1]", encoding="utf-8")
    heard = []
    with pytest.raises(UserError, match=f"{late}.jsonl, question 1 has not"):
        suite.examine(run, tmp_path / "files", 10, with_core=True, say=heard.append)
    assert not heard


def test_what_a_stranger_put_into_a_set_is_shown_as_letters(run, tmp_path, capsys):
    """Half a surrogate pair, marks of the terminal, and a pipe where a file should be, which once waited for ever."""
    folder = shutil.copytree(run.checkpoint.parents[1], tmp_path / "runs" / "mine[v2]")
    row = {"sentence_good": "a b", "sentence_bad": "b \ud800", "field": "[bold]\ud800\x1b[31m"}
    (tmp_path / "adjunct_island.jsonl").write_text(json.dumps(row), encoding="utf-8")
    words = ["evaluate", str(folder), "--suite", "--files", str(tmp_path), "--items", "5", "--machine.threads", "1"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "mine[v2] after" in said and "[bold]\\ud800" in said and "\x1b" not in said
    os.mkfifo(tmp_path / "copa.jsonl")
    assert main(words) == 2 and "copa.jsonl: it is not a regular file" in capsys.readouterr().err


def test_files_are_found_packed_and_in_folders_and_remembered_by_what_they_hold(files, tmp_path):
    plain = sets.load(sets.found(files)["copa"])
    (tmp_path / "one" / "two").mkdir(parents=True)
    (tmp_path / "one" / "two" / "copa.jsonl.gz").write_bytes(gzip.compress(plain.path.read_bytes()))
    (tmp_path / "copa.jsonl.txt").write_text("no set")
    packed = sets.load(sets.found(tmp_path)["copa"])
    assert (packed.rows, packed.sha256) == (plain.rows, plain.sha256)
    whole = gzip.compress(plain.path.read_bytes())
    for damaged in (b"no gzip", whole[:-20], whole[:15] + b"??????" + whole[21:]):
        (tmp_path / "piqa.jsonl.gz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"cannot read .*piqa"):
            sets.load(tmp_path / "piqa.jsonl.gz")


def oracle(monkeypatch, log):
    """A model whose answer is a function of the texts."""
    monkeypatch.setattr(answers, "encode", lambda _tokenizer, context, text: (context, text))
    monkeypatch.setattr(
        answers, "log_likelihoods", lambda _model, pairs, _machine: [Likelihood(*log(*pair), 2, 0) for pair in pairs]
    )


def test_accuracy_is_the_share_of_right_choices_and_ties_share_it(run, monkeypatch):
    asked = [Question([("q", "aa"), ("q", "b")], right) for right in (0, 0, 0, 1)]
    oracle(monkeypatch, lambda _context, text: (-3.0 if text == "aa" else -2.0, False))
    measure = suite.choices(run, "", asked, 4)
    assert (measure["value"], measure["chance"], measure["items"]) == (0.25, 0.5, 4)
    assert measure["error"] == pytest.approx(math.sqrt(0.25 * 0.75 / 3)), "as the harness has it"
    assert measure["by_bytes"]["value"] == 0.75, "-1.5 a byte against -2"
    oracle(monkeypatch, lambda _context, _text: (-2.0, False))
    assert suite.choices(run, "", asked, 4)["value"] == 0.5
    schema = [Question([("a", "text"), ("b", "text")], 0)]
    alone = suite.choices(run, "", schema, 1)
    assert "by_bytes" not in alone and alone["error"] is None


def test_the_last_word_counts_if_it_is_the_likeliest(run, files, monkeypatch):
    oracle(monkeypatch, lambda _context, text: (-1.0 if text == "dog" else -5.0, text == "dog"))
    source = sets.load(sets.found(files)["lambada_openai"])
    hits, nats = suite.last_word(run, sets.questions(source, " ", 100), 12)
    dogs = sum(row["continuation"] == "dog" for row in source.rows)
    assert hits["value"] == dogs / 12 and nats["value"] == pytest.approx((dogs + 5 * (12 - dogs)) / 12)


def test_a_model_that_copies_saves_nats_on_what_it_has_read(run, monkeypatch):
    oracle(monkeypatch, lambda context, text: (-1.0 if text == context else -9.0, False))
    saved = suite.induction(run, 20)
    assert saved["value"] == 4.0 and saved["error"] == 0, "8 nats over 2 tokens, the same for each list"


def test_bits_per_byte_is_that_of_evaluate(run, corpus, monkeypatch):
    monkeypatch.setattr(suite, "TOKENS", 10_000)
    measure = suite.bits_per_byte(run, str(corpus))
    scored = run.score_windows(iter(take(run, str(corpus), suite.TOKENS).ids))
    assert measure["value"] == pytest.approx(scored["val_bpb"], rel=1e-6)
    assert 0 < measure["error"] < 0.1 * measure["value"]


@pytest.mark.parametrize("kind", synthetic.CHOICES)
def test_questions_made_by_rule_have_one_right_answer_and_are_always_the_same(kind):
    made = list(synthetic.questions(kind, 200))
    assert made == list(synthetic.questions(kind, 200)) and made[:50] == list(synthetic.questions(kind, 50))
    for question in made:
        texts = [text.strip() for _, text in question.choices]
        (context,) = {context for context, _ in question.choices}
        assert len(set(texts)) == len(texts)
        solved = {"recall": recalled, "arithmetic": added, "brackets": closed}[kind](context)
        assert texts[question.right] == solved
    if kind != "arithmetic":  # a model that always says the same is at chance
        counts = np.bincount([question.right for question in made])
        assert counts.max() < 1.5 * counts.mean()


def recalled(context):
    *told, asked = context.split(". ")
    return next(one.rpartition(" ")[2] for one in told if one.split()[0] == asked.split()[0])


def added(context):
    first, plus, second, equals = context.splitlines()[-1].split()
    assert (plus, equals) == ("+", "=")
    return str(int(first) + int(second))


def closed(context):
    waiting = []
    for bracket in context.split():
        if bracket in synthetic.CLOSES:
            waiting.append(bracket)
        else:
            assert synthetic.CLOSES[waiting.pop()] == bracket
    assert set(waiting) == set(synthetic.CLOSES), "all kinds are open"
    return synthetic.CLOSES[waiting[-1]]


def test_the_wrong_sums_are_as_long_as_the_right_one():
    for question in synthetic.questions("arithmetic", 200):
        assert len({len(text) for _, text in question.choices}) == 1


def test_evaluation_json_has_every_measure_and_what_is_missing(found, files):
    titles = ["blimp", "lambada", "lambada_nats", "copa", "piqa", "arc_easy", "winogrande"]
    assert list(found["measures"]) == [*titles, "induction", "recall", "arithmetic", "brackets"]
    blimp = found["measures"]["blimp"]
    assert (blimp["items"], blimp["of"], blimp["paradigms"]) == (4, 24, 2)
    assert {name: own["items"] for name, own in blimp["fields"].items()} == {"syntax": 2, "syntax_semantics": 2}
    for name, measure in found["measures"].items():
        assert measure["error"] is not None and math.isfinite(measure["value"]), name
        assert measure["chance"] is None or 0 <= measure["chance"] <= 0.5
    assert len(found["missing"]) == 65 and set(found["files"]) == {path.stem for path in files.glob("*/*.jsonl")}
    assert "no bits per byte" in found["notes"][0] and "are gone" in found["notes"][0]
    assert any("copa.jsonl is not the published file" in note for note in found["notes"])
    assert json.loads(json.dumps(found)) == found


def test_the_same_run_gets_the_same_scores(run, files, found):
    assert suite.examine(run, files, 10) == found


def test_a_checkpoint_that_a_training_removes_meanwhile_costs_nothing(run, files, found, tmp_path):
    trains = tmp_path / "mine"
    shutil.copytree(run.checkpoint.parents[1], trains)
    opened = open_run(trains, MachineConfig(threads=1))
    shutil.rmtree(trains / "checkpoints")
    assert suite.examine(opened, files, 10)["checkpoint"] == found["checkpoint"]


def test_items_cut_for_length_are_counted(tmp_path, files):
    short = suite.examine(a_run(tmp_path / "short", context=16), files, 10)
    cut = {name: measure["cut"] for name, measure in short["measures"].items()}
    assert cut["piqa"] == cut["recall"] == 10 and cut["blimp"] == 0


def test_the_verb_prints_a_table_and_writes_two_files(run, files, tmp_path, capsys, monkeypatch):
    folder, out = run.checkpoint.parents[1], tmp_path / "new" / "scores.json"
    words = ["evaluate", str(folder), "--suite", "--files", str(files), "--items", "10", "--machine.threads", "1"]
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*words, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "BLiMP" in said and "ARC-easy" in said and "not there: BLiMP (65 files); name the folder" in said
    assert out.exists() and out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert (folder / "evaluation.png").exists()


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(width):
    measure = {"title": "LAMBADA, last word", "unit": "nats", "value": 18.717, "error": 0.372, "chance": None}
    wide = {"title": "BLiMP", "unit": "accuracy", "value": 1.0, "error": 0.051, "chance": 0.5, "by_bytes": None}
    known = {"items": 67000, "of": 67000, "cut": 500}
    console = Console(file=io.StringIO(), width=width)
    console.print(scores.table({"a": measure | known, "b": wide | known | {"by_bytes": wide | known}}, "a run"))
    shown = console.file.getvalue()
    assert "…" not in shown and "67,000" in shown and "100.0 ±5.1" in shown


def test_a_score_within_two_errors_of_chance_is_in_parentheses():
    own = {"value": 0.53, "error": 0.02, "items": 1000}
    assert scores._number(own, 0.5, True) == "(53.0 ±2.0)"
    assert scores._number(own, 0.48, True) == "53.0 ±2.0"
    assert scores._number({"value": 0.54, "error": None}, 0.5, True) == "(54.0)"
    none = {"value": 0.0, "error": 0.0, "items": 3}
    assert scores._number(none, 0.25, True) == "(0.0 ±0.0)"
    assert scores._number(none | {"items": 30}, 0.25, True) == "0.0 ±0.0"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--files", "there"], "--files belongs to --suite"),
        (["--download"], "--download belongs to --suite"),
        (["--items", "3"], "--items belongs to --suite or --tasks"),
        (["--suite", "--include-path", "there"], "--include-path belongs to --tasks"),
        (["--suite", "--tasks", "piqa"], "not allowed with"),
        (["--tasks", "piqa", "--include-path", "nowhere"], "--include-path nowhere is no folder"),
        (["--tasks", "piqa", "--data", "stdlib"], "leave out --data"),
        (["--tasks", " , "], "names no task"),
        (["--suite", "--core"], "CORE puts up to ten solved examples"),
        (["--suite", "--data", "nowhere"], "nowhere"),
        (["--suite", "--out", "/dev/null/scores.json"], "cannot write"),
        (["--suite", "--out", "scores.PNG"], "name the JSON file; the picture lies beside it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_in_one_line(run, capsys, options, says):
    code = exit_code(["evaluate", str(run.checkpoint.parents[1]), *options])
    error = capsys.readouterr().err
    assert code == 2 and says in error and len(error.splitlines()) == 1


def test_the_table_of_downloads_names_a_fixed_version_and_a_hash_for_each_file():
    known = sets.published()
    assert len(sets.blimp()) == 67 and len(known) == 85
    assert {name for name in suite.wanted(True) if name not in known} == {"hellaswag", "squad", "coqa"}
    for address, sha256 in known.values():
        owner, _, commit = address.removeprefix("https://raw.githubusercontent.com/").split("/")[:3]
        assert owner in ("alexwarstadt", "mosaicml") and len(commit) == 40
        assert len(sha256) == 64 and set(sha256) <= set("0123456789abcdef")


@pytest.fixture
def server(files, tmp_path, monkeypatch):
    """The sets over HTTP, and a table that leads there."""
    monkeypatch.setattr(fetch, "FIRST_WAIT", 0.001)

    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *more):
            super().__init__(*more, directory=str(files))

        def log_message(self, *_):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as there:
        threading.Thread(target=there.serve_forever, daemon=True).start()
        table = tmp_path / "sets.toml"
        text = ""
        for part in ("blimp", "core"):
            address = f"http://127.0.0.1:{there.server_port}/{part}/"
            text += f'[{part}]\naddress = "{address}"\n[{part}.sha256]\n'
            for path in sorted((files / part).iterdir()):
                text += f'"{path.name}" = "{sets.load(path).sha256}"\n'
        table.write_text(text, encoding="utf-8")
        monkeypatch.setattr(sets, "TABLE", table)
        yield asked
        there.shutdown()


def test_a_download_brings_what_is_missing_and_nothing_else(run, server, tmp_path, files, capsys):
    folder = tmp_path / "brought"
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "piqa.jsonl.gz").write_bytes(gzip.compress((files / "core" / "piqa.jsonl").read_bytes()))
    words = ["evaluate", str(run.checkpoint.parents[1]), "--suite", "--items", "5", "--files", str(folder)]
    assert main([*words, "--download", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] == [] and len(found["notes"]) == 1, "only that the held-out text is gone"
    assert sorted(server) == sorted(f"/{p.parent.name}/{p.name}" for p in files.glob("*/*") if p.stem != "piqa")
    asked = len(server)
    assert main([*words, "--download"]) == 0 and len(server) == asked
    assert not list(folder.glob("*.part*"))


def test_other_bytes_than_those_published_are_refused(run, server, tmp_path, capsys):
    table = sets.TABLE.read_text(encoding="utf-8")
    right = sets.published()["copa"][1]
    sets.TABLE.write_text(table.replace(right, "0" * 64), encoding="utf-8")
    words = ["evaluate", str(run.checkpoint.parents[1]), "--suite", "--files", str(tmp_path / "brought"), "--download"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "/core/copa.jsonl: wrong bytes arrived (its sha256 is not the published one)" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "brought" / "copa.jsonl").exists()
