"""What Python programs call: lazily imported, and leaving the process as it was."""

import gc
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import khanhllm
from khanhllm import UserError, cli
from khanhllm.cli.arguments import given
from khanhllm.data.tokenizer import train_tokenizer
from khanhllm.machine import devices
from khanhllm.runs.evaluate import score_opened
from khanhllm.runs.listing import runs_in
from khanhllm.runs.run import open_run

KNOBS = {
    "model.dim": 32,
    "model.hidden": 64,
    "model.vocab_size": 400,
    "model.context": 32,
    "train.sample_tokens": 0,
    "machine.device": "cpu",
    "machine.threads": 1,
}


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    knobs = {**KNOBS, "data.cache": str(folder / "shards"), "data.validation": 0.2}
    return khanhllm.train("nano", data=corpus, run=folder / "run", steps=4, **knobs), folder


def test_training_gives_an_opened_run(trained):
    run, folder = trained
    assert run.step == 4 and run.config.model.dim == 32
    assert isinstance(run, khanhllm.Run)
    losses = khanhllm.history(folder / "run")["loss"]
    assert len(losses) == 4 and np.isfinite(losses).all()


def test_a_run_can_be_continued(trained, tmp_path):
    run, _ = trained
    copy = run.save(tmp_path / "copy")
    with pytest.warns(UserWarning, match="continues with its own config, not with preset nano: its model.dim"):
        more = khanhllm.train("nano", run=copy, resume=True, steps=6)
    whole = khanhllm.train("nano", run=tmp_path / "whole", **{**KNOBS, **_data(run)}, steps=6)
    assert more.step == 6
    # the schedule of 4 steps differs from that of 6, so only steps and shape can agree
    assert whole.model.state_dict().keys() == more.model.state_dict().keys()
    with pytest.raises(UserError, match=r"is no empty folder; choose a new one$"):
        run.save(copy)


def _data(run):
    return {"data.source": str(run.data), "data.cache": run.config.data.cache}


def test_saved_and_loaded_it_is_the_same_model(trained, tmp_path):
    run, _ = trained
    run.save(tmp_path / "copies" / "copy")
    (row,) = runs_in(tmp_path / "copies")
    assert row["step"] == 4, "it has no log"
    again = khanhllm.load(run.save(tmp_path / "copy"), device="cpu", precision="fp32")
    ids = torch.arange(10).unsqueeze(0)
    assert torch.equal(again.model(ids), run.model(ids))
    assert (tmp_path / "copy" / "tokenizer.json").exists()


def test_logits_next_score_and_experts_agree_with_each_other(trained):
    run, _ = trained
    text = "import json"
    ids = [run.tokenizer.end_of_text, *run.tokenizer.encode(text)]
    logits = run.logits(text)
    assert logits.shape == (len(ids), 400)
    likeliest, probability = run.next(text, k=3)[0]
    known = logits[-1, : run.tokenizer.vocab_size].softmax(-1)
    assert probability == pytest.approx(known.max().item())
    assert likeliest == run.tokenizer.decode([int(known.argmax())])
    nats = -logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).mean().item()
    score = run.score(text)
    assert score["val_ce"] == pytest.approx(nats, rel=1e-5)
    assert score["val_bytes"] == len(text)
    experts = run.experts(text)
    assert experts.layers == [1, 3] and len(experts.tokens) == len(ids)
    assert experts.expert_LTK.shape == (2, len(ids), 2)
    assert experts.weight_LTK.sum(-1) == pytest.approx(1)


def test_generate_is_a_function_of_the_seed(trained):
    run, _ = trained
    first, second = run.generate("def ", n=2, tokens=12, seed=3)
    assert run.generate("def ", tokens=12, seed=4) == [second] and first != second
    assert run.generate("def ", tokens=12, seed=4, stop=None) == [second]
    assert "".join(run.stream("def ", tokens=12, seed=3)) == first


