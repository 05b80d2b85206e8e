"""20 steps equal 10 + 10 resumed, bit for bit: weights, moments, CSV. Also in three pieces, and from a signal."""

import csv
import hashlib
import json
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as as_file

from conftest import tiny
from khanhllm.data import prepare
from khanhllm.data.belt import Starved
from khanhllm.data.shards import Shards
from khanhllm.errors import UserError
from khanhllm.log.compare import read
from khanhllm.runs.evaluate import score_opened
from khanhllm.runs.run import open_run
from khanhllm.schema import Config, TrainConfig
from khanhllm.settings import read_config, resolve, write_config
from khanhllm.training import checkpoint, saver, tensor_files
from khanhllm.training import run as training_run
from khanhllm.training.parts import nothing_left
from khanhllm.training.run import train
from khanhllm.training.step import State

TIMING = {"tokens_per_s", "mfu", "waiting", "memory_mb", "seconds"}


def config(corpus: Path, cache: Path, **settings: dict[str, object]) -> Config:
    run = {
        "data": {"source": str(corpus), "cache": str(cache), "validation": 0.2, "workers": 1},
        "train": {
            "steps": 20,
            "accumulation": 2,
            "eval_every": 4,
            "eval_tokens": 200,
            "save_every": 5,
            "sample_every": 7,
        },
        "schedule": {"warmup": 4},
        "log": {"every": 3},
    }
    return resolve(tiny().model_dump(), run, settings)


def outcome(run: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Hashes of what the newest checkpoint holds and of the experts' loads; the CSV without what depends on time."""
    newest = checkpoint.newest(run)
    kept = {path.name: path.read_bytes() for path in [newest / "state.json", *run.glob("experts.csv")]}
    kept |= {tensor_files.name(kind): in_one_file(newest, kind) for kind in tensor_files.KINDS}
    files = {name: hashlib.sha256(content).hexdigest() for name, content in kept.items()}
    with (run / "training_log.csv").open() as file:
        rows = [{key: value for key, value in row.items() if key not in TIMING} for row in csv.DictReader(file)]
    return files, rows


def in_one_file(path: Path, kind: str) -> bytes:
    """What a checkpoint's file of this kind is, or would be if one process had written it."""
    one = path / tensor_files.name(kind)
    return one.read_bytes() if one.exists() else as_file(tensor_files.load(path, kind))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optim": {"name": "adamw8bit"}, "model": {"dim": 64, "hidden": 128}},
        {"optim": {"name": "muon"}},
        {"optim": {"name": "muon"}, "machine": {"weights": "bf16"}},
        {"optim": {"name": "muon8bit"}, "model": {"dim": 64, "hidden": 128}},
        {"loss": {"load": "current"}, "machine": {"checkpointing": "full"}},
        {"model": {"pattern": "DD"}},
        {"train": {"document_mask": True}},
        {"machine": {"weights": "bf16"}},
        pytest.param({"machine": {"compile": "on"}}, marks=pytest.mark.slow),
        {"machine": {"weights": "bf16", "gradients": "bf16"}, "optim": {"name": "adamw8bit"}, "model": {"dim": 64}},
    ],
    ids=[
        "adamw",
        "adamw8bit",
        "muon",
        "muon-bf16",
        "muon8bit",
        "current-load",
        "dense",
        "documents",
        "bf16-weights",
        "compiled",
        "bf16-weights-and-gradients",
    ],
)
def test_stopped_and_resumed_equals_uninterrupted(settings, corpus, cache, tmp_path, monkeypatch):
    whole = config(corpus, cache, **settings)
    train(whole, tmp_path / "whole")
    honest = training_run.train_step

    def stop_after(step):
        def stopping(parts, state, rows):
            result = honest(parts, state, rows)
            if result[0].step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        monkeypatch.setattr(training_run, "train_step", stopping)

    for step in (7, 13, None):  # 7 and 13 lie between checkpoints, and 13 is a second resume
        stop_after(step)
        assert train(whole, tmp_path / "pieces", resume=step != 7) == ("SIGTERM" if step else "")
    assert outcome(tmp_path / "pieces") == outcome(tmp_path / "whole")
    assert len(outcome(tmp_path / "whole")[1]) == 20
    assert (tmp_path / "whole" / "experts.csv").exists() == bool(whole.model.moe_layers)


