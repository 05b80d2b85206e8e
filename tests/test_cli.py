"""Every verb by its words, and wrong input of every kind: one line on stderr, exit code 2, nothing lost."""

import errno
import gzip
import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest
import torch

import khanhllm
from conftest import exit_code, tiny
from khanhllm import cli
from khanhllm.model.twin import dense_twin
from khanhllm.settings import preset, resolve, to_toml
from khanhllm.training import run

VERBS = ["tokenizer", "prepare", "train", "generate", "evaluate", "doctor", "demo", "data"]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A tiny run, made through the front door; everything below reads it and nothing writes to it."""
    place = tmp_path_factory.mktemp("trained")
    (place / "tiny.toml").write_text(to_toml(tiny(vocab_size=600)))
    words = ["train", "--config", str(place / "tiny.toml"), "--data", str(corpus), "--run", str(place / "run")]
    knobs = ["--steps", "4", "--data.validation", "0.2", "--data.workers", "1", "--data.cache", str(place / "shards")]
    assert cli.main([*words, *knobs, "--log.every", "1"]) == 0
    return place


def refused(capsys, *words: object) -> str:
    """Run it, expect exit code 2 and a single line, and return that line."""
    code = exit_code([str(word) for word in words])
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("khanhllm")]
    assert code == 2, error
    assert len(lines) == 1, error
    assert error.splitlines()[-1] == lines[0]
    assert "Traceback" not in error
    return lines[0]


@pytest.mark.parametrize("verb", VERBS)
def test_help_needs_no_torch_and_explains_each_option(verb):
    """What makes it answer in under a second."""
    code = f"import sys; from khanhllm import cli\ntry: cli.main(['{verb}', '--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'datatrove', 'numpy', 'rich') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("[]\n")
    parser = next(a.choices for a in cli._parser()._actions if isinstance(a.choices, dict))[verb]
    assert all(action.help for action in parser._actions)


def test_help_shows_all_that_a_key_takes():
    train = next(a.choices for a in cli._parser()._actions if isinstance(a.choices, dict))["train"]
    shown = {option: action.metavar for action in train._actions for option in action.option_strings}
    assert shown["--model.value_embedding"] == "true|false|normed" and shown["--train.micro_batch"] == "VALUE|auto"
    assert shown["--machine.weights"] == "fp32|bf16" and shown["--train.steps"] == "VALUE"


@pytest.mark.parametrize("words", [[], ["help"], ["--help"]])
def test_help_names_every_verb_in_a_whole_sentence(words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, verb, _ in cli._verbs():
        sentence = inspect.cleandoc(verb.__doc__).splitlines()[0]
        assert sentence[0].isupper() and sentence.endswith(".") and f" {name} {sentence}" in text


def test_help_of_a_verb_and_the_version(capsys):
    for words in (["help", "train"], ["train", "--help"]):
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        assert end.value.code == 0
    whole, again = capsys.readouterr().out.split("usage: ")[1:]
    assert whole == again and "--optim.lr" in whole
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert re.fullmatch(r"khanhllm \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_shell_can_be_taught_to_complete(shell, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--print-completion", shell])
    assert end.value.code == 0
    script = capsys.readouterr().out
    assert "evaluate" in script and ("--optim.lr" in script or shell == "tcsh")  # which completes verbs alone


def test_from_the_command_line_to_backward_are_four_calls(corpus, tmp_path, monkeypatch):
    seen = []
    honest = torch.Tensor.backward

    def backward(loss, *arguments, **named):
        files = [frame.filename for frame in inspect.stack(0)]
        seen.append(len([name for name in files if "khanhllm" in Path(name).parts]))
        return honest(loss, *arguments, **named)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    (tmp_path / "tiny.toml").write_text(to_toml(tiny(vocab_size=600)))
    words = ["--config", str(tmp_path / "tiny.toml"), "--data", str(corpus), "--data.cache", str(tmp_path / "shards")]
    assert cli.main(["train", *words, "--data.validation", "0.2", "--steps", "1", "--run", str(tmp_path / "run")]) == 0
    assert set(seen) == {4}  # main, the verb, the loop, the step


def test_generate_without_a_standard_output_is_no_fault(trained, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout", None)
    assert cli.main(["generate", str(trained / "run"), "--tokens", "1"]) == 0
    assert not capsys.readouterr().err


def test_generate_streams_text(trained, capsys):
    assert cli.main(["generate", str(trained / "run"), "--prompt", "import [red]é", "--tokens", "5"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("import [red]é")
    cli.main(["generate", str(trained / "run"), "--prompt", "import [red]é", "--tokens", "5"])
    assert capsys.readouterr().out == first


def test_seeds_go_round(trained, capsys):
    largest = 2**63 - 1
    words = ["generate", str(trained / "run"), "--tokens", "3", "--json"]
    assert cli.main([*words, "--seed", str(largest), "--samples", "2"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["seed"] for line in told] == [largest, 0]
    assert khanhllm.load(trained / "run").generate(tokens=3, seed=largest, n=2) == [line["text"] for line in told]


def test_a_prompt_from_a_file_or_the_standard_input(trained, tmp_path, monkeypatch, capsys):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"import\nos\n")
    words = ["generate", str(trained / "run"), "--tokens", "3"]
    with file.open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert cli.main([*words, "--prompt", "-"]) == 0
    typed = capsys.readouterr().out
    assert cli.main([*words, "--prompt-file", str(file)]) == 0
    assert capsys.readouterr().out == typed and typed.startswith("import\nos\n")
    file.write_bytes(b"\xff")
    assert "is not UTF-8" in refused(capsys, *words, "--prompt-file", file)
    assert "cannot read the prompt" in refused(capsys, *words, "--prompt-file", tmp_path)


def test_samples_have_seeds_of_their_own_and_stop(trained, capsys):
    words = ["generate", str(trained / "run"), "--prompt", "import", "--tokens", "8", "--seed", "3", "--json"]
    assert cli.main([*words, "--samples", "2"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["seed"], second["seed"]) == (3, 4) and first["text"] != second["text"]
    assert cli.main([*words, "--stop", "never there", "--stop", first["text"][2:4]]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == first["text"].partition(first["text"][2:4])[0]


def test_a_prompt_whose_beginning_is_forgotten_is_told(trained, capsys):
    assert cli.main(["generate", str(trained / "run"), "--prompt", "words " * 200, "--tokens", "1"]) == 0
    error = capsys.readouterr().err
    assert "the model sees only the last 31" in error and len(error.splitlines()) == 1


def test_a_refused_training_leaves_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "no/such" in refused(capsys, "train", "nano", "--data", "no/such")
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_no_text(trained, tmp_path, capsys):
    words = ["train", "nano", "--data", trained / "run", "--run", tmp_path / "new"]
    assert "is a run, which holds no text" in refused(capsys, *words)


def test_evaluate_counts_every_byte(trained, corpus, tmp_path, capsys):
    assert cli.main(["evaluate", str(trained / "run"), "--json"]) == 0
    held_out = json.loads(capsys.readouterr().out)
    assert set(held_out) == {"val_ce", "val_bpb", "val_bytes", "val_tokens"}
    path = tmp_path / "some.txt"
    path.write_text("Ünïcödé, and plain text.\n" * 40, encoding="utf-8")
    assert cli.main(["evaluate", str(trained / "run"), "--data", str(path), "--json"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert score["val_bytes"] == path.stat().st_size
    assert cli.main(["evaluate", str(trained / "run")]) == 0
    assert "bits per byte" in capsys.readouterr().out


def test_doctor_examines_a_run_and_a_preset(trained, capsys):
    assert cli.main(["doctor", str(trained / "run"), "--json"]) in (0, 1)  # four steps may leave an expert hungry
    report = json.loads(capsys.readouterr().out)
    assert all(finding["kept"] for finding in report["findings"] if "experts share" not in finding["law"])
    assert cli.main(["doctor", "khanh-692m"]) == 0
    assert "692,196,352" in capsys.readouterr().out


def test_the_run_folder_reproduces_the_run(trained, tmp_path):
    words = ["train", "--config", str(trained / "run" / "config.toml"), "--run", str(tmp_path / "again")]
    assert cli.main(words) == 0
    weights = "checkpoints/step-0000004/model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (trained / "run" / weights).read_bytes()


def test_tokenizer_and_prepare_then_train_on_the_shards(corpus, trained, tmp_path):
    made = tmp_path / "tok.json"
    assert cli.main(["tokenizer", "--data", str(corpus), "--vocab-size", "600", "--out", str(made)]) == 0
    shards = ["--tokenizer", str(made), "--out", str(tmp_path / "shards"), "--workers", "1", "--validation", "0.2"]
    assert cli.main(["prepare", "--data", str(corpus), *shards]) == 0
    train = ["train", "--config", str(trained / "tiny.toml"), "--data", str(tmp_path / "shards"), "--steps", "1"]
    assert cli.main([*train, "--run", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "nanoo"], "did you mean nano"),
        (["train"], "name a preset"),
        (["train", "nano", "--optim.lrr", "1"], "--optim.lr"),
        (["train", "nano", "--optim.lr", "fast"], "optim.lr"),
        (["train", "nano", "--optim.lr", "-1"], "optim.lr"),
        (["train", "nano", "--steps", "0"], "--steps: must be at least 1 (got '0')"),
        (["train", "nano", "--steps"], "--steps"),
        (["train", "nano", "--model.heads", "7"], "multiple of heads"),
        (["train", "nano", "--machine.device", "cuda:9"], "cuda:9"),
        (["train", "nano", "--machine.precision", "fp8"], "bf16"),
        (["train", "--config", "nowhere.toml"], "nowhere.toml"),
        (["train", "nano", "--data", "no/such/thing"], "no/such/thing"),
        (["trian"], "did you mean train?"),
        (["help", "train", "extra"], "one word too many"),
        (["train", "nano", "mini"], "one word too many: 'mini'"),
        (["train", "nano", "--lr", "1"], "did you mean --optim.lr?"),
        (["train", "nano", "--learning-rate", "1"], "did you mean --optim.lr?"),
        (["train", "nano", "--batch-size", "1"], "did you mean --train.micro_batch?"),
        (["train", "nano", "--run", "-dash"], "--run=-value"),
        (["train", "nano", "--run", ""], "the name is empty"),
        (["train", "nano", "--steps", "10q"], "--steps: must be a whole number, such as 1000 or 10k"),
        (["train", "nano", "--tokens", "0"], "--tokens: must be at least 1"),
        (["train", "nano", "--for", "10k"], "--for: must be a time"),
        (["train", "nano", "--for", "0s"], "--for: must be a time above 0"),
        (["train", "nano", "--machine.device", "tpu"], "must be auto, cpu, mps, cuda or cuda:N"),
        (["train", "nano", "--model.pattern", "DXD"], "each D (dense) or M (mixture)"),
        (["train", "nano", "--data.source", "texts", "--data", "nope"], "give one of --data and --data.source"),
        (["train", "nano", "--steps", "3", "--train.steps", "5"], "give one of --steps and --train.steps"),
        (["train", "nano", "--for", "1h", "--train.steps", "5"], "give one of --for and --train.steps"),
        (["train", "nano", "--for", "3m", "--train.seconds", "5"], "give one of --for and --train.seconds"),
        (["train", "nano", "--tokens", "3k", "--train.steps", "5"], "give one of --tokens and --train.steps"),
        (["tune", "no-run", "--data", "a", "--data.source", "b"], "give one of --data and --data.source"),
        (["tune", "no-run", "--data", "a", "--replay", "0.3", "--data.replay", "0"], "--replay and --data.replay"),
        (["chaos", "--faults", "1e400"], "must be a whole number"),
        (["generate", "no-run", "--stop", ""], "the text is empty"),
        (["generate", "no-run", "--stop", "\udcff"], "argument --stop: is not UTF-8 text"),
        (["generate", "no-run", "--prompt", "\udcff\udcfe bad"], "argument --prompt: is not UTF-8 text"),
        (["chat", "no-run", "--system", "\udcff"], "argument --system: is not UTF-8 text"),
        (["generate", "no-run", "--prompt", "a", "--prompt-file", "b"], "not allowed with"),
        (["tokenizer", "--data", "stdlib", "--out", "/dev/full"], "cannot write /dev/full: it is not a regular file"),
        (["generate", "no-run"], "not a run folder"),
        (["generate", "no-run", "--temperature", "hot"], "temperature"),
        (["generate", "no-run", "--top-p", "2"], "--top-p: must be at most 1 "),
        (["evaluate", "no-run"], "not a run folder"),
        (["evaluate", "no-run", "--data", ""], "the name is empty"),
        (["doctor", "no-run"], "neither a run folder nor a preset"),
        (["tokenizer", "--data", "stdlib", "--vocab-size", "10"], "--vocab-size: must be at least 264"),
        (["tokenizer", "--data", "ftp://x/y"], "unknown source"),
        (["prepare", "--data", "stdlib", "--tokenizer", "no.json", "--out", "x"], "no.json"),
    ],
)
def test_wrong_words(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, *words)


def text_file(path, data: bytes):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("empty.txt", b"", "empty.txt"),
        ("latin.txt", "naïve\n".encode("latin-1") * 100, "not UTF-8"),
        ("cut.json.gz", gzip.compress(b'{"text": "words and words"}\n' * 5000, mtime=0)[:-400], "cut short"),
        ("notes.docx", b"PK", "known endings"),
        ("broken.jsonl", b'{"text": "fine"}\n{"text": "br', "line 2"),
        ("other.jsonl", b'{"words": "no text"}\n', "no text column"),
        ("not.parquet", b"not a table at all", "not.parquet"),
    ],
)
def test_wrong_data(name, data, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = text_file(tmp_path / name, data)
    assert says in refused(capsys, "train", "nano", "--data", path, "--data.workers", "1", "--run", "run")


def test_a_run_folder_is_not_overwritten(trained, corpus, capsys):
    before = sorted((trained / "run").rglob("*"))
    assert "--resume" in refused(capsys, "train", "nano", "--data", corpus, "--run", trained / "run")
    assert sorted((trained / "run").rglob("*")) == before


def test_resuming_nothing_is_a_mistake(capsys, tmp_path):
    for words in ([], ["nano"], ["--config", tmp_path / "my.toml"]):
        said = refused(capsys, "train", *words, "--resume", "--run", tmp_path / "none")
        assert "holds no run to resume; leave --resume out to begin one" in said
    (tmp_path / "none/checkpoints/step-0000001").mkdir(parents=True)
    assert "it has checkpoints, but no config.toml" in refused(capsys, "train", "--resume", "--run", tmp_path / "none")
    assert "name a preset" in refused(capsys, "train", "--run", tmp_path / "none")


def test_a_preset_that_a_resumed_run_does_not_have_is_said(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("khanhllm.training.run.train", lambda *_, **__: "")
    words = ["train", "mini", "--resume", "--run", str(trained / "run")]
    assert cli.main(words) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "continues with its own config, not with preset mini: its model." in line
    for same in (words[:1] + words[2:], ["train", "nano", "--resume", "--run", str(tmp_path / "nano")]):
        (tmp_path / "nano").mkdir(exist_ok=True)
        (tmp_path / "nano" / "config.toml").write_text(to_toml(resolve(preset("nano"))), "utf-8")
        assert cli.main(same) == 0
        assert not capsys.readouterr().err


def test_a_tokenizer_that_does_not_match_the_shards(trained, corpus, tmp_path, capsys):
    shards = next(path for path in (trained / "shards").iterdir() if path.is_dir())
    cli.main(["tokenizer", "--data", str(corpus), "--vocab-size", "400", "--out", str(tmp_path / "other.json")])
    capsys.readouterr()
    words = ["train", "nano", "--data", shards, "--data.tokenizer", tmp_path / "other.json", "--run", tmp_path / "run"]
    assert "does not match" in refused(capsys, *words)


def test_a_vocabulary_larger_than_the_model(trained, tmp_path, capsys):
    shards = next(path for path in (trained / "shards").iterdir() if path.is_dir())
    words = ["train", "nano", "--data", shards, "--model.vocab_size", "300", "--run", tmp_path / "run"]
    assert "vocab_size" in refused(capsys, *words)


def test_a_corpus_shorter_than_the_context(tmp_path, capsys):
    path = text_file(tmp_path / "short.txt", b"One line of words.\n\n" * 300)
    words = ["train", "nano", "--data", path, "--run", tmp_path / "run", "--data.cache", tmp_path / "shards"]
    words += ["--steps", "1", "--model.context", "8192"]
    assert "context" in refused(capsys, *words)


def test_a_refusal_of_the_system_is_one_line_without_a_report(capsys, monkeypatch):
    def full(_options):
        """Breaks."""
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cli, "_verbs", lambda: [("full", full, lambda parser: None)])
    monkeypatch.setitem(cli.VERBS, "lab", ("full",))
    assert cli.main(["full"]) == 2
    assert capsys.readouterr().err == "khanhllm: cannot write the output: No space left on device\n"


def test_what_nobody_foresaw_is_one_line_too(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def broken(_options):
        """Breaks."""
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(cli, "_verbs", lambda: [("broken", broken, lambda parser: None)])
    monkeypatch.setitem(cli.VERBS, "lab", ("broken",))
    assert cli.main(["broken"]) == 1
    error = capsys.readouterr().err
    assert "RuntimeError: first line" in error
    assert len(error.splitlines()) == 1
    (report,) = tmp_path.iterdir()
    assert report.name in error and "second line" in report.read_text("utf-8")


def test_the_config_of_a_run_means_that_run(trained, tmp_path, monkeypatch):
    """Its folder, and not runs/config; any other file gives the folder its name."""
    seen = []
    monkeypatch.setattr(
        "khanhllm.training.run.train", lambda _config, folder, resume: seen.append((folder, resume)) or ""
    )
    kept, other = trained / "run" / "config.toml", tmp_path / "config.toml"
    other.write_text(kept.read_text())
    for words in (
        ["--resume", "--config", kept],
        ["--config", kept],
        ["--config", other],
        ["--config", kept, "--run", "x"],
    ):
        assert cli.main(["train", *map(str, words)]) == 0
    assert cli.main(["train", "--config", str(kept), "--twin", "active"]) == 0
    assert cli.main(["train", "nano", "--config", str(kept)]) == 0
    assert cli.main(["train", "--config", str(trained / "tiny.toml")]) == 0
    run = trained / "run"
    assert [folder for folder, _ in seen] == [
        run, run, Path("runs/config"), Path("x"), trained / "run-twin", Path("runs/nano"), Path("runs/tiny")
    ]  # fmt: skip


def test_only_the_twin_has_to_fit_into_its_settings(tmp_path, monkeypatch, capsys):
    """The experts of hour are tied, which goes with neither way to divide the work."""
    seen = []
    monkeypatch.setattr("khanhllm.training.run.train", lambda config, *_, **__: seen.append(config.model) or "")
    words = ["train", "hour", "--twin", "active", "--run", str(tmp_path / "run"), "--machine.processes", "2"]
    assert cli.main([*words, "--machine.split", "all"]) == 0
    assert seen == [dense_twin(resolve(preset("hour")).model)]
    assert cli.main([*words, "--machine.expert_processes", "2"]) == 2
    assert "machine.expert_processes (2) must divide the experts of a layer (0)" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["module", "script"])
def test_ctrl_c_while_python_still_imports_is_quiet_too(way, tmp_path):
    (tmp_path / "shtab.py").write_text("raise KeyboardInterrupt")
    project = tomllib.loads((Path(khanhllm.__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    module, _, name = project["project"]["scripts"]["khanhllm"].partition(":")
    words = {"module": ["-m", "khanhllm"], "script": ["-c", f"from {module} import {name}\nraise SystemExit({name}())"]}
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, *words[way], "runs"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "khanhllm: interrupted\n")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 128 + 10), ("SIGHUP", 129)])
def test_a_training_that_a_signal_stopped_ends_with_its_code(name, code, trained, tmp_path, monkeypatch, capsys):
    """So that in `train && evaluate` the second does not follow a Ctrl-C; saved it is all the same."""
    honest = run.train_step

    def stopping(*arguments):
        result = honest(*arguments)
        if result[0].step == 2:
            os.kill(os.getpid(), getattr(signal, name))
        return result

    monkeypatch.setattr(run, "train_step", stopping)
    words = ["train", "--config", str(trained / "run" / "config.toml"), "--run", str(tmp_path / "my run")]
    assert cli.main(words) == code
    assert (tmp_path / "my run" / "checkpoints" / "step-0000002").exists()
    monkeypatch.undo()
    proposed = capsys.readouterr().out.partition("to continue: khanhllm ")[2].splitlines()[0]
    assert cli.main(shlex.split(proposed)) == 0


@pytest.mark.parametrize("verb", ["generate", "chat", "evaluate", "serve", "experts"])
def test_a_verb_that_does_not_train_refuses_what_only_a_training_heeds(trained, capsys, verb):
    assert "unknown option --machine.checkpointing" in refused(
        capsys, verb, trained / "run", "--machine.checkpointing", "full"
    )
