"""A plan before training, the choice of a micro-batch, and a step that runs out of memory."""

import dataclasses
import json
import re
from io import StringIO

import pytest
import torch
from rich.console import Console
from torch._subclasses import FakeTensor

from conftest import tiny
from khanhllm import cli
from khanhllm.errors import UserError
from khanhllm.machine.cards import CARDS
from khanhllm.planning import budget, plan
from khanhllm.settings import preset, read_toml, resolve, settings_of, write_config
from khanhllm.training import run as training_run
from khanhllm.training.run import train

BIG = budget.Hardware("a test", "cpu", "fp32", memory=10**12, process=0, peak_flops=1e12)


def hardware(memory: float) -> budget.Hardware:
    return dataclasses.replace(BIG, memory=int(memory))


def rows_per_step(config) -> int:
    return config.train.micro_batch * config.train.accumulation


CONFIG = resolve(tiny().model_dump(), {"train": {"micro_batch": 4, "accumulation": 6}})


@pytest.mark.parametrize(("hands", "evenly", "size"), [(4, False, 4), (4, True, 3), (6, True, 4), (8, True, 3)])
def test_each_process_gets_micro_batches_and_if_it_must_be_equally_many(hands, evenly, size):
    shared = budget.shared_out(CONFIG, hands, evenly)
    assert shared.train.micro_batch == size and rows_per_step(shared) == 24
    with pytest.raises(UserError, match="24 rows cannot give 5 processes equally many"):
        budget.shared_out(CONFIG, 5, evenly=True)


def test_a_step_that_cannot_be_shared_out_says_what_it_lacks():
    few = resolve(CONFIG.model_dump(), {"train": {"micro_batch": 1, "accumulation": 3}})
    shares = resolve(few.model_dump(), {"machine": {"shares": "3,1"}})
    for config, says in ((few, "4 processes need one row each"), (shares, "the shares 3,1 need 4 micro-batches")):
        with pytest.raises(UserError, match=rf"^a step has 3 rows, but {says}; raise train\.accumulation or"):
            budget.shared_out(config, 4)


def test_the_rows_of_a_step_stay_and_less_memory_means_smaller_pieces():
    none = BIG.total(budget.with_micro_batch(CONFIG, 24, "none"))
    chosen = [budget.fit_micro_batch(CONFIG, hardware(none * share)) for share in (1, 0.9, 0.6)]
    assert [rows_per_step(config) for config in chosen] == [24, 24, 24]
    sizes = [config.train.micro_batch for config in chosen]
    assert sizes[0] == 24 and sizes == sorted(sizes, reverse=True) and sizes[1] < 24
    assert all(BIG.total(config) <= none * share for config, share in zip(chosen, (1, 0.9, 0.6), strict=True))


def test_rebuilding_comes_only_when_nothing_else_fits():
    one_row = BIG.total(budget.with_micro_batch(CONFIG, 1, "none"))
    assert budget.fit_micro_batch(CONFIG, hardware(one_row)).machine.checkpointing == "none"
    assert budget.fit_micro_batch(CONFIG, hardware(one_row - 1)).machine.checkpointing != "none"


def test_what_cannot_fit_is_told_what_would_and_what_saves_most():
    with pytest.raises(UserError, match=r"nothing fits into 0.00 GB.*takes .* GB; these save most: --") as refusal:
        budget.fit_micro_batch(CONFIG, hardware(1000))
    saved = [budget.read_size(size) for size in re.findall(r"\((\S+ \S+)\)", str(refusal.value))]
    assert len(saved) == 3
    assert saved == sorted(saved, reverse=True)


