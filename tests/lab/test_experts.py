"""Closing an expert does what it says and leaves no trace, and the laboratory finds what was planted."""

import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from conftest import build, plain_machine, tiny
from khanhllm.cli import main
from khanhllm.errors import UserError
from khanhllm.lab import closing, doctor, experts, rooms
from khanhllm.lab.closing import Cost, changed
from khanhllm.lab.kinds import KINDS, kinds, shown
from khanhllm.lab.sample import Sample, take
from khanhllm.runs.run import open_run
from khanhllm.schema import MachineConfig
from khanhllm.settings import resolve
from khanhllm.training import checkpoint
from khanhllm.training.run import train

IDS = np.random.default_rng(0).integers(0, 300, (6, 33))
SAMPLE = Sample(IDS, np.zeros(len(IDS), int), ["all"], "dice")
SHAPES = [{}, {"experts_per_token": 1}, {"experts_per_token": 4}, {"router_bias": True}, {"style": "classic"}]
MOE = 1
"""the layer of tiny's mixture"""


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model.logits(torch.from_numpy(ids[:, :-1]))


def load(model, ids=IDS):
    with torch.inference_mode():
        return model.trunk(torch.from_numpy(ids[:, :-1]))[1][0].load_E


def planted():
    """A model whose router sends token v to experts v % E and (v + 1) % E, whatever comes before."""
    model = build(tiny(pattern="MD"))
    with torch.no_grad():
        model.blocks[0].attention.out.weight.zero_()
        model.embedding.token.weight.zero_()
        for token in range(300):
            model.embedding.token.weight[token, token % 4] = 2.0
            model.embedding.token.weight[token, (token + 1) % 4] = 1.0
        model.blocks[0].feedforward.router.weight.copy_(torch.eye(4, 32))
    return model


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("change", [closing.close, closing.remove])
def test_closing_an_expert_that_nobody_chose_changes_no_bit(shape, change):
    model = build(tiny(**shape))
    ids = IDS[:1, :2]  # one token, so that some expert has none
    (idle, *_), before = (load(model, ids) == 0).nonzero().flatten().tolist() or [None], logits(model, ids)
    if idle is None:
        assert shape == {"experts_per_token": 4}
        return
    with changed(model, MOE, change(idle)):
        assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("change", [closing.close(0), closing.remove(0), closing.off(), closing.at_random()])
