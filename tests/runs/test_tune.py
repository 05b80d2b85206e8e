"""A run learns to talk, or goes on with other text, as a run of its own that does not forget where it came from."""

import csv
import io
import json
import shutil
from pathlib import Path
from threading import Event

import pytest
import torch

from conftest import save, tiny
from khanhllm import cli, load
from khanhllm.data.prepare import prepare
from khanhllm.data.replay import Replay
from khanhllm.data.shards import Shards
from khanhllm.errors import UserError
from khanhllm.runs.run import open_run
from khanhllm.runs.tune import go_on, tune
from khanhllm.settings import beside, read_config, resolve, to_toml, write_config
from khanhllm.training import checkpoint
from khanhllm.training import run as training_run
from khanhllm.training.run import train
from khanhllm.training.start import write_start

QUIET = {"machine": {"device": "cpu", "threads": 1}, "train": {"sample_tokens": 4}}
TIMING = {"tokens_per_s", "mfu", "waiting", "memory_mb", "seconds"}


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    own = {"data": {"source": str(corpus), "cache": str(folder / "shards"), "workers": 1}, "train": {"steps": 3}}
    train(resolve(tiny(context=64, pattern="DM").model_dump(), own), folder / "run")
    return folder / "run"


def chats(path, number=120):
    """Each a question of one digit and its answer, the same digit twice."""
    records = ({"question": f"{nth % 10} {nth}?", "answer": f"{nth % 10}{nth % 10}"} for nth in range(number))
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def logged(run):
    with (run / "training_log.csv").open() as file:
        return [{key: cell for key, cell in row.items() if key not in TIMING} for row in csv.DictReader(file)]


def tuned(base, out, source, settings=QUIET, **options):
    config = tune(base, out, source, settings=settings, **options)
    train(config, out, resume=True)
    return config