def test_a_kill_between_checkpoints_repeats_only_what_was_not_saved(corpus, cache, tmp_path):
    """What a kill -9 leaves: a CSV that is ahead of the newest checkpoint."""
    train(config(corpus, cache), tmp_path / "whole")
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed)
    shutil.rmtree(killed / "checkpoints" / "step-0000020")
    for name in ("training_log.csv", "experts.csv"):
        with (killed / name).open("a") as file:
            file.write("21,13")  # half a line
    train(config(corpus, cache), killed, resume=True)
    assert outcome(killed) == outcome(tmp_path / "whole")


def test_a_run_that_was_killed_before_it_saved_says_that_it_begins_anew(corpus, cache, tmp_path, capsys):
    run = tmp_path / "run"
    train(config(corpus, cache), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", run, ignore=shutil.ignore_patterns("checkpoints"))
    log = run / "training_log.csv"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:10]))  # up to step 9; step 5 was being saved
    capsys.readouterr()
    train(config(corpus, cache), run, resume=True)
    assert f"{run} has no checkpoint, so it begins anew, with random weights" in capsys.readouterr().err
    assert outcome(run) == outcome(tmp_path / "whole")


def test_a_broken_newest_checkpoint_falls_back(corpus, cache, tmp_path):
    train(config(corpus, cache), tmp_path / "run")
    before = outcome(tmp_path / "run")
    broken = tmp_path / "run" / "checkpoints" / "step-0000020" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1] + b"?")
    train(config(corpus, cache), tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == before


def test_another_seed_is_another_run(corpus, cache, tmp_path):
    """Or the equalities above would hold for any two runs."""
    for seed in (0, 1):
        train(config(corpus, cache, train={"seed": seed}), tmp_path / str(seed))
    assert outcome(tmp_path / "0")[0]["model.safetensors"] != outcome(tmp_path / "1")[0]["model.safetensors"]


def test_the_largest_seed_writes_samples_too(corpus, cache, tmp_path):
    train(config(corpus, cache, train={"seed": 2**63 - 1, "steps": 1}), tmp_path / "run")
    assert "--- step 1" in (tmp_path / "run" / "samples.txt").read_text("utf-8")


def test_micro_batches_do_not_change_the_run_beyond_rounding(corpus, cache, tmp_path):
    for micro_batch, accumulation in ((4, 1), (1, 4)):
        shape = {"micro_batch": micro_batch, "accumulation": accumulation}
        train(config(corpus, cache, train=shape), tmp_path / str(micro_batch))
    losses = [[float(row["loss"]) for row in outcome(tmp_path / name)[1]] for name in ("1", "4")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_a_full_disk_does_not_stop_the_run(corpus, cache, tmp_path, monkeypatch, capsys):
    honest = checkpoint.write

    def sometimes_full(run, whole):
        if whole.step == 10:
            raise OSError("No space left on device")
        return honest(run, whole)

    monkeypatch.setattr(checkpoint, "write", sometimes_full)
    train(config(corpus, cache), tmp_path / "run")
    assert "training continues" in capsys.readouterr().out
    assert checkpoint.newest(tmp_path / "run").name == "step-0000020"


def test_two_trainings_in_one_folder_are_refused(corpus, cache, tmp_path):
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(UserError, match="another training"):
        train(config(corpus, cache), tmp_path / "run")


def test_a_run_is_not_overwritten(corpus, cache, tmp_path):
    train(config(corpus, cache, train={"steps": 1}), tmp_path / "run")
    with pytest.raises(UserError, match="--resume"):
        train(config(corpus, cache), tmp_path / "run")


def test_checkpoints_without_their_config_are_not_overwritten_either(corpus, cache, tmp_path):
    train(config(corpus, cache, train={"steps": 1}), tmp_path / "run")
    (tmp_path / "run" / "config.toml").unlink()
    with pytest.raises(UserError, match="already holds a run"):
        train(config(corpus, cache), tmp_path / "run")
    assert checkpoint.newest(tmp_path / "run").name == "step-0000001"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"data": {"validation": 0.4}}, "data.validation"),
        ({"model": {"experts_per_token": 1}}, "model.experts_per_token"),
        ({"train": {"seed": 5}}, "train.seed"),
        ({"train": {"targets": "answers"}}, "train.targets"),
        ({"train": {"document_mask": True}}, "train.document_mask"),
        ({"train": {"steps": 2}}, "larger --steps"),
    ],
)
def test_what_a_resumed_run_cannot_change(settings, says, corpus, cache, tmp_path):
    train(config(corpus, cache, train={"steps": 2}), tmp_path / "run")
    before = (tmp_path / "run" / "config.toml").read_bytes()
    longer = {"train": {"steps": 4}} | {key: {**value} for key, value in settings.items()}
    with pytest.raises(UserError, match=says):
        train(config(corpus, cache, **longer), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "config.toml").read_bytes() == before


