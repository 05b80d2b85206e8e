"""Each rung of the precision ladder trains, is saved as it is, and opens on any machine."""

import json

import pytest
import torch
from safetensors.torch import load_file

import khanhllm
from conftest import build, tiny
from khanhllm import optim
from khanhllm.errors import UserError
from khanhllm.inference.generate import write
from khanhllm.lab import doctor
from khanhllm.machine.devices import open_machine
from khanhllm.machine.precision import keep_in_bf16
from khanhllm.runs import evaluate
from khanhllm.runs.run import open_run
from khanhllm.schema import MachineConfig, OptimConfig, Sampling
from khanhllm.settings import resolve
from khanhllm.training import checkpoint
from khanhllm.training.run import train

pytestmark = pytest.mark.slow

HALVES = {"weights": "bf16"}
RUNGS = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "bf16-weights": HALVES,
    "bf16-gradients": HALVES | {"gradients": "bf16"},
}
IDS = torch.arange(64).view(2, 32)
VECTORS = ("norm", "bias", "router")


def learned(style, rung, name, steps=30):
    """A tiny model before and after learning one batch by heart: its losses, and the model with gradients at hand."""
    config = resolve(tiny(style).model_dump(), {"machine": RUNGS[rung]})
    machine, model = open_machine(config.machine), build(config)
    if config.machine.weights == "bf16":
        keep_in_bf16(model, config.machine.gradients)
    optimizer, losses = optim.build(model, OptimConfig(name=name, lr=3e-3)), []
    for step in range(steps + 1):
        with machine.autocast():
            nll_BT, _ = model(IDS, IDS.flip(1))
        for _ in range(2):
            nll_BT.mean().backward(retain_graph=True)
        losses.append(nll_BT.mean().item())
        if step < steps:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["step"] = step
            optimizer.step()
            optimizer.zero_grad()
    return losses, model


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("style", ["classic", "modern"])
def test_every_rung_learns_as_well_as_fp32(style, rung, name):
    losses, model = learned(style, rung, name)
    exact, _ = learned(style, "fp32", "adamw")
    assert losses[0] == pytest.approx(exact[0], abs=0.01)
    assert losses[-1] == pytest.approx(exact[-1], rel=0.1)
    for key, parameter in model.named_parameters():
        vector = any(part in key for part in VECTORS)
        kept = torch.float32 if vector or "weights" not in RUNGS[rung] else torch.bfloat16
        summed = torch.float32 if vector or "gradients" not in RUNGS[rung] else torch.bfloat16
        assert (parameter.dtype, parameter.grad.dtype) == (kept, summed), key


def test_gradients_of_bf16_weights_add_up_in_fp32():
    """256 + 1 and again + 1: bf16 has no 257 and would stay at 256."""
    layer = torch.nn.Linear(8, 8, bias=False)
    keep_in_bf16(torch.nn.ModuleDict({"up": layer}))
    for size in (256, 1, 1):
        (layer(torch.ones(1, 8, dtype=torch.bfloat16)) * size).sum().backward()
    assert (layer.weight.grad == 258).all()


def small(corpus, cache, **machine):
    data = {"source": str(corpus), "cache": str(cache), "validation": 0.2, "workers": 1}
    return resolve(tiny().model_dump(), {"data": data, "train": {"steps": 4}, "machine": machine})


def test_a_run_with_bf16_weights_opens_anywhere(corpus, tmp_path):
    config = small(corpus, tmp_path / "shards", **HALVES)
    train(config, tmp_path / "run")
    kept = load_file(checkpoint.newest(tmp_path / "run") / "model.safetensors")
    assert kept["head.weight"].dtype == torch.bfloat16
    assert kept["head.norm.weight"].dtype == torch.float32
    model = khanhllm.load(tmp_path / "run", precision="fp32").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.logits(IDS).isfinite().all()
    scores = []
    for precision in ("fp32", "bf16"):
        saved = open_run(tmp_path / "run", MachineConfig(device="cpu", precision=precision, threads=1))
        assert all(torch.equal(tensor, kept[key].to(tensor.dtype)) for key, tensor in saved.model.state_dict().items())
        assert (saved.model.head.weight.dtype == torch.bfloat16) == (precision == "bf16")
        scores.append(saved.score_windows(evaluate.held_out(saved).windows())["val_ce"])
        assert "".join(write(saved.model, saved.tokenizer, saved.machine, "import", Sampling(tokens=8, min_p=0)))
    assert scores[0] == pytest.approx(scores[1], abs=0.01)


def test_a_run_changes_rungs_when_it_is_resumed(corpus, tmp_path):
    """Moments are the same on every rung, so a run may be finished in fp32, or made to fit a smaller machine."""
    whole = small(corpus, tmp_path / "shards")
    train(whole, tmp_path / "run")
    for steps, machine in ((6, HALVES), (8, {"precision": "fp32"})):
        longer = small(corpus, tmp_path / "shards", **machine).model_copy(
            update={"train": whole.train.model_copy(update={"steps": steps})}
        )
        train(longer, tmp_path / "run", resume=True)
        kept = load_file(checkpoint.newest(tmp_path / "run") / "model.safetensors")
        assert kept["head.weight"].dtype == (torch.bfloat16 if machine is HALVES else torch.float32)


@pytest.mark.parametrize(
    ("machine", "says"),
    [
        ({"weights": "bf16", "precision": "tf32"}, "weights = bf16 needs precision = bf16"),
        ({"weights": "bf16", "precision": "fp32"}, "weights = bf16 needs precision = bf16"),
        ({"gradients": "bf16"}, "gradients = bf16 needs weights = bf16"),
        ({"weights": "fp16"}, "machine.weights"),
    ],
)
def test_rungs_that_do_not_exist_are_refused(machine, says):
    with pytest.raises(UserError, match=says):
        resolve({"machine": machine})


def test_the_doctor_examines_in_full_precision(corpus, tmp_path, capsys):
    train(small(corpus, tmp_path / "shards", **HALVES), tmp_path / "run")
    capsys.readouterr()
    doctor.examine(str(tmp_path / "run"), MachineConfig(device="cpu", threads=1, **HALVES), as_json=True)
    laws = {finding["law"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert laws["the cache changes nothing"]["kept"], laws