def test_the_way_of_the_command_line(base, tmp_path, capsys, monkeypatch):
    out = tmp_path / "my talks"
    words = ["tune", str(base), "--data", chats(tmp_path / "chats.jsonl"), "--out", str(out), "--epochs", "1"]
    assert cli.main([*words, "--machine.threads", "1", "--train.sample_tokens", "4"]) == 0
    assert f"khanhllm chat '{out}'\n" in capsys.readouterr().err
    rows = logged(out)
    assert rows[-1]["counted"] and float(rows[-1]["val_ce"]) > 0 and float(rows[-1]["base_bpb"]) > 0
    assert "<|user|>" in (out / "samples.txt").read_text() and "<|assistant|>" in (out / "samples.txt").read_text()
    assert load(out).talks and not load(base).talks
    assert cli.main(["runs", str(tmp_path)]) == 0 and "talks" in capsys.readouterr().out
    assert cli.main(["generate", str(out), "--prompt", "import", "--tokens", "3"]) == 0
    assert cli.main(["evaluate", str(out)]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", str(out), "--json", "--data", str(tmp_path / "chats.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out)["val_tokens"] == 120 * 3  # two digits and the end of each answer
    assert cli.main(words) == 2 and f"khanhllm train --resume --run '{out}')" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("1 1?\n/new\n2 2?\n"))
    assert cli.main(["chat", str(out), "--tokens", "3", "--temperature", "0"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_a_run_that_was_tuned_on_texts_is_not_said_to_talk(base, corpus, tmp_path, capsys):
    words = ["tune", str(base), "--data", str(corpus), "--out", str(tmp_path / "out"), "--train.targets", "all"]
    own = ["--epochs", "0.01", "--machine.threads", "1", "--data.cache", str(tmp_path / "shards")]
    assert cli.main([*words, *own]) == 0
    assert capsys.readouterr().err.endswith(f"to see what it writes: khanhllm generate {tmp_path / 'out'}\n")


def test_its_config_says_all_and_its_base_is_untouched(base, tmp_path):
    before = sorted((path.name, path.stat().st_mtime_ns) for path in base.rglob("*"))
    config = tune(base, tmp_path / "out", chats(tmp_path / "chats.jsonl"), rate=0.25, settings=QUIET)
    kept = open_run(base).config
    assert config.train.targets == "answers" and config.train.document_mask
    assert abs(config.data.replay - 0.3) < 0.1 and config.data.replay * config.train.rows_per_step == 2
    assert config.optim.lr == kept.optim.lr / 4 and config.model == kept.model
    assert config.data.base == str(open_run(base).data.absolute())
    assert sorted((path.name, path.stat().st_mtime_ns) for path in base.rglob("*")) == before
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(open_run(tmp_path / "out").model.logits(ids), open_run(base).model.logits(ids))


@pytest.mark.parametrize("replay", [0.3, 0.0])
def test_a_tuning_goes_on_bit_for_bit(base, tmp_path, replay):
    """From a checkpoint in its middle, as after kill -9."""
    source, whole, half = chats(tmp_path / "chats.jsonl"), tmp_path / "whole", tmp_path / "half"
    often = {"eval_every": 3, "save_every": 3, "sample_every": 0, "keep": 9, "steps": 8}
    config = tuned(base, whole, source, QUIET | {"train": QUIET["train"] | often}, replay=replay, epochs=1)
    shutil.copytree(whole, half)
    for path in checkpoint.steps(half):
        if checkpoint.step_of(path) > 3:
            shutil.rmtree(path)
    train(config, half, resume=True)
    one, two = (checkpoint.newest(run) / "model.safetensors" for run in (whole, half))
    assert one.parent.name == two.parent.name and one.read_bytes() == two.read_bytes()
    assert logged(whole) == logged(half)


def test_without_the_text_of_the_base_nothing_is_replayed(base, tmp_path):
    moved, source = tmp_path / "moved", chats(tmp_path / "chats.jsonl")
    shutil.copytree(base, moved)
    path = checkpoint.newest(moved)
    state = json.loads((path / "state.json").read_text()) | {"folder": str(tmp_path / "nowhere")}
    shutil.rmtree(path)
    model = open_run(base).model
    save(moved, 3, model, torch.optim.SGD(model.parameters()), state)
    with pytest.raises(UserError, match=r"nowhere, are gone, so none of its text can be replayed; go on without \("):
        tune(moved, tmp_path / "out", source, settings=QUIET)
    assert tune(moved, tmp_path / "out", source, settings=QUIET, replay=0).data.base == ""


def test_it_learns_to_end_its_answers(base, tmp_path):
    """The token that ends an answer, which no text has taught, is likely after a hundred steps."""
    record = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}
    other = {"question": "c?", "answer": "b"}
    source = tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps(one) + "\n" for one in [record] * 200 + [other]), encoding="utf-8")
    steps = {"steps": 100, "micro_batch": 2, "accumulation": 1, "eval_every": 0, "sample_every": 0, "save_every": 0}
    tuned(base, tmp_path / "out", str(source), QUIET | {"train": QUIET["train"] | steps}, replay=0.0, rate=3.0)
    run = open_run(tmp_path / "out")
    marks = [run.tokenizer.specials[f"<|{name}|>"] for name in ("endoftext", "user", "assistant", "end")]
    end_of_text, user, assistant, end = marks
    ids = [end_of_text, user, *run.tokenizer.encode("a?"), assistant, *run.tokenizer.encode("b")]
    assert run._logits(ids)[-1].softmax(-1)[end] > 0.9
    assert run.chat([{"role": "user", "content": "a?"}], temperature=0) == "b"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"epochs": 0}, "--epochs and --rate must be above 0"),
        ({"epochs": 1e308}, "--epochs at most 1,000,000, got 1e\\+308"),
        ({"settings": {"data": {"replay": 0.002}}}, "--replay must be 0, or from 0.1 to 0.9, got 0.002"),
        ({"replay": 1.0}, "--replay must be 0, or from 0.1 to 0.9"),
        ({"rate": -1.0}, "--epochs and --rate must be above 0"),
        ({"settings": {"model": {"context": 32}}}, "leave out --model options"),
        ({"settings": {"data": {"tokenizer": "other.json"}}}, "leave out --data.tokenizer"),
        ({"settings": {"machine": {"device": "cuda:63"}}}, "cuda"),
        ({"settings": {"data": {"base": "nowhere"}}}, "nowhere"),
        ({"settings": {"data": {"clean": "gopher"}}}, "cleans texts, and .* holds conversations; leave it out"),
    ],
)
def test_what_cannot_be_tuned_writes_nothing(base, tmp_path, options, why):
    tune(base, tmp_path / "before", source := chats(tmp_path / "chats.jsonl"))  # its rows lie in the cache
    with pytest.raises(UserError, match=why):
        tune(base, tmp_path / "out", source, **options)
    assert not (tmp_path / "out").exists()


def test_the_conversations_of_the_base_are_scored_as_it_scored_them(base, tmp_path):
    """Where nothing is learned, nothing is forgotten."""
    tuned(base, tmp_path / "first", chats(tmp_path / "chats.jsonl"))
    still = QUIET | {"train": {"steps": 1, "sample_tokens": 0}, "optim": {"lr": 1e-12}}
    tuned(tmp_path / "first", tmp_path / "second", chats(tmp_path / "more.jsonl", 150), settings=still)
    forgets, knew = logged(tmp_path / "second")[-1], logged(tmp_path / "first")[-1]
    assert float(forgets["base_bpb"]) == pytest.approx(float(knew["val_bpb"]), rel=1e-4)