def test_what_a_resumed_run_may_change(corpus, cache, tmp_path):
    train(config(corpus, cache, train={"steps": 2}), tmp_path / "run")
    other = {"patience": 5, "disk": 10**9, "ahead": 1, "workers": 2}
    train(config(corpus, cache, train={"steps": 3}, data=other), tmp_path / "run", resume=True)
    assert checkpoint.newest(tmp_path / "run").name == "step-0000003"


def test_other_shards_are_refused(corpus, cache, tmp_path):
    """The folder that the run remembers was prepared again, from other text."""
    first = config(corpus, tmp_path / "own", train={"steps": 2})
    train(first, tmp_path / "run")
    (shards,) = (path for path in (tmp_path / "own").iterdir() if path.is_dir())
    shutil.rmtree(shards)
    other = config(corpus, tmp_path / "own", train={"steps": 2}, data={"validation": 0.4})
    train(other, tmp_path / "other")
    next(path for path in (tmp_path / "own").iterdir() if path.is_dir()).rename(shards)
    with pytest.raises(UserError, match="other shards"):
        train(config(corpus, tmp_path / "own"), tmp_path / "run", resume=True)


def test_a_resumed_run_takes_the_shards_it_has(corpus, tmp_path, monkeypatch):
    """From another working folder, and though the source has changed since."""
    monkeypatch.chdir(tmp_path)
    texts = shutil.copytree(corpus, tmp_path / "texts")
    train(config(texts, Path("shards"), train={"steps": 2}), tmp_path / "run")
    (texts / "more.txt").write_text("Something new.\n" * 100)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train(config(texts, Path("shards"), train={"steps": 4}), tmp_path / "run", resume=True)
    assert not (tmp_path / "elsewhere" / "shards").exists()


def test_a_disk_that_stays_full_stops_the_run_with_its_last_checkpoint(corpus, cache, tmp_path, monkeypatch):
    honest = checkpoint.write

    def full_after_5(run, whole):
        if whole.step > 5:
            raise OSError("No space left on device")
        return honest(run, whole)

    monkeypatch.setattr(checkpoint, "write", full_after_5)
    with pytest.raises(UserError, match=r"No space.*step-0000004, for --resume"):
        train(config(corpus, cache, train={"save_every": 2}), tmp_path / "run")
    assert checkpoint.newest(tmp_path / "run").name == "step-0000004"
    with (tmp_path / "run" / "training_log.csv").open() as file:
        assert len(file.readlines()) - 1 < 20


def test_rows_that_cannot_be_read_cost_no_step(corpus, cache, tmp_path, monkeypatch):
    honest = Shards.rows_from

    def rows_from(*given):
        yield from islice(honest(*given), 14 * 4)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Shards, "rows_from", rows_from)
    with pytest.raises(UserError, match=r"Input/output error \(at step [0-9]+; to continue: --resume"):
        train(config(corpus, cache, train={"save_every": 0}), tmp_path / "run")
    assert len(checkpoint.steps(tmp_path / "run")) == 1


