"""The doctor tells the truth about memory, 8 bits, the compiler and the device, and falls over no size."""

import shutil
from dataclasses import replace

import pytest
import torch

from conftest import build, plain_machine, tiny
from khanhllm import optim
from khanhllm.lab import doctor
from khanhllm.machine.adapt import adapt
from khanhllm.machine.devices import Machine
from khanhllm.optim import state_bytes
from khanhllm.planning import budget
from khanhllm.schema import MachineConfig
from khanhllm.settings import preset, resolve

CUDA = Machine(torch.device("cuda", 0), "bf16", compile=True, experts="loop")


@pytest.mark.parametrize(
    "sizes", [{"dim": 30, "heads": 3, "expert_hidden": 22}, {"expert_hidden": 9}, {"dim": 36, "heads": 3}]
)
def test_no_size_that_trains_makes_it_fall_over(sizes):
    model = build(tiny(**sizes))
    for law in doctor.LAWS + doctor.MIXTURE_LAWS:
        assert law(model).kept, law.__name__


def test_a_device_without_grouped_mm_is_no_fault(monkeypatch):
    def missing(*_):
        raise NotImplementedError("The operator 'aten::_grouped_mm' is not implemented for the MPS device\nmore")

    model = build(tiny())
    before = model.blocks[1].feedforward.experts.backend
    monkeypatch.setattr(doctor, "GROUPED", before._replace(grouped_mm=missing))
    finding = doctor.backends_agree(model)
    assert finding.kept and "MPS" in finding.measured and "more" not in finding.measured
    assert model.blocks[1].feedforward.experts.backend is before


def test_a_device_that_adds_in_no_fixed_order_is_no_fault(monkeypatch):
    """Gradients that differ by 1e-5 from pass to pass say nothing about activations that are computed again."""
    honest, dice = doctor._gradients, torch.Generator().manual_seed(0)

    def noisy(model):
        gradients, load = honest(model)
        return [g + 1e-5 * torch.randn(g.shape, generator=dice).clamp(-1, 1) for g in gradients], load

    monkeypatch.setattr(doctor, "_gradients", noisy)
    assert doctor.rebuilt_activations_change_nothing(build(tiny())).kept


@pytest.mark.parametrize("halves", [{}, {"weights": "bf16"}, {"weights": "bf16", "gradients": "bf16"}], ids=str)
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon", "muon8bit"])
def test_its_memory_is_what_a_step_holds(name, halves):
    config = resolve(tiny(dim=64, hidden=128).model_dump(), {"optim": {"name": name}, "machine": halves})
    machine = plain_machine()
    model = build(config)
    adapt(model, machine, "none", config.machine.weights, config.machine.gradients)
    optimizer = optim.build(model, config.optim)
    ids = torch.arange(64).view(2, 32)
    with replace(machine, precision="bf16").autocast() if halves else machine.autocast():
        model(ids, ids)[0].mean().backward()
    held = sum(p.nbytes + p.grad.nbytes for p in model.parameters())
    optimizer.step()
    held += state_bytes(optimizer)
    assert doctor._held(config, MachineConfig()) == held


def test_the_memory_of_small_is_that_of_its_optimizer(monkeypatch):
    monkeypatch.setattr(budget, "here", lambda _: budget.Hardware("a test", "cpu", "fp32", 3 * 10**9, 10**9, None))
    finding = doctor._memory(resolve(preset("small")), MachineConfig(), plain_machine())
    assert not finding.kept and "take 2.4" in finding.measured and "of 2.00 GB on cpu" in finding.measured


def test_the_memory_is_that_of_the_device_asked_for(monkeypatch):
    """A machine with a card, and a doctor that is told to look at the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1, 1))
    assert doctor._memory(resolve(preset("nano")), MachineConfig(device="cpu"), plain_machine()).kept


def test_eight_bits_are_tried_on_the_machine_s_device():
    assert doctor._eight_bit(plain_machine(), needed=True).measured == "takes a step on cpu"
    if not torch.cuda.is_available():
        finding = doctor._eight_bit(CUDA, needed=True)
        assert not finding.kept and finding.advice == "use --optim.name adamw"
        finding = doctor._eight_bit(CUDA, needed=False)  # the preset or run does without it
        assert finding.kept and finding.warning


@pytest.mark.parametrize(
    ("machine", "tools", "triton", "kept"),
    [
        (CUDA, {"gcc"}, True, True),
        (CUDA, {"gcc"}, False, False),
        (CUDA, set(), True, False),
        (replace(CUDA, compile=False), set(), False, True),
        (replace(plain_machine(), compile=True), {"g++"}, False, True),
        (replace(plain_machine(), compile=True), {"gcc"}, True, False),
    ],
)
def test_the_compiler_is_the_one_that_the_device_needs(machine, tools, triton, kept, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in tools else None)
    monkeypatch.setattr(doctor, "find_spec", lambda _: triton or None)
    finding = doctor._compiler(machine)
    assert finding.kept == kept
    assert ("Triton" in finding.measured) == (machine.device.type == "cuda")