def test_a_change_ends_with_its_context(shape, change):
    model = build(tiny(**shape))
    before, weights = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError), changed(model, MOE, change):
        assert not torch.equal(logits(model), before)
        raise RuntimeError
    assert torch.equal(logits(model), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_token_goes_where_it_is_closed(shape):
    model = build(tiny(**shape))
    per_token = model.config.experts_per_token
    for closed in ([0], [1, 3], [3, 1]):
        with changed(model, MOE, closing.close(*closed)):
            found, load_E = logits(model), load(model)
        assert torch.isfinite(found).all() and load_E.sum() == per_token * IDS[:, 1:].size
        assert per_token > 4 - len(closed) or not load_E[closed].any()
    with changed(model, MOE, closing.close(0, 2, 3)):
        assert torch.isfinite(logits(model)).all()
    with changed(model, MOE, closing.close(0, 1, 2, 3)):
        none = logits(model)
    with changed(model, MOE, closing.off()):
        assert torch.equal(logits(model), none)
    router = closing.router_of(model, MOE)
    with torch.no_grad():
        router.weight[0] = 1e4 * torch.ones(32)  # so sure of itself that all others have a probability of zero
    with changed(model, MOE, closing.close(0)):
        assert torch.isfinite(logits(model)).all()


def test_a_router_of_the_open_experts_alone_chooses_the_same():
    model = build(tiny())
    router, x_TD = closing.router_of(model, MOE), torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    choice, _ = router(x_TD, torch.tensor([[True, False, False, False]]))
    alone = type(router)(32, 3, 2)
    alone.weight = torch.nn.Parameter(router.weight[1:])
    assert torch.equal(choice.expert_TK - 1, alone(x_TD)[0].expert_TK)
    assert torch.allclose(choice.weight_TK, alone(x_TD)[0].weight_TK)


@pytest.mark.parametrize("biased", [False, True])
def test_a_token_with_closed_doors_leaves_its_neighbours_alone(biased):
    model = build(tiny(router_bias=biased))
    router, x_TD = closing.router_of(model, MOE), torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    closed_TE = torch.zeros(50, 4, dtype=torch.bool)
    closed_TE[::2, 1] = True
    (experts_TK, weights_TK), _ = router(x_TD)
    (closed_TK, less_TK), _ = router(x_TD, closed_TE)
    assert torch.equal(closed_TK[1::2], experts_TK[1::2]) and torch.equal(less_TK[1::2], weights_TK[1::2])
    assert (closed_TK[::2] != 1).all() and (experts_TK[::2] == 1).any()


def test_what_a_mixture_is_worth_is_what_the_model_loses_without_it():
    model, machine = build(tiny()), plain_machine()
    before = closing.losses(model, IDS, machine)
    with changed(model, MOE, closing.off()):
        off = closing.losses(model, IDS, machine)
    with changed(model, MOE, closing.remove(0, 1, 2, 3)):
        assert torch.equal(closing.losses(model, IDS, machine), off)
    with torch.no_grad():
        model.blocks[MOE].feedforward.experts.down.zero_()
    assert torch.equal(closing.losses(model, IDS, machine), off) and not torch.equal(before, off)
    for change in (closing.close(0), closing.remove(2), closing.off(), closing.at_random(), closing.first_only()):
        with changed(model, MOE, change):
            cost = closing.cost(off, closing.losses(model, IDS, machine))
        assert cost == (0, 0) and not cost.told_apart


def test_dice_send_each_token_to_different_experts_and_are_the_same_dice():
    model = build(tiny())
    with changed(model, MOE, closing.at_random(seed=1)):
        found = experts.record(model, SAMPLE, plain_machine()).expert_LWTK[0]
    assert (found[..., 0] != found[..., 1]).all()
    assert np.bincount(found.ravel()) == pytest.approx(np.full(4, found.size / 4), rel=0.25)
    with changed(model, MOE, closing.at_random(seed=1)):  # the experts compute by the load, so it must be the dice's
        assert load(model).tolist() == np.bincount(found.ravel()).tolist()
    with changed(model, MOE, closing.at_random(seed=1)):
        assert np.array_equal(experts.record(model, SAMPLE, plain_machine()).expert_LWTK[0], found)


def test_the_first_expert_alone_has_the_weight_of_all():
    router = closing.router_of(build(tiny()), MOE)
    x_TD = torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    model, before = build(tiny()), router(x_TD)[0]
    with changed(model, MOE, closing.first_only()):
        expert_TK, weight_TK = closing.router_of(model, MOE)(x_TD)[0]
    assert torch.equal(expert_TK, before.expert_TK)
    assert torch.allclose(weight_TK, torch.tensor([1.0, 0.0]).expand(50, 2))


def test_a_cost_and_its_error():
    dice = torch.Generator().manual_seed(0)
    before = torch.full((400,), 100.0, dtype=torch.float64)
    noise = torch.randn(400, generator=dice, dtype=torch.float64)
    assert closing.cost(before, 1.25 * before) == (0.25, 0)
    found = closing.cost(before, before + noise)
    assert found.error == pytest.approx(0.01 / math.sqrt(400), rel=0.1) and not found.told_apart
    assert closing.cost(before, before + 1 + noise).told_apart


def test_a_planted_router_is_found():
    model = planted()
    found = experts.record(model, SAMPLE, plain_machine())
    assert np.array_equal(found.expert_LWTK[0, :, :, 0], IDS[:, :-1] % 4)
    assert np.array_equal(found.expert_LWTK[0, :, :, 1], (IDS[:, :-1] + 1) % 4)
    assert torch.equal(found.nats_W, closing.losses(model, IDS, plain_machine()))
    assert 0 < found.opinion_L[0] < 1
    with torch.no_grad():
        closing.router_of(model, 0).weight.zero_()
    assert experts.record(model, SAMPLE, plain_machine()).opinion_L == pytest.approx([1])


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    settings = {
        "data": {"source": str(corpus), "cache": str(folder / "shards"), "validation": 0.4, "workers": 1},
        "train": {"steps": 12, "save_every": 4, "eval_every": 0, "sample_every": 0, "keep": 3},
    }
    train(resolve(tiny().model_dump(), settings, {"model": {"pattern": "MDM"}}), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def found(run, corpus):
    opened = open_run(run, MachineConfig(device="cpu", threads=1))
    return experts.examine(opened, take(opened, str(corpus), 4000, "file"), earlier=True)


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


def test_the_command_writes_what_it_found(run, capsys):
    pytest.importorskip("matplotlib")
    assert main(["experts", str(run), "--tokens", "2k", "--ablate", "0:1,2:3", "--json", "--machine.threads", "1"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=no_constant)
    assert json.loads((run / "experts.json").read_text(), parse_constant=no_constant) == found
    assert (run / "experts.png").read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((run / "checkpoints" / "step-0000012" / "manifest.json").read_text())
    assert found["checkpoint"] == manifest["model.safetensors"]["sha256"] and found["step"] == 12
    for layer, closed in zip(found["layers"], (1, 3), strict=True):
        assert sum(one["share"] for one in layer["experts"]) == pytest.approx(1)
        assert [one["expert"] for one in layer["experts"] if "closed" in one] == [closed]
        assert {"off", "random", "first"} <= layer.keys()


def test_an_earlier_checkpoint_can_be_looked_at(run, capsys):
    words = ["experts", str(run), "--step", "8", "--checkpoints", "--tokens", "2k", "--ablate", "none", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 8 and list(found["layers"][0]["saturation"]) == ["4"]


def test_without_ablation_nothing_is_closed(run, capsys, monkeypatch):
    monkeypatch.setattr(closing, "changed", None)
    assert main(["experts", str(run), "--tokens", "2k", "--ablate", "none", "--machine.threads", "1"]) == 0
    assert "closed" in capsys.readouterr().out


def test_parts_and_checkpoints_are_told(found, corpus):
    assert sorted(found["parts"]) == sorted(path.name for path in corpus.iterdir() if path.name in found["parts"])
    assert len(found["parts"]) > 3
    for layer in found["layers"]:
        assert list(layer["saturation"]) == ["4", "8"]
        assert (
            layer["saturation"]["8"]["value"] >= layer["saturation"]["4"]["value"] > layer["saturation"]["4"]["chance"]
        )
        assert "part" in layer["measures"]


def test_checkpoints_that_a_training_removes_meanwhile_cost_nothing(run, corpus, tmp_path, monkeypatch):
    trains = tmp_path / "trains"
    shutil.copytree(run, trains)
    opened = open_run(trains, MachineConfig(threads=1))
    sample = take(opened, str(corpus), 500)
    measured = experts.record

    def meanwhile(*given):
        shutil.rmtree(trains / "checkpoints" / "step-0000012", ignore_errors=True)
        if (eighth := trains / "checkpoints" / "step-0000008").exists():
            found = list(checkpoint.steps(trains))
            monkeypatch.setattr(checkpoint, "steps", lambda _: found)
            shutil.rmtree(eighth)
        return measured(*given)

    monkeypatch.setattr(experts, "record", meanwhile)
    found = experts.examine(opened, sample, "none", earlier=True)
    assert found["step"] == 12 and list(found["layers"][0]["saturation"]) == ["4"]


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_the_table_fits_the_terminal(found, width):
    console = Console(file=io.StringIO(), width=width)
    for part in rooms.told(found, "a run", width):
        console.print(part)
    console.file.seek(0)
    lines = console.file.read().splitlines()
    assert max(map(len, map(str.rstrip, lines))) <= width
    assert ("removed" in " ".join(lines)) == (width >= 60)
    for one in found["layers"][0]["experts"]:
        assert any(line.split()[:1] == [str(one["expert"])] and f"{100 * one['share']:.1f} %" in line for line in lines)


def test_what_the_verdict_says():
    def said(off, random):
        return rooms.verdict({"off": Cost(off, 0.001)._asdict(), "random": Cost(random, 0.001)._asdict()})

    assert said(0.004, 0.004).startswith("Worth next to nothing")
    assert said(0.1, 0.09).startswith("Its worth is the routing")
    assert said(0.1, 0.02).startswith("Its worth is partly")
    assert "(+0.10 ±0.10 %)" in said(0.001, 0.1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--ablate", "1:0"], "--ablate: '1:0' is no expert; write all, none or LAYER:EXPERT,..., with layers 0, 2"),
        (["--ablate", "0:4"], "experts 0 to 3"),
        (["--ablate", "some"], "'some' is no expert"),
        (["--ablate", "0:" + "9" * 5000], "is no expert"),
        (["--part", "file"], "do not remember parts"),
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--data", "nowhere"], "nowhere"),
        (["--out", "/dev/null/picture.png"], "cannot write"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_in_one_line(run, capsys, options, says):
    assert main(["experts", str(run), "--machine.threads", "1", *options]) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("found.json", "found.json: the picture is a file that ends in .png, .svg or .pdf"),
        ("picture", "ends in .png"),
        ("picture.png", "experts.json: it is not a regular file"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_examined(run, tmp_path, monkeypatch, capsys, out, says):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("experts.json"))
    (tmp_path / "run" / "experts.json").mkdir()
    monkeypatch.setattr(experts, "examine", None)
    assert main(["experts", str(tmp_path / "run"), "--machine.threads", "1", "--out", str(tmp_path / out)]) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1


def test_a_picture_may_lie_in_a_new_folder(run, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / "picture.svg"
    assert main(["experts", str(run), "--tokens", "1k", "--ablate", "none", "--out", str(picture)]) == 0
    assert "<svg" in picture.read_text(encoding="utf-8")


def test_more_tokens_than_there_are_is_all_of_them(run, corpus):
    opened = open_run(run, MachineConfig(device="cpu", threads=1))
    held = take(opened, None, 10**99)
    assert len(held.ids) == len(held.part_W) == take(opened, None, 10**6).ids.shape[0]
    few = take(opened, None, 320)
    assert few.ids.shape == (10, 33) and (few.ids[1] != held.ids[1]).any(), "spread over the text"
    named = take(opened, str(corpus / "json-encoder.txt"), 10**99)
    assert named.ids.size > 3000 and (named.ids[1:, 0] == named.ids[:-1, -1]).all(), "window follows window"


def test_the_parts_of_a_mixture_get_equal_shares(run, corpus, tmp_path):
    opened = open_run(run, MachineConfig(device="cpu", threads=1))
    mixture = f"{corpus / 'json-encoder.txt'}:0.9,{corpus / 'logging-handlers.txt'}:0.1"
    sample = take(opened, mixture, 640, "source")
    assert [Path(name).name for name in sample.parts] == ["logging-handlers.txt", "json-encoder.txt"]
    assert np.bincount(sample.part_W).tolist() == [10, 10]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.md").write_text((corpus / "json-encoder.txt").read_text())
    assert sorted(take(opened, str(tmp_path), 640, "folder").parts) == ["a", "b"]
    assert take(opened, str(tmp_path), 640).parts == ["all"]
    parts = [take(opened, mixture.split(":")[0], 320), take(opened, mixture.split(",")[1].rpartition(":")[0], 320)]
    whole = take(opened, mixture, 640).ids
    assert all((whole[nth::2] == one.ids).all() for nth, one in enumerate(parts)), "also where nobody asks for them"


def test_a_file_name_that_is_not_utf_8_costs_nothing(tmp_path):
    """Python reads such a name with half a surrogate pair."""
    found = {"parts": ["texts/\udcff.txt"]}
    assert json.loads(experts.write(found, tmp_path).read_text("utf-8")) == found


def test_too_little_text_is_refused(run, tmp_path):
    (tmp_path / "short.txt").write_text("two words")
    opened = open_run(run, MachineConfig(device="cpu", threads=1))
    with pytest.raises(UserError, match="has not two windows of 32 tokens"):
        take(opened, str(tmp_path / "short.txt"), 1000)


def test_a_dense_run_is_refused(corpus, tmp_path, capsys):
    settings = {"data": {"source": str(corpus), "cache": str(tmp_path / "shards")}, "train": {"steps": 1}}
    train(resolve(tiny(pattern="DD").model_dump(), settings), tmp_path / "run")
    capsys.readouterr()
    assert main(["experts", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == "khanhllm: this run is dense: it has no experts (model.pattern has no M)\n"


def test_the_doctor_warns_of_a_mixture_that_is_worth_nothing(run, monkeypatch):
    opened = open_run(run, MachineConfig(device="cpu", threads=1))
    with torch.no_grad():
        opened.model.blocks[2].feedforward.experts.down.zero_()
    finding = doctor.mixtures_earn_their_keep(opened)
    assert finding.kept and finding.warning
    assert "layer 2 +0.0 ±0.0 %" in finding.measured and "without the mixture of layer" in finding.advice
    monkeypatch.setattr(experts, "worth", lambda *_: {0: Cost(0.0049, 0.001), 2: Cost(0.3, 0.01), 4: Cost(0.1, 0.06)})
    assert "layer 0, 4:" in doctor.mixtures_earn_their_keep(opened).advice
    monkeypatch.setattr(experts, "worth", lambda *_: {0: Cost(0.0051, 0.001)})
    assert not doctor.mixtures_earn_their_keep(opened).warning
    gone = replace(opened, state=opened.state | {"folder": "/nowhere"})
    assert doctor.mixtures_earn_their_keep(gone).measured.startswith("not measured: the shards of this run")


def test_a_warning_is_shown_and_no_fault(run, capsys):
    code = main(["doctor", str(run), "--machine.threads", "1", "--json"])
    report = json.loads(capsys.readouterr().out)
    (finding,) = (finding for finding in report["findings"] if finding["law"] == "mixtures earn their keep")
    assert finding["warning"], "twelve steps teach no mixture anything"
    assert code == (0 if all(finding["kept"] for finding in report["findings"]) else 1)
    main(["doctor", str(run), "--machine.threads", "1"])
    lines = capsys.readouterr().out.splitlines()
    (at,) = (nth for nth, line in enumerate(lines) if line.startswith("! mixtures earn their keep"))
    assert lines[at + 1].startswith("    → the run would be as good without")


def test_kinds_of_tokens(run):
    tokenizer = open_run(run, MachineConfig(device="cpu", threads=1)).tokenizer
    found = kinds(tokenizer)
    for text, kind, sign in (("\n", "end of line", "⏎"), (" ", "blanks", "␣"), ("7", "number", "7")):
        (token,) = tokenizer.encode(text)
        assert (KINDS[found[token]], shown(tokenizer, token)) == (kind, sign)
    assert KINDS[found[tokenizer.encode("e")[0]]] == "piece of a word"
    assert KINDS[found[tokenizer.encode("(")[0]]] == "punctuation"
    assert KINDS[found[tokenizer.end_of_text]] == "special"
    assert KINDS[found[tokenizer.encode_bytes(b"\xff")[0]]] == "part of a character"