def test_what_makes_no_sense_is_one_line(trained, tmp_path):
    run, folder = trained
    for wrong, said in (
        (lambda: run.generate("x", temperature=-1), "temperature"),
        (lambda: run.generate("x", temprature=1), "did you mean temperature"),
        (lambda: run.logits("word " * 100), "sees 32 at once"),
        (lambda: run.score(""), "no text to score"),
        (lambda: score_opened(run, ""), "source of text is empty"),
        (lambda: run.score(None), "must be a str, got NoneType"),
        (lambda: run.stream(b"x"), "must be a str, got bytes"),
        (lambda: run.next("x", k=0), "k must be a whole number of at least 1, got 0"),
        (lambda: run.generate("x", n=-1), "n must be a whole number of at least 1, got -1"),
        (lambda: run.generate("x", seed="y"), "seed"),
        (lambda: khanhllm.train("nano", run=tmp_path / "none", resume=True), "holds no run to resume"),
        (lambda: khanhllm.train("nano", data="", run=tmp_path / "x"), "source of text is empty"),
        (lambda: khanhllm.load(tmp_path), "not a run folder"),
        (lambda: khanhllm.load(folder / "rum"), r"did you mean .*run\?\)"),
        (lambda: khanhllm.load(folder / "run", device="banana"), "machine.device"),
        (lambda: khanhllm.history(tmp_path), "not a run folder"),
        (lambda: khanhllm.history(run.save(tmp_path / "saved")), "saved has no training_log.csv yet; train the run"),
        (lambda: khanhllm.train("nanno"), "did you mean nano"),
        (lambda: khanhllm.train("nano", run=folder / "run"), "already holds a run"),
        (lambda: khanhllm.train("nano", learning_rate=1), "unknown argument learning_rate"),
        (lambda: khanhllm.config("nano", **{"optim.lrr": 1}), "did you mean lr"),
        (lambda: khanhllm.load(None), "run must be the name of a folder or file, as str or Path, got None"),
        (lambda: khanhllm.config(5), "preset must be"),
        (lambda: khanhllm.train("nano", time=5), "time: must be a time"),
        (lambda: khanhllm.train("nano", steps=1, time="1s"), "give one of steps, time and tokens"),
        (lambda: khanhllm.train("nano", data=["a"]), "data must be one source of text"),
        (lambda: khanhllm.train("nano", run=folder / "run"), "continue it with resume=True, .* with run="),
        (lambda: khanhllm.plan("nano", memory=-8), "memory: must be a size"),
        (lambda: khanhllm.plan("nano", memory=8), "^memory: 8 has no unit; write such as 8GB or 600MB$"),
        (lambda: run.save(""), "needs the name of a folder"),
        (lambda: run.save(tmp_path.parent), "is no empty folder"),
        (lambda: run.generate("x", stop=""), "none of them empty"),
    ):
        with pytest.raises(UserError, match=said):
            wrong()