def test_the_text_of_the_base_is_scored_without_a_mask_as_it_scored_it(base, tmp_path, monkeypatch):
    readings, honest = [], training_run.score
    monkeypatch.setattr(training_run, "score", lambda *given: readings.append(given[-1]) or honest(*given))
    tuned(base, tmp_path / "talks", chats(tmp_path / "chats.jsonl"))
    assert [bool(reading) for reading in readings[-2:]] == [True, False]


def test_a_replay_of_nothing_is_refused(base, corpus, tmp_path, capsys):
    words = ["train", "nano", "--data", str(corpus), "--run", str(tmp_path / "run"), "--data.replay", "0.5"]
    assert cli.main([*words, "--data.cache", str(tmp_path / "shards"), "--machine.threads", "1"]) == 2
    assert "data.replay = 0.5 needs data.base" in capsys.readouterr().err
    assert not (tmp_path / "shards").exists(), "before any text is prepared"


def test_checkpoints_that_lie_where_it_is_to_write_are_not_taken_for_its_own(base, tmp_path):
    """It would have gone on from them, instead of from the run that is named."""
    out = tmp_path / "my out"
    shutil.copytree(base / "checkpoints", out / "checkpoints")
    why = r"out already holds a run; continue it .*/my out'\), or name another folder \(--out\)"
    with pytest.raises(UserError, match=why):
        tune(base, out, chats(tmp_path / "chats.jsonl"))
    assert not (out / "config.toml").exists()


def test_a_run_goes_on_with_other_text(base, corpus, tmp_path, capsys):
    """Continued pre-training: the weights and the tokenizer of a run, a config and a folder of its own."""
    (tmp_path / "other.txt").write_text("\n\n".join(f"A line about the number {n}." for n in range(3000)), "utf-8")
    words = ["train", "--from", str(base), "--data", str(tmp_path / "other.txt"), "--run", str(tmp_path / "more")]
    words += ["--machine.threads", "1", "--train.steps", "2", "--data.cache", str(tmp_path / "shards")]
    assert cli.main([*words, "--data.replay", "0.5"]) == 0
    more = open_run(tmp_path / "more")
    assert more.tokenizer.sha256 == open_run(base).tokenizer.sha256 and more.step == 2
    assert float(logged(tmp_path / "more")[-1]["base_bpb"]) > 0
    capsys.readouterr()
    assert cli.main([*words[:-6], "--run", str(tmp_path / "x"), "--model.dim", "64"]) == 2
    assert "leave out --model options" in capsys.readouterr().err and not (tmp_path / "x").exists()
    assert cli.main([*words, "--resume"]) == 2


def test_replayed_rows_are_those_of_the_base_whatever_the_step(base):
    folder = open_run(base).data
    own, old = Shards.open(folder, "validation", 8), Shards.open(folder, "train", 8)
    for share in (0.3, 1 / 3, 0.5, 0.05):
        mixed = Replay(own, old, share)
        whole = [row.tolist() for row, _ in zip(mixed.rows_from(0, 7, Event()), range(40), strict=False)]
        for start in (1, 2, 17):
            rest = zip(mixed.rows_from(start, 7, Event()), range(40 - start), strict=False)
            assert [row.tolist() for row, _ in rest] == whole[start:]
        replayed = [
            row.tolist() for row, _ in zip(old.rows_from(0, 7, Event()), range(round(40 * share)), strict=False)
        ]
        found = iter(whole)
        assert all(row in found for row in replayed)  # in their order
    assert Replay(own, old, 0.3).sha256 != Replay(own, old, 0.4).sha256


def test_a_mixture_is_balanced_while_it_is_tuned(base, tmp_path, capsys):
    """The balancing loss stays, and the doctor looks at the load."""
    config = tuned(base, tmp_path / "out", chats(tmp_path / "chats.jsonl"), epochs=1)
    assert config.loss == open_run(base).config.loss and config.loss.balance > 0
    assert all(float(row["balance"]) > 0 for row in logged(tmp_path / "out"))
    capsys.readouterr()
    cli.main(["doctor", str(tmp_path / "out")])
    assert "experts share the work" in capsys.readouterr().out


