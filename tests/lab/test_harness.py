"""lm-evaluation-harness and the suite agree item by item; so do our class, the exported folder and the server."""

import json
import sys

import numpy as np
import pytest
import torch
from evaluated import a_run, write_sets

from conftest import house
from khanhllm import lab
from khanhllm.cli import main
from khanhllm.errors import missing_extra
from khanhllm.inference.likelihood import encode, log_likelihoods
from khanhllm.lab import sets, suite
from khanhllm.lab.answers import ask

pytestmark = pytest.mark.slow  # importing the harness takes seconds

TASK = """
task: {task}
dataset_path: json
dataset_kwargs:
  data_files: {{train: {path}}}
test_split: train
output_type: multiple_choice
{more}
"""
BLIMP = """
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{[sentence_good, sentence_bad]}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
ARC = r"""
doc_to_text: "{{query}}\nAnswer:"
doc_to_target: gold
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_bytes}]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return a_run(tmp_path_factory.mktemp("harness") / "runs" / "mine")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    pytest.importorskip("lm_eval", reason="lm_eval, the extra eval, is not installed")
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        from khanhllm.lab import harness

        yield harness


@pytest.fixture(scope="module")
def described(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for task, name, more in (("our_blimp", "causative", BLIMP), ("our_arc", "arc_easy", ARC)):
        path = sets.found(files)[name]
        (folder / f"{task}.yaml").write_text(TASK.format(task=task, path=path, more=more), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def results(run, harness, described):
    return harness.evaluate(run, ["our_blimp", "our_arc"], described)


@pytest.mark.parametrize(
    ("task", "name", "delimiter"), [("our_blimp", "causative", ""), ("our_arc", "arc_easy", "\nAnswer: ")]
)
def test_the_harness_and_the_suite_agree_item_by_item(run, files, results, task, name, delimiter):
    source = sets.load(sets.found(files)[name])
    own = ask(run, sets.questions(source, delimiter, 100))
    theirs = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    assert len(theirs) == len(own.found) == 12
    for sample, found in zip(theirs, own.found, strict=True):
        logs = [float(answer[0][0]) for answer in sample["resps"]]
        assert logs == pytest.approx([one.log for one in found], abs=1e-4)
        assert np.ptp(logs) > 0.01, "a choice that all models find as likely as the other tests nothing"
    measure = suite.choices(run, "", sets.questions(source, delimiter, 100), 12)
    scored = results["results"][task]
    assert scored["acc,none"] == pytest.approx(measure["value"])
    assert scored["acc_stderr,none"] == pytest.approx(measure["error"])
    if "by_bytes" in measure:
        assert scored["acc_bytes,none"] == pytest.approx(measure["by_bytes"]["value"])


def test_the_verb_writes_the_scores_with_their_chance(run, harness, described, tmp_path, capsys):
    out = tmp_path / "tasks.json"
    words = ["evaluate", str(run.checkpoint.parents[1]), "--tasks", "our_blimp, our_arc", "--machine.threads", "1"]
    assert main([*words, "--include-path", str(described), "--items", "5", "--out", str(out)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))["measures"]
    assert {name: measure["chance"] for name, measure in found.items()} == {
        "our_blimp acc,none": 0.5,
        "our_arc acc,none": 0.25,
        "our_arc acc_bytes,none": 0.25,
    }
    assert all((measure["items"], measure["of"], measure["cut"]) == (5, 12, 0) for measure in found.values())
    assert "our_arc acc_bytes" in capsys.readouterr().out and out.with_suffix(".png").exists()


def test_items_that_the_model_cannot_see_whole_are_counted(harness, described, tmp_path):
    short = a_run(tmp_path / "short", context=16)
    assert harness.evaluate(short, ["our_arc"], described)["cut"] == {"our_arc": 12}


def test_an_unknown_task_and_data_that_are_not_there_are_told_in_one_line(run, harness, described, tmp_path, capsys):
    words = ["evaluate", str(run.checkpoint.parents[1]), "--include-path", str(tmp_path), "--tasks"]
    (tmp_path / "gone.yaml").write_text(TASK.format(task="gone", path=tmp_path / "gone.jsonl", more=BLIMP))
    assert main([*words, "gone"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("khanhllm: cannot load gone: ") and "gone.jsonl" in error


def test_the_harness_own_list_is_read_only_for_a_task_that_is_not_in_the_folder(harness, described, monkeypatch):
    read = []

    class Manager:
        all_tasks = ("our_arc", "piqa")

        def __init__(self, include_path=None, include_defaults=True):
            read.append(include_defaults)

        def load(self, names):
            return names

    monkeypatch.setattr(harness, "TaskManager", Manager)
    harness.tasks(["our_arc"], described)
    assert read == [False]
    with pytest.raises(harness.UserError, match=r"unknown task 'piqqa' \(did you mean piqa\?\)"):
        harness.tasks(["piqqa"], described)
    assert read == [False, False, True]


def test_a_text_rolls_through_whole_windows_as_in_evaluate(run, harness):
    from lm_eval.api.instance import Instance

    ids = run.tokenizer.encode("The old key in a box. " * 300)[: 3 * run.config.model.context]
    text = run.tokenizer.decode(ids)
    assert run.tokenizer.encode(text) == ids
    model = harness.HarnessModel(run)
    (log,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert -log / len(ids) == pytest.approx(run.score(text)["val_ce"], abs=1e-5)


def test_a_continuation_is_written_as_generate_writes_it(run, harness):
    from lm_eval.api.instance import Instance

    model, prompt = harness.HarnessModel(run), "The cat sat"
    greedy = run.generate(prompt, tokens=9, temperature=0)[0]
    asked = {"until": ["", "\x00"], "max_gen_toks": 9, "do_sample": False, "temperature": 0.7}
    assert model.generate_until([Instance("generate_until", {}, (prompt, asked), 0)]) == [greedy]
    until = {"until": greedy[3:5], "max_gen_toks": 9}
    assert model.generate_until([Instance("generate_until", {}, (prompt, until), 0)]) == [greedy.split(greedy[3:5])[0]]


def test_without_the_harness_the_extra_is_named(run, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "khanhllm.lab.harness", raising=False)
    monkeypatch.delattr(lab, "harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", str(run.checkpoint.parents[1]), "--tasks", "piqa"]) == 2
    assert "khanhllm[eval]" in capsys.readouterr().err
    assert missing_extra(ModuleNotFoundError(name="lm_eval.api"))


@pytest.fixture(scope="module")
def scored(run, files):
    """Pairs of every shape, with what our class says of each."""
    names = ("causative", "arc_easy", "winogrande", "lambada_openai")
    questions = [q for name in names for q in sets.questions(sets.load(sets.found(files)[name]), "\nAnswer: ", 6)]
    pairs = [encode(run.tokenizer, *choice) for question in questions for choice in question.choices]
    return pairs, [one.log for one in log_likelihoods(run.model, pairs, run.machine)]


def test_the_exported_model_finds_the_same_likelihoods_in_transformers(run, scored, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = run.export(tmp_path / "hf", to="hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for (before, after), log in zip(*scored, strict=True):
        ids = torch.tensor([before + after])
        with torch.no_grad():
            logits_CV = model(ids).logits[0, len(before) - 1 : -1]
        theirs = logits_CV.double().log_softmax(-1).gather(1, ids[0, len(before) :, None]).sum().item()
        assert theirs == pytest.approx(log, abs=1e-3)


def test_the_server_echoes_the_same_likelihoods(run, scored):
    testclient = pytest.importorskip("starlette.testclient")
    with testclient.TestClient(house(run).guarded(), base_url="http://localhost:8000") as client:
        for (before, after), log in zip(*scored, strict=True):
            asked = {"prompt": before + after, "echo": True, "logprobs": 1, "max_tokens": 0}
            answer = client.post("/v1/completions", json=asked)
            assert answer.status_code == 200, answer.text
            given = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
            assert sum(given[-len(after) :]) == pytest.approx(log, abs=1e-3)