@pytest.mark.slow
def test_a_run_that_is_given_its_time_is_told_its_tokens(capsys):
    assert cli.main(["plan", "card-8gb", "--card", "RTX 4060", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["seconds"] == 86_400
    assert report["tokens"] == pytest.approx(report["tokens_per_s"] * 86_400, rel=1e-6)


def test_experts_that_take_turns_are_planned_in_a_step_in_which_they_move():
    own = {"model": {"feedforward": "relu2"}, "optim": {"name": "muon", "expert_momentum": 0.9}}
    each, turns = (BIG.takes(resolve(CONFIG.model_dump(), own, {"optim": {"expert_every": every}})) for every in (1, 2))
    assert turns.update == each.update and turns.at_peak == each.at_peak


def test_the_switches_of_a_plan_keep_the_rows_of_a_step():
    switches = plan.plan(CONFIG, hardware(10**9))["switches"]
    cuts = {switch for switch in switches if "micro_batch" in switch}
    assert cuts == {f"--train.micro_batch {rows} --train.accumulation {24 // rows}" for rows in (2, 8)}


@pytest.mark.parametrize(("each", "advice"), [(9, "dense layers do as well"), (11, "take a mixture")])
def test_a_plan_says_whether_its_tokens_are_enough_for_a_mixture(each, advice):
    report = plan.plan(CONFIG, hardware(10**9))
    out = StringIO()
    plan.show(report | {"tokens": each * report["active_parameters"]}, Console(file=out, width=200))
    assert re.search(rf"tokens +{each}.0 a parameter +at work: {advice}", out.getvalue())


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8e9), ("600 mb", 6e8), ("1.5gb", 1.5e9), ("12G", 12e9), ("2GiB", 2**31)]
)
def test_sizes(text, size):
    assert budget.read_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "0", "-3GB", "8 apples"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="--memory"):
        budget.read_size(text)


def test_every_card_holds_nano():
    config = resolve(tiny().model_dump())
    for name, card in CARDS.items():
        assert budget.fit_micro_batch(config, budget.on(name, card)).train.micro_batch == 2