def test_processes_that_torchrun_started_write_no_first_checkpoint(base, tmp_path, capsys, monkeypatch):
    """Each would write its own and destroy those of the others."""
    source, out = chats(tmp_path / "chats.jsonl"), str(tmp_path / "my out")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for words in (["tune", str(base), "--data", source, "--out", out], ["train", "--from", str(base), "--run", out]):
        assert cli.main(words) == 2
        said = capsys.readouterr().err
        assert "or with --machine.processes, and then torchrun" in said and said.endswith(f" --run '{out}'\n")
        assert said.count("\n") == 1 and not Path(out).exists()


@pytest.mark.parametrize(
    "own", [{"train": {"micro_batch": 1, "accumulation": 40}}, {"data": {"replay": 0.4}}, {"train": {"micro_batch": 3}}]
)
def test_it_reads_the_conversations_as_often_as_asked_whatever_a_step_is_to_be(own, base, tmp_path):
    config = tune(base, tmp_path / "out", chats(tmp_path / "chats.jsonl", 400), epochs=20, settings=own)
    folder = Path(checkpoint.read_state(checkpoint.newest(tmp_path / "out"))["folder"])
    asked = 20 * Shards.open(folder, "train", config.model.context).rows
    a_step = config.train.rows_per_step * (1 - config.data.replay)
    assert config.train.rows_per_step == 40 or "accumulation" not in own.get("train", {})
    assert round(a_step, 6).is_integer() and asked <= round(config.train.steps * a_step) < asked + a_step


@pytest.mark.parametrize(
    "machine", [{"processes": 12}, {"processes": 3, "split": "all"}, {"processes": 2, "shares": "9,2"}]
)
def test_a_step_has_rows_for_all_processes(machine, base, tmp_path):
    """Those that the base was trained with, or that are asked for."""
    own = {"machine": QUIET["machine"] | machine}
    config = tune(base, tmp_path / "out", chats(tmp_path / "chats.jsonl"), settings=own)
    rows, hands = config.train.rows_per_step, 11 if "shares" in machine else machine["processes"]
    assert rows >= hands and ("split" not in machine or rows % hands == 0)


def test_a_step_of_too_few_rows_is_refused_before_anything_is_written(base, tmp_path, capsys):
    words = ["train", "--from", str(base), "--run", str(tmp_path / "out"), "--machine.processes", "3"]
    assert cli.main(words) == 2
    assert "a step has 2 rows, but 3 processes need one row each" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("replay", [0.3, 0.0])
def test_the_shards_of_its_base_may_lie_elsewhere_by_now(base, tmp_path, capsys, replay):
    """Without them a run goes on if it replays none of them. With others it would not be the same run."""
    old, new, out = (tmp_path / name for name in ("old", "new", "out"))
    shutil.copytree(open_run(base).data, old)
    own = QUIET | {"data": {"base": str(old)}, "train": QUIET["train"] | {"steps": 2}}
    tuned(base, out, chats(tmp_path / "chats.jsonl"), own, replay=replay)
    old.rename(new)
    words = ["train", "--resume", "--run", str(out), "--steps"]
    capsys.readouterr()
    assert cli.main([*words, "4"]) == (2 if replay else 0)
    if replay:
        assert f"{old}, which this run replays, are gone; name the place" in capsys.readouterr().err
        (tmp_path / "other.txt").write_text("\n\n".join(f"Another line, number {n}." for n in range(300)), "utf-8")
        prepare(str(tmp_path / "other.txt"), open_run(base).tokenizer, tmp_path / "x", validation=0.1, workers=1)
        assert cli.main([*words, "4", "--data.base", str(tmp_path / "x")]) == 2
        assert f" and {tmp_path / 'x'}; to train on other text" in capsys.readouterr().err
    else:
        assert not logged(out)[-1]["base_bpb"]
        assert (out / "messages.txt").read_text("utf-8").count("are gone, so base_bpb stays empty") == 1
    assert cli.main([*words, "6", "--data.base", str(new)]) == 0
    assert float(logged(out)[-1]["base_bpb"]) > 0


def test_a_run_goes_on_from_the_one_that_is_named_not_from_what_that_one_came_from(base, tmp_path):
    (tmp_path / "other.txt").write_text("\n\n".join(f"A line about the number {n}." for n in range(3000)), "utf-8")
    words = ["--train.steps", "1", "--machine.threads", "1", "--data.cache", str(tmp_path / "shards")]
    second, third, fourth = (tmp_path / name for name in ("second", "third", "fourth"))
    first = ["train", "--from", str(base), "--data", str(tmp_path / "other.txt"), "--data.replay", "0.5"]
    assert cli.main([*first, "--run", str(second), *words]) == 0
    assert open_run(second).config.data.base == str(open_run(base).data) != str(open_run(second).data)
    assert cli.main(["train", "--from", str(second), "--run", str(third), *words]) == 0
    found = open_run(third).config.data
    assert (found.base, found.replay) == (str(open_run(second).data), 0)
    given = ["--data.base", str(open_run(base).data), "--data.replay", "0.25"]
    assert cli.main(["train", "--from", str(second), "--run", str(fourth), *words, *given]) == 0
    found = open_run(fourth).config.data
    assert (found.base, found.replay) == (str(open_run(base).data), 0.25)