def test_a_belt_that_starves_right_after_a_save_ends_the_run_as_at_any_other_step(corpus, cache, tmp_path, monkeypatch):
    honest = training_run.train_step

    def starving(learner, state, rows):
        if state.step == 5:
            raise Starved("nothing comes")
        return honest(learner, state, rows)

    monkeypatch.setattr(training_run, "train_step", starving)
    with pytest.raises(Starved, match=r"nothing comes \(at step 5; to continue: --resume"):
        train(config(corpus, cache), tmp_path / "run")
    assert checkpoint.newest(tmp_path / "run").name == "step-0000005"


def tick(monkeypatch):
    """A clock that each step moves by a second, and each look by a hair."""
    now = [0.0]
    honest = training_run.train_step

    def read():
        now[0] += 1e-6
        return now[0]

    def ticking(learner, state, rows):
        now[0] += 1
        return honest(learner, state, rows)

    monkeypatch.setattr(training_run, "train_step", ticking)
    monkeypatch.setattr(training_run.time, "perf_counter", read)


def test_a_run_by_time_spends_what_is_left(corpus, cache, tmp_path, monkeypatch):
    tick(monkeypatch)
    run = tmp_path / "run"
    train(config(corpus, cache, train={"seconds": 8, "save_every": 0}), run)
    assert checkpoint.newest(run).name == "step-0000007"  # an eighth would not have left time to save
    train(config(corpus, cache, train={"seconds": 12, "save_every": 0}), run, resume=True)
    assert checkpoint.newest(run).name == "step-0000011"
    with pytest.raises(UserError, match="longer --for"):
        train(config(corpus, cache, train={"seconds": 11}), run, resume=True)


def test_the_time_of_a_run_by_steps_counts_when_it_goes_on_by_time(corpus, cache, tmp_path, monkeypatch):
    tick(monkeypatch)
    run = tmp_path / "run"
    train(config(corpus, cache, train={"steps": 4, "save_every": 0}), run)
    with pytest.raises(UserError, match="has used 4 s already; to continue, give a longer --for"):
        train(config(corpus, cache, train={"seconds": 3}), run, resume=True)
    train(config(corpus, cache, train={"seconds": 8, "save_every": 0}), run, resume=True)
    assert checkpoint.newest(run).name == "step-0000007"
    said = (run / "messages.txt").read_text("utf-8")
    assert "rises from 10% to 55% of its peak, as its schedule now ends after 8 s" in said