def test_a_foreign_tokenizer_in_the_folder_is_noticed(trained, tmp_path, capsys):
    run, _ = trained
    copy = run.save(tmp_path / "copy")
    train_tokenizer(["quick brown foxes"] * 9, 270).save(copy / "tokenizer.json")
    said = "not the tokenizer that the model learned with"
    with pytest.raises(UserError, match=said):
        khanhllm.load(copy)
    assert cli.main(["export", str(copy), "--to", "hf", "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_checkpoint_that_a_training_removed_cannot_be_saved_and_that_is_one_line(trained, tmp_path):
    opened = khanhllm.load(trained[0].save(tmp_path / "copy"))
    shutil.rmtree(opened.checkpoint)
    with pytest.raises(UserError, match=r"cannot read .*step-.*: No such file"):
        opened.save(tmp_path / "again")
    assert not (tmp_path / "again").exists() and opened.identity == trained[0].identity


def test_a_run_shows_itself_in_one_line(trained):
    run, folder = trained
    numbers = sum(parameter.numel() for parameter in run.model.parameters())
    assert repr(run) == f"<Run {str(folder / 'run')!r}: step 4, {numbers / 1000:.1f} k parameters>"


def test_a_prompt_too_long_warns(trained):
    with pytest.warns(UserWarning, match="sees only the last 31"):
        trained[0].generate("word " * 100, tokens=1)


def test_opening_a_run_changes_nothing_of_the_process(trained):
    _, folder = trained
    code = f"""
import gc, sys, torch
torch.set_num_threads(2)
before = torch.get_num_threads(), torch.get_float32_matmul_precision(), gc.get_freeze_count()
import khanhllm
import khanhllm.machine.devices as devices
def refuse(*_): raise SystemExit("the allocator was changed, or the machine measured")
devices.keep_freed_memory = devices.matmul_rate = refuse
run = khanhllm.load({str(folder / "run")!r}, device="cpu")
run.generate("x", tokens=3); run.score("import json"); run.next("x")
assert before == (torch.get_num_threads(), torch.get_float32_matmul_precision(), gc.get_freeze_count())
assert "torch._dynamo" not in sys.modules  # the compiler, which takes longer to import than to write a line
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_trains_off_the_main_thread_and_lets_its_memory_go(trained, tmp_path):
    run, _ = trained
    found = []
    knobs = {**KNOBS, **_data(run)}
    thread = threading.Thread(target=lambda: found.append(khanhllm.train("nano", run=tmp_path, steps=2, **knobs)))
    thread.start()
    thread.join()
    assert found[0].step == 2
    assert gc.get_freeze_count() == 0


def test_training_gives_the_process_its_threads_back(trained, tmp_path):
    run, _ = trained
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        khanhllm.train("nano", run=tmp_path / "run", steps=1, **{**KNOBS, **_data(run)})
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_training_that_is_refused_gives_them_back_too(trained, tmp_path):
    run, _ = trained
    before = torch.get_num_threads()
    with pytest.raises(UserError, match="nowhere"):
        knobs = KNOBS | _data(run) | {"data.source": str(tmp_path / "nowhere"), "machine.threads": before + 1}
        khanhllm.train("nano", run=tmp_path / "run", steps=1, **knobs)
    assert torch.get_num_threads() == before


def test_a_script_without_a_guard_trains_once(tmp_path):
    """Worker processes that prepare the data do not run the script again."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for nth in range(3):  # more than one group of files, so that there are workers
        (texts / f"{nth}.txt").write_text("some words to learn from, and a line feed\n\n" * 120_000)
    knobs = {**KNOBS, "data.cache": str(tmp_path / "shards"), "data.workers": 2, "data.tokenizer_sample": 10_000}
    script = tmp_path / "script.py"
    script.write_text(
        "import khanhllm\nprint('begun')\n"
        f"khanhllm.train('nano', data={str(texts)!r}, run={str(tmp_path / 'run')!r}, steps=1, **{knobs!r})\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("begun") == 1 and "Traceback" not in done.stderr


def test_importing_is_light():
    code = "import sys, khanhllm; khanhllm.presets(); khanhllm.config('nano')"
    code += "; sys.exit(str([n for n in ('torch', 'numpy', 'rich', 'datatrove') if n in sys.modules]).strip('[]') or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    for name in (*khanhllm.__all__, "__version__"):
        assert getattr(khanhllm, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        khanhllm.nothing  # noqa: B018


def test_dotted_names_reach_the_command_line_as_they_reach_the_api():
    import argparse

    assert given(argparse.Namespace(**{"optim.lr": "1", "run": "x"})) == {"optim": {"lr": "1"}}


def test_the_score_of_a_run_is_that_of_the_command(trained):
    _, folder = trained
    score = score_opened(open_run(folder / "run"))
    assert score["val_tokens"] > 100


def test_tf32_is_set_where_it_is_asked_for(trained, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    monkeypatch.setattr(devices, "_precision", lambda wanted, _device: wanted)  # as on an NVIDIA GPU
    for precision in ("fp32", "tf32"):
        khanhllm.load(trained[1] / "run", device="cpu", precision=precision)
    assert asked == ["high"]


def test_of_a_text_longer_than_the_context_nothing_is_lost(trained):
    """Every token is scored, and what follows is read off the end."""
    run, _ = trained
    text = "import json, logging\n" * 20
    ids = run.tokenizer.encode(text)
    score = run.score(text)
    assert (score["val_tokens"], score["val_bytes"]) == (len(ids), len(text))
    with torch.no_grad():
        last = run.model.logits(torch.tensor([ids[-32:]]))[0, -1, : run.tokenizer.vocab_size]
    assert run.next(text, k=1)[0][1] == pytest.approx(last.softmax(-1).max().item())


def test_looking_at_the_experts_leaves_no_hook(trained):
    run, _ = trained
    run.experts("x")
    assert not [module for module in run.model.modules() if module._forward_hooks]


def test_the_history_has_every_column_of_the_log(trained):
    log = trained[1] / "run" / "training_log.csv"
    assert list(khanhllm.history(trained[1] / "run")) == log.read_text().splitlines()[0].split(",")