def test_experts_that_come_from_a_run_are_not_tied_and_its_config_says_so(base, tmp_path, capsys):
    kept, tying = tmp_path / "kept", {"schedule": {"tied_experts": 0.2}}
    shutil.copytree(base, kept)
    write_config(resolve(read_config(base).model_dump(), tying), kept)
    (tmp_path / "tying.toml").write_text(to_toml(read_config(kept)), "utf-8")
    words = ["train", "--from", str(kept), "--train.steps", "1", "--machine.threads", "1"]
    assert cli.main([*words, "--run", str(tmp_path / "plain")]) == 0
    assert cli.main([*words, "--run", str(tmp_path / "of a file"), "--config", str(tmp_path / "tying.toml")]) == 0
    tune(kept, tmp_path / "tuned", chats(tmp_path / "chats.jsonl"), settings=QUIET)
    for run in ("plain", "of a file", "tuned"):
        assert read_config(tmp_path / run).schedule.tied_experts == 0
    assert "tied_experts" not in capsys.readouterr().out
    assert cli.main([*words, "--run", str(tmp_path / "typed"), "--schedule.tied_experts", "0.5"]) == 0
    assert "schedule.tied_experts = 0.5 changes nothing" in capsys.readouterr().out


def test_a_file_where_it_is_to_write_is_refused_before_long_work(base, tmp_path):
    (out := tmp_path / "one.txt").write_text("mine")
    for begin in (lambda: tune(base, out, "nowhere.jsonl"), lambda: go_on(base, out, read_config(base))):
        with pytest.raises(UserError, match=r"cannot write .*one\.txt"):
            begin()
    assert out.read_text() == "mine"


def test_another_tokenizer_than_that_of_the_run_is_refused(base, corpus, tmp_path, capsys):
    words = ["train", "--from", str(base), "--run", str(tmp_path / "out"), "--train.steps", "1", "--data.tokenizer"]
    assert cli.main([*words, str(tmp_path / "other.json")]) == 2
    assert capsys.readouterr().err.endswith(f"the tokenizer is that of {base}; leave out --data.tokenizer\n")
    assert not (tmp_path / "out").exists()
    assert cli.main([*words, str(base / "tokenizer.json")]) == 0


def test_a_run_that_is_typed_as_a_dot_has_its_name(base, tmp_path, monkeypatch):
    """What is made of it does not lie hidden inside it."""
    for place, typed in ((base, "."), (base / "checkpoints", ".."), (base.parent, "run")):
        monkeypatch.chdir(place)
        assert beside(typed, "-more").absolute() == base.parent / "run-more"
    monkeypatch.chdir(base)
    with monkeypatch.context() as patch:
        patch.setattr("khanhllm.runs.tune.go_on", lambda _run, out, _config: pytest.fail(f"into {out}"))
        with pytest.raises(pytest.fail.Exception, match=f"into {base}-more"):
            cli.main(["train", "--from", "."])


def test_weights_that_have_read_no_text_have_none_to_replay_or_score(base, tmp_path, capsys, monkeypatch):
    """As of an imported model, also where the folder at hand happens to hold shards."""
    opened, new = open_run(base), tmp_path / "new"
    write_start(new, opened.config, opened.model, opened.tokenizer)
    monkeypatch.chdir(opened.data)
    assert cli.main(["evaluate", str(new)]) == 2
    assert "this run has read no text yet; name one (--data)" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"new has read no text yet, so none can be replayed; go on without \(--replay"):
        tune(new, tmp_path / "out", chats(tmp_path / "chats.jsonl"), settings=QUIET)
    assert tune(new, tmp_path / "out", str(tmp_path / "chats.jsonl"), settings=QUIET, replay=0).data.base == ""


def test_what_an_interrupted_tune_left_is_no_run(base, tmp_path):
    (tmp_path / "talks/checkpoints/step-0000000.tmp").mkdir(parents=True)
    tune(base, tmp_path / "talks", chats(tmp_path / "chats.jsonl"), settings=QUIET)
    assert [path.name for path in (tmp_path / "talks/checkpoints").iterdir()] == ["step-0000000"]