def test_a_finished_run_by_time_is_left_in_peace_unless_its_validation_was_cut(corpus, cache, tmp_path, monkeypatch):
    tick(monkeypatch)
    whole = config(corpus, cache, train={"seconds": 8, "save_every": 0, "eval_every": 0})
    assert train(whole, tmp_path / "run") == ""
    assert "longer --for" in nothing_left(whole, tmp_path / "run")
    with pytest.raises(UserError, match="longer --for"):
        train(whole, tmp_path / "run", resume=True)
    monkeypatch.setattr(training_run, "validate", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert train(whole, tmp_path / "cut") == "SIGTERM"
    assert not nothing_left(whole, tmp_path / "cut")


@pytest.mark.parametrize(("until", "says"), [({"steps": 3}, "reads"), ({"seconds": 8}, "read")])
def test_a_run_says_how_often_it_reads_its_text_as_soon_as_it_can_know(
    until, says, corpus, cache, tmp_path, monkeypatch
):
    tick(monkeypatch)
    monkeypatch.setattr(Shards, "laps", lambda shards, tokens: tokens / 100)
    train(config(corpus, cache, train=until | {"save_every": 0}), tmp_path / "run")
    told = (tmp_path / "run" / "messages.txt").read_text("utf-8")
    times = f"its text {read(tmp_path / 'run').tokens[-1] / 100:.1f} times"
    assert [verb for verb in ("read", "reads") if f"the run {verb} {times}" in told] == [says]


def test_the_clock_of_a_resumed_run_goes_on(corpus, cache, tmp_path, monkeypatch):
    tick(monkeypatch)
    run = tmp_path / "run"
    for steps in (3, 7):
        train(config(corpus, cache, train={"steps": steps, "save_every": 0}), run, resume=steps > 3)
    assert [round(seconds) for seconds in read(run).seconds] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("moment", ["in the step", "in the validation"])
def test_a_validation_that_a_signal_cut_short_is_made_up_for(moment, corpus, cache, tmp_path, monkeypatch):
    """Also that of the last step, which ends the run. Bit for bit, log and samples included."""
    whole = config(corpus, cache)
    assert train(whole, tmp_path / "whole") == ""
    honest_step, honest_score, pieces = training_run.train_step, training_run.score, tmp_path / "pieces"
    stopping = False

    def step(*arguments):
        nonlocal stopping
        result = honest_step(*arguments)
        stopping = result[0].step == at
        if stopping and moment == "in the step":
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    def score(model, windows, *arguments):
        if stopping and moment == "in the validation":
            first = next(windows)
            os.kill(os.getpid(), signal.SIGTERM)
            windows = chain([first], windows)
        return honest_score(model, windows, *arguments)

    monkeypatch.setattr(training_run, "train_step", step)
    monkeypatch.setattr(training_run, "score", score)
    for at in (8, 12, 20):  # 12 is a second resume, and after 20 nothing is left but its validation
        stopping = False
        assert train(whole, pieces, resume=at != 8) == "SIGTERM"
        _, rows = outcome(pieces)
        assert len(rows) == at and not rows[-1]["val_ce"]
    stopping = False
    assert train(whole, pieces, resume=True) == ""
    assert outcome(pieces) == outcome(tmp_path / "whole")
    assert (pieces / "samples.txt").read_text() == (tmp_path / "whole" / "samples.txt").read_text()
    with pytest.raises(UserError, match="20 steps already"):
        train(whole, pieces, resume=True)


def test_the_last_save_waits_for_room(corpus, cache, tmp_path, monkeypatch, capsys):
    """The disk fills up after the beginning, and has room again while the last save waits."""
    free, waits = [10**9], []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))

    def pass_time(seconds):
        waits.append(seconds)
        free[0] = 10**9 if len(waits) == 3 else free[0]

    monkeypatch.setattr(saver.time, "sleep", pass_time)
    honest = training_run.train_step

    def filling(*arguments):
        free[0] = 1000
        return honest(*arguments)

    monkeypatch.setattr(training_run, "train_step", filling)
    train(config(corpus, cache, train={"save_every": 0}), tmp_path / "run")
    assert "make room there: this waits for it up to 10 minutes" in capsys.readouterr().out
    assert len(waits) == 3 and checkpoint.newest(tmp_path / "run").name == "step-0000020"


def test_where_nothing_could_be_saved_nothing_is_called_saved(corpus, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "PATIENCE", -1)
    honest = training_run.train_step

    def filling(*arguments):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        return honest(*arguments)

    monkeypatch.setattr(training_run, "train_step", filling)
    with pytest.raises(UserError, match=r"1\.0 kB free, a checkpoint takes .*; nothing of this run is saved"):
        train(config(corpus, cache), tmp_path / "run")


def test_of_a_run_that_was_moved_away_nothing_is_said_to_be_lost(corpus, cache, tmp_path, monkeypatch):
    honest = training_run.train_step

    def moving(*arguments):
        if (tmp_path / "run").exists():
            (tmp_path / "run").rename(tmp_path / "moved")
        return honest(*arguments)

    monkeypatch.setattr(training_run, "train_step", moving)
    with pytest.raises(UserError, match=r"could not be saved: .*; .*run is gone \(moved or removed\)$"):
        train(config(corpus, cache, train={"steps": 2}), tmp_path / "run")