def test_the_plan_as_json(capsys):
    assert cli.main(["plan", "nano", "--memory", "2GB", "--json", "--machine.device", "cpu"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == 698_176
    assert plan["weights"] == plan["at_peak"]["weights"]
    assert plan["total"] == plan["process"] + sum(plan["at_peak"].values()) <= plan["memory"] == 2e9
    assert plan["micro_batch"] * plan["accumulation"] * 512 == plan["tokens_per_step"] == 1024
    assert plan["flops_per_token_causal"] < plan["flops_per_token"]


def test_a_card_is_planned_in_the_precision_that_is_asked_for(capsys):
    peak = {}
    for precision in ("auto", "bf16", "fp32"):
        words = ["plan", "nano", "--card", "RTX 4060", "--json", "--machine.precision", precision]
        assert cli.main(words) == 0
        report = json.loads(capsys.readouterr().out)
        peak[precision] = sum(report["at_peak"].values()) / report["micro_batch"]
        assert bool(report["tokens_per_s"]) == (precision != "fp32"), "the rate of cards is known in bf16"
    assert peak["auto"] == peak["bf16"] < peak["fp32"]


def test_a_run_and_a_toml_file_are_planned_too(tmp_path, monkeypatch, capsys):
    """A preset's name stays the preset's, also where a folder has it."""
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "runs" / "mine", tmp_path / "nano"):
        folder.mkdir(parents=True)
        write_config(CONFIG, folder)
    assert cli.main(["plan", "runs/mine", "--card", "RTX 4060", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["micro_batch"] * report["accumulation"] == 24
    assert settings_of("runs/mine/config.toml") == CONFIG.model_dump()
    assert settings_of("nano") == preset("nano")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nono"], "no preset"),
        (["runs/nono"], "no preset"),
        (["nano", "--card", "RTX 4099"], "did you mean"),
        (["nano", "--memory", "1MB"], "nothing fits"),
        (["nano", "--memory", "8"], "--memory: 8 has no unit; write such as 8GB"),
        (["nano", "--memory", "16000"], "--memory: 16000 has no unit; write such as 8GB"),
        (["nano", "--card", "4090", "--measure"], "--measure"),
    ],
)
def test_bad_input_is_one_line(words, says, capsys):
    assert cli.main(["plan", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert says in error[-1]


def settings(corpus, cache, **more):
    data = {"source": str(corpus), "cache": str(cache), "validation": 0.2, "workers": 1}
    steps = {"steps": 4, "micro_batch": 4, "accumulation": 1, "sample_tokens": 0, "eval_tokens": 100}
    return resolve(tiny().model_dump(), {"data": data, "train": steps}, more)


def losses(run):
    rows = (run / "training_log.csv").read_text().splitlines()
    return [float(row.split(",")[2]) for row in rows[1:]]


def out_of_memory_at(step, kind, monkeypatch, times=1):
    """Memory runs out at the end of the backward passes of a step, with the gradient already there."""
    clip, left, steps = torch.nn.utils.clip_grad_norm_, [times], [0]

    def clip_or_fail(parameters, longest):
        parameters = list(parameters)
        if isinstance(parameters[0].grad, FakeTensor):  # of a plan, not of a step
            return clip(parameters, longest)
        steps[0] += 1
        if steps[0] == step and left[0]:
            left[0] -= 1
            steps[0] -= 1
            raise kind
        return clip(parameters, longest)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_or_fail)


@pytest.mark.parametrize(
    "kind",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=["cuda", "cpu"],
)
def test_a_step_that_ran_out_of_memory_is_taken_again_in_halves(kind, corpus, tmp_path, monkeypatch, capsys):
    config = settings(corpus, tmp_path / "cache")
    train(config, tmp_path / "whole")
    out_of_memory_at(3, kind, monkeypatch)
    train(config, tmp_path / "cut")
    assert "step 3: out of memory; again with micro-batches of 2 instead of 4" in capsys.readouterr().out
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert losses(tmp_path / "cut")[:2] == losses(tmp_path / "whole")[:2]
    kept = read_toml(tmp_path / "cut" / "config.toml")["train"]
    assert (kept["micro_batch"], kept["accumulation"]) == (2, 2)


def test_with_one_row_left_it_stops_and_says_what_saves_most(corpus, tmp_path, monkeypatch):
    config = settings(corpus, tmp_path / "cache")
    out_of_memory_at(2, torch.OutOfMemoryError("CUDA out of memory"), monkeypatch, times=9)
    with pytest.raises(UserError, match=r"step 2: out of memory with a micro-batch of 1; these save most: --"):
        train(config, tmp_path / "run")


def test_another_error_is_not_taken_for_it(corpus, tmp_path, monkeypatch):
    out_of_memory_at(2, RuntimeError("shapes do not match"), monkeypatch)
    with pytest.raises(RuntimeError, match="shapes"):
        train(settings(corpus, tmp_path / "cache"), tmp_path / "run")


def test_an_update_that_had_begun_is_not_taken_again(corpus, tmp_path, monkeypatch):
    config = settings(corpus, tmp_path / "cache")
    honest = training_run.optim.build

    def failing(*arguments):
        optimizer = honest(*arguments)

        def fail(*_):
            raise torch.OutOfMemoryError("in the update")

        optimizer.register_step_post_hook(fail)
        return optimizer

    monkeypatch.setattr(training_run.optim, "build", failing)
    with pytest.raises(UserError, match="out of memory"):
        train(config, tmp_path / "run")


def test_auto_settles_on_numbers_that_keep_the_rows(corpus, tmp_path):
    config = resolve(
        settings(corpus, tmp_path / "cache", train={"accumulation": 3}).model_dump(), {"train": {"micro_batch": "auto"}}
    )
    train(config, tmp_path / "run")
    kept = read_toml(tmp_path / "run" / "config.toml")["train"]
    assert kept["micro_batch"] * kept["accumulation"] == 12


def test_a_micro_batch_that_is_neither_a_number_nor_auto():
    with pytest.raises(UserError, match=r"train.micro_batch: .*whole number.*, or auto \(got 'banana'\)"):
        resolve({"train": {"micro_batch": "banana"}})


def test_shards_take_their_part_of_what_lies_whole_and_all_of_what_does_not():
    whole, cut = tiny(dim=128), resolve(tiny(dim=128).model_dump(), {"machine": {"split": "all"}})
    alone, four = BIG.takes(whole), dataclasses.replace(BIG, processes=4).takes(cut)
    assert BIG.takes(cut) == alone == dataclasses.replace(BIG, processes=4).takes(whole)
    for part in ("weights", "gradients", "optimizer"):
        assert four.at_peak[part] == alone.at_peak[part] // 4
    assert four.at_peak["activations"] == alone.at_peak["activations"]
    saved = budget.savings(whole, dataclasses.replace(BIG, processes=4))
    assert saved["--machine.split all"][0] > 0
    bf16 = resolve(whole.model_dump(), {"machine": {"weights": "bf16", "gradients": "bf16", "precision": "auto"}})
    assert "--machine.split all" not in budget.savings(bf16, dataclasses.replace(BIG, processes=4))
    assert four.at_peak["work space"] > alone.at_peak["work space"]