def test_too_little_room_for_checkpoints_is_told_before_training(corpus, cache, tmp_path, monkeypatch, capsys):
    """Refused if not even one fits, and then the folder holds no run; a warning if fewer fit than are kept."""
    train(config(corpus, cache), tmp_path / "all")
    (size,) = {_tensor_bytes(path) for path in checkpoint.steps(tmp_path / "all")}
    free = [size - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    with pytest.raises(UserError, match=r"the disk of .*run has .* free, a checkpoint takes .*: make room"):
        train(config(corpus, cache), tmp_path / "run")
    assert not (tmp_path / "run" / "config.toml").exists()
    cases = (3, 2, False, 5, 0), (2.9, 2, False, 5, 3), (3, 2, True, 5, 4), (1, 2, True, 0, 0), (1.9, 1, False, 5, 2)
    for nth, (room, keep, keep_best, save_every, warned) in enumerate(cases):
        free[0] = size * room
        settings = {"keep": keep, "keep_best": keep_best, "save_every": save_every}
        train(config(corpus, cache, train=settings), tmp_path / f"{nth}")
        told = capsys.readouterr().out
        assert ("make room" in told) == (f"{warned} checkpoints will take" in told) == bool(warned), told


def _tensor_bytes(path):
    return sum(
        tensor.nbytes for name in ("model", "optimizer") for tensor in load_file(path / f"{name}.safetensors").values()
    )


def test_another_model_is_not_called_damage(corpus, cache, tmp_path):
    whole = config(corpus, cache)
    train(whole, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*") if path.is_file()}
    for change in ({"model": {"dim": 64}}, {"model": {"pattern": "DDM"}}):
        with pytest.raises(UserError, match=r"was trained with another model\.(dim|pattern)"):
            train(config(corpus, cache, **change), tmp_path / "run", resume=True)
    assert before == {path: path.read_bytes() for path in before}
    write_config(config(corpus, cache, model={"dim": 64}), tmp_path / "run")
    for use in (
        lambda: train(config(corpus, cache, model={"dim": 64}), tmp_path / "run", resume=True),
        lambda: open_run(tmp_path / "run"),
    ):
        with pytest.raises(UserError, match=r"of another model than its config\.toml describes.*check model\.\* keys"):
            use()


def test_a_key_that_changes_what_the_weights_mean_is_noted_with_them(corpus, cache, tmp_path):
    """These change no tensor's shape, so without the note another model would write in this one's name."""
    whole, run = config(corpus, cache, train={"steps": 1}), tmp_path / "run"
    train(whole, run)
    for key, value in {"token_norm": True, "rope_theta": 500, "norm_eps": 1e-3, "experts_per_token": 1}.items():
        write_config(resolve(whole.model_dump(), {"model": {key: value}}), run)
        was = json.dumps(getattr(whole.model, key))
        for use in (open_run, partial(train, read_config(run), resume=True)):
            with pytest.raises(UserError, match=rf"was trained with model\.{key} = {was}; check model\.\* keys"):
                use(run)


def test_a_run_by_time_ends_while_there_is_time_to_save():
    """Half of ten seconds were used up, a step takes one: after it there is time for another and two to save, not 4."""
    state, log = State(5, 0, torch.empty(0), share=0.5), SimpleNamespace(expect=lambda _steps: None)
    for saving, last in ((2, False), (4, True)):
        progress = training_run._progress(TrainConfig(seconds=10), state, 6, SimpleNamespace(seconds=saving), log)
        assert progress == (replace(state, share=0.6), last)


@pytest.mark.parametrize("cold", [False, True])
def test_a_step_that_compiled_does_not_say_how_long_the_next_one_takes(cold):
    state, log = State(1, 0, torch.empty(0), share=0.0), SimpleNamespace(expect=lambda _steps: None)
    place = (TrainConfig(seconds=10), state, 6, SimpleNamespace(seconds=0), log)
    assert training_run._progress(*place, cold=cold) == (replace(state, share=0.6), not cold)


def test_a_vocabulary_larger_than_the_text_gives_is_said(corpus, tmp_path, capsys):
    (tmp_path / "small.jsonl").write_text("".join(f'{{"text": "a{nth}"}}\n' for nth in range(60)), "utf-8")
    settings = {"model": {"vocab_size": 5000, "context": 8}, "train": {"steps": 1, "sample_tokens": 0}}
    train(config(tmp_path / "small.jsonl", tmp_path / "cache", **settings), tmp_path / "run")
    heard = " ".join("".join(capsys.readouterr()).split())
    assert "of the 5,000 asked for: the text gives no more" in heard
    assert "of model.vocab_size = 5,000 rows stay unused" in heard


def test_how_often_the_text_is_read_counts_the_rows_of_each_size_of_step(corpus, cache, tmp_path, monkeypatch):
    told = []
    train(config(corpus, cache), tmp_path / "run")
    monkeypatch.setattr(Shards, "laps", lambda _shards, tokens: told.append(tokens) or 0.0)
    train(config(corpus, cache, train={"steps": 21, "micro_batch": 64}), tmp_path / "run", resume=True)
    assert told == [(20 * 4 + 1 * 128) * 32]


def test_runs_and_their_checkpoints_may_lie_on_another_disk(corpus, cache, tmp_path):
    for place in ("disk/run", "disk/steps"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
    (tmp_path / "disk" / "run" / "checkpoints").symlink_to(tmp_path / "disk" / "steps")
    train(config(corpus, cache, train={"steps": 10}), tmp_path / "run")
    train(config(corpus, cache), tmp_path / "run", resume=True)
    assert open_run(tmp_path / "run").step == 20
    assert (tmp_path / "disk" / "steps" / "step-0000020").is_dir()


def test_what_is_unexpected_of_the_learning_rate_is_said(corpus, cache, tmp_path, capsys):
    whole = config(corpus, cache, schedule={"warmup": 11})
    train(whole, tmp_path / "run")
    assert "warms up for 10 of 20 steps, not schedule.warmup = 11" in capsys.readouterr().out
    train(config(corpus, cache, train={"steps": 40}, schedule={"warmup": 11}), tmp_path / "run", resume=True)
    told = capsys.readouterr().out
    assert "rises from 10% to 76% of its peak, as its schedule now ends at step 40 instead of 20" in told
    train(config(corpus, cache, train={"steps": 40, "save_every": 15}), tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-0000040")
    assert "learning rate" not in capsys.readouterr().out
    train(config(corpus, cache, train={"steps": 40}), tmp_path / "stopped", resume=True)
    assert "learning rate" not in capsys.readouterr().out


def test_a_run_whose_shards_are_gone_names_the_way_out(corpus, tmp_path):
    train(config(corpus, tmp_path / "shards", train={"steps": 1}), tmp_path / "run")
    shutil.rmtree(tmp_path / "shards")
    with pytest.raises(UserError, match=r"are gone; name a text to score \(--data\), or train on with --resume"):
        score_opened(open_run(tmp_path / "run"))
    assert score_opened(open_run(tmp_path / "run"), str(corpus))["val_tokens"]


def test_a_longer_run_finds_its_shards_in_a_cache_that_has_moved(corpus, tmp_path, monkeypatch):
    """Though a new one of its length would train another tokenizer, on a larger sample."""
    monkeypatch.setattr(prepare, "WHOLE", 1)
    monkeypatch.setattr(prepare, "LEAST_SAMPLE", 1)
    train(config(corpus, tmp_path / "shards", train={"steps": 1}), tmp_path / "run")
    (tmp_path / "shards").rename(tmp_path / "moved")
    train(config(corpus, tmp_path / "moved", train={"steps": 4}), tmp_path / "run", resume=True)
    assert checkpoint.newest(tmp_path / "run").name == "step-0000004"
    assert len([path for path in (tmp_path / "moved").iterdir() if path.is_dir()]) == 1
