"""The laws that a healthy model obeys, as plain functions, and a command that checks them on a preset or run.

Each law takes a model and returns a `Finding`: kept or broken, what was measured, and what to do about it. The tests
call the same functions.
"""

import copy
import importlib.metadata
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from khanhllm import optim
from khanhllm.errors import UserError, first_line
from khanhllm.lab import experts
from khanhllm.lab.sample import take
from khanhllm.machine.adapt import adapt, aligned
from khanhllm.machine.devices import Machine, open_machine
from khanhllm.machine.precision import keep_in_bf16
from khanhllm.model import Transformer
from khanhllm.model.counts import on_paper, total_parameters
from khanhllm.model.experts import GROUPED, LOOP
from khanhllm.model.losses import even_load, load_balance, micro_batch_loss
from khanhllm.model.moe import MoE
from khanhllm.planning import budget
from khanhllm.runs.run import Run, open_run
from khanhllm.schema import Config, LossConfig, MachineConfig, OptimConfig
from khanhllm.settings import preset, preset_names, read_config, resolve

SAMPLE = 2**13
"""tokens on which the mixtures of a run are judged"""
LARGEST = 60_000_000
"""presets with more parameters are examined on a small copy of the same shape"""


@dataclass(frozen=True)
class Finding:
    """The result of one check; the advice is for a law that is broken, or for a warning."""

    law: str
    kept: bool
    measured: str
    advice: str = ""
    warning: bool = False
    """nothing is wrong, but the advice is worth a thought"""


def future_has_no_gradient(model: Transformer) -> Finding:
    """The prediction at a position has a gradient of exactly zero from later tokens."""
    ids_BT = some_ids(model, rows=2, length=24)
    inputs: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor) -> None:
        output.retain_grad()
        inputs.append(output)

    handle = model.embedding.register_forward_hook(keep)
    leak = 0.0
    length = ids_BT.shape[1]
    for position in range(0, length - 1, max(1, length // 3)):
        inputs.clear()
        model.logits(ids_BT)[:, position].square().sum().backward()
        gradient_BTD = inputs[0].grad
        assert gradient_BTD is not None
        leak = max(leak, gradient_BTD[:, position + 1 :].abs().max().item())
    handle.remove()
    model.zero_grad(set_to_none=True)
    advice = "the model sees the answer while it learns: check the attention mask (a loss near 0.13 is its sign)"
    return Finding("no position sees the future", leak == 0, f"largest gradient from later tokens {leak:g}", advice)


@torch.no_grad()
def first_loss_is_chance(model: Transformer) -> Finding:
    """A model that knows nothing gives every token the same chance: loss ln(vocabulary), within 0.3."""
    ids_BT = some_ids(model, rows=4, length=64)
    nll_BT, _ = model(ids_BT[:, :-1], ids_BT[:, 1:])
    loss, chance = nll_BT.mean().item(), math.log(model.config.vocab_size)
    advice = "the initial weights are too large, or the head is wrong: see Transformer.initialise"
    return Finding("the first loss is chance", abs(loss - chance) < 0.3, f"{loss:.3f}, ln V = {chance:.3f}", advice)


@torch.no_grad()
def cache_changes_nothing(model: Transformer) -> Finding:
    """Logits are the same for ids at once and in pieces (7, then 4, then one by one) with a cache."""
    ids_BT = some_ids(model, rows=2, length=16)
    whole = model.logits(ids_BT)
    cache = model.new_cache(rows=2)
    sizes = [7, 4, *[1] * (ids_BT.shape[1] - 11)] if ids_BT.shape[1] > 11 else [1] * ids_BT.shape[1]
    pieces = [model.logits(piece, cache) for piece in ids_BT.split(sizes, dim=1)]
    gap = (torch.cat(pieces, dim=1) - whole).abs().max().item()
    return Finding("the cache changes nothing", gap < 1e-3, f"largest difference {gap:.1e}", "generation would drift")


@torch.no_grad()
def backends_agree(model: Transformer) -> Finding:
    """The loop over experts, which defines what is right, and grouped_mm give the same logits."""
    law, shape = "grouped experts equal the loop", model.config
    if not aligned(shape):
        widths = f"widths of {shape.dim} and {shape.expert_width}"
        return Finding(law, True, f"not compared: {widths} are no multiples of 8, so the loop is used")
    ids_BT = some_ids(model, rows=2, length=32)
    stacks: list[Any] = [module.experts for module in model.modules() if isinstance(module, MoE)]
    before = [experts.backend for experts in stacks]
    logits = []
    try:
        for backend in (LOOP, GROUPED):
            for experts in stacks:
                experts.backend = backend
            logits.append(model.logits(ids_BT))
    except (RuntimeError, NotImplementedError) as error:  # no kernel for this device or type: auto takes another
        return Finding(law, True, f"not compared, grouped_mm does not run here: {first_line(error)}")
    finally:
        for experts, backend in zip(stacks, before, strict=True):
            experts.backend = backend
    gap = (logits[0] - logits[1]).abs().max().item()
    return Finding(law, gap < 1e-3, f"largest difference {gap:.1e}", "use --machine.experts loop")


def rebuilt_activations_change_nothing(model: Transformer) -> Finding:
    """Loss, gradients and routing are the same with activation checkpointing, selective and full; gradients but for
    what differs between two plain passes, where the device adds in no fixed order."""
    machine = Machine(model.head.weight.device, "fp32", compile=False, experts="loop")
    plain_gradients, plain_load = _gradients(model)
    noise = _gap(_gradients(model)[0], plain_gradients)
    gap, same_routing = 0.0, True
    for kind in ("selective", "full"):
        gradients, load = _gradients(adapt(copy.deepcopy(model), machine, kind))
        same_routing &= torch.equal(load, plain_load)
        gap = max(gap, _gap(gradients, plain_gradients))
    measured = f"largest gradient difference {gap:.1e}, routing {'the same' if same_routing else 'differs'}"
    kept = gap < max(1e-6, 4 * noise) and same_routing
    return Finding("rebuilt activations change nothing", kept, measured, "train without them")


def learns_one_batch(model: Transformer, steps: int = 60) -> Finding:
    """A copy of the model learns one small batch by heart, and each of its parameters moves."""
    pupil = copy.deepcopy(model)
    before = [parameter.detach().clone() for parameter in pupil.parameters()]
    optimizer = optim.build(pupil, OptimConfig(lr=2e-3, weight_decay=0))
    ids_BT = some_ids(pupil, rows=2, length=32)
    losses = []
    for _ in range(steps):
        loss = _loss(pupil, ids_BT)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    names = [name for name, _ in pupil.named_parameters()]
    still = [n for n, old, new in zip(names, before, pupil.parameters(), strict=True) if torch.equal(old, new)]
    measured = f"loss {losses[0]:.2f} to {losses[-1]:.2f} in {steps} steps, {len(still)} parameters stood still"
    advice = f"no gradient reaches {still[0]}" if still else "the optimizer or the gradient is broken"
    return Finding("one batch is learned by heart", losses[-1] < 0.3 * losses[0] and not still, measured, advice)


@torch.no_grad()
def experts_share_the_work(model: Transformer) -> Finding:
    """No expert starves: each receives at least a fiftieth of an even share."""
    routings = model.trunk(some_ids(model, rows=8, length=64))[1]
    load_LE = torch.stack([routing.load_E / routing.load_E.sum() for routing in routings])
    prob_LE = torch.stack([routing.prob_E for routing in routings])
    even = 1 / load_LE.shape[1]
    least, most = load_LE.min().item() / even, load_LE.max().item() / even
    balance = load_balance(load_LE, prob_LE).mean().item()
    measured = f"least {least:.2f}, most {most:.2f} of an even share; balance {balance:.2f} (1 is even)"
    return Finding("experts share the work", least >= 0.02, measured, "raise loss.balance, or train longer")


def mixtures_earn_their_keep(opened: Run) -> Finding:
    """A warning of mixtures that a run would not miss: switched off, on text that it held out, they cost next to
    nothing, or less than can be told from nothing."""
    law = "mixtures earn their keep"
    try:
        found = experts.worth(opened, take(opened, None, SAMPLE))
    except UserError as error:
        return Finding(law, True, f"not measured: {error}")
    idle = [layer for layer, cost in found.items() if not cost.told_apart or cost.share < experts.WORTHLESS]
    costs = [f"layer {layer} {100 * cost.share:+.1f} ±{100 * cost.error:.1f} %" for layer, cost in found.items()]
    advice = (
        f"the run would be as good without the mixture of layer {', '.join(map(str, idle))}: train longer, make it "
        "dense (model.pattern), or look closer with khanhllm experts"
    )
    return Finding(law, True, f"switched off, they cost in bits: {', '.join(costs)}", advice, warning=bool(idle))


def some_ids(model: Transformer, rows: int, length: int) -> Tensor:
    """Random ids, the same every time, as long as the context allows."""
    shape = (rows, min(length, model.config.context))
    generator = torch.Generator().manual_seed(7)
    return torch.randint(model.config.vocab_size, shape, generator=generator).to(model.head.weight.device)


def _loss(model: Transformer, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of one batch, and each expert's load."""
    load_LE = even_load(len(model.config.moe_layers), model.config.experts).to(ids_BT.device)
    inputs_BT, targets_BT = ids_BT[:, :-1], ids_BT[:, 1:]
    tokens = targets_BT.numel()
    loss, _, routing_L = micro_batch_loss(model, inputs_BT, targets_BT, load_LE, tokens, LossConfig(), nullcontext())
    return loss, routing_L.load_E


def _gradients(model: Transformer) -> tuple[list[Tensor], Tensor]:
    loss, load_LE = _loss(model, some_ids(model, rows=2, length=32))
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return gradients, load_LE


def _gap(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


LAWS: list[Callable[[Transformer], Finding]] = [
    future_has_no_gradient,
    cache_changes_nothing,
    rebuilt_activations_change_nothing,
    learns_one_batch,
]
MIXTURE_LAWS: list[Callable[[Transformer], Finding]] = [backends_agree, experts_share_the_work]


def small_copy(config: Config) -> Config:
    """The same style, pattern and routing, small enough to examine in seconds."""
    small = {"dim": 64, "heads": 4, "kv_heads": 0, "hidden": 128, "expert_hidden": 64, "context": 64, "vocab_size": 512}
    return resolve(config.model_dump(), {"model": small})


def examine(patient: str, machine_config: MachineConfig, as_json: bool) -> int:
    """Print one line for each law; 0 if all are kept, 1 otherwise."""
    console = Console(highlight=False, quiet=as_json)
    findings = []
    for finding in _examination(patient, machine_config, console):
        findings.append(finding)
        mark = "[yellow]![/]" if finding.warning else "[green]✓[/]" if finding.kept else "[red]✗[/]"
        console.print(f"{mark} {finding.law:<34}", end=" ")
        console.print(finding.measured, markup=False, soft_wrap=True)
        if finding.warning or not finding.kept:
            console.print(f"    → {finding.advice}", markup=False, soft_wrap=True)
    healthy = all(finding.kept for finding in findings)
    console.print(f"\n{'healthy' if healthy else 'needs attention'}: {patient}", markup=False)
    if as_json:
        print(json.dumps({"patient": patient, "healthy": healthy, "findings": [asdict(f) for f in findings]}))
    return 0 if healthy else 1


def _examination(patient: str, wanted: MachineConfig, console: Console) -> Iterator[Finding]:
    # the laws are exact statements, so the model is checked in full precision and without a compiler
    exact = {"precision": "fp32", "weights": "fp32", "gradients": "fp32", "compile": "off", "experts": "loop"}
    machine_config = wanted.model_copy(update=exact)
    if patient in preset_names():
        config = resolve(preset(patient))
    elif (Path(patient) / "config.toml").exists():
        config = read_config(Path(patient))
    else:
        raise UserError(f"{patient} is neither a run folder nor a preset; presets: {', '.join(preset_names())}")
    machine = open_machine(machine_config)
    machine.take_process()
    yield from _surroundings(open_machine(wanted), config.optim.name)
    if patient in preset_names():
        size = total_parameters(on_paper(config.model))
        yield _memory(config, wanted, machine)
        if size > LARGEST:
            console.print(f"  ({size:,} parameters; the laws are checked on a small copy of the same shape)")
            config = small_copy(config)
        model = Transformer(config.model)
        model.initialise(torch.Generator().manual_seed(0))
        model = adapt(model, machine)
        yield first_loss_is_chance(model)
    else:
        opened = open_run(Path(patient), machine_config)
        model = opened.model
        if model.config.moe_layers:
            yield mixtures_earn_their_keep(opened)
    for law in LAWS + (MIXTURE_LAWS if model.config.moe_layers else []):
        yield law(model)


def _surroundings(machine: Machine, optimizer: str) -> Iterator[Finding]:
    yield Finding("device", True, machine.describe())
    names = ("torch", "tokenizers", "tiktoken", "datatrove", "bitsandbytes", "safetensors")
    yield Finding("libraries", True, ", ".join(f"{name} {version_of(name)}" for name in names))
    yield _eight_bit(machine, needed=optimizer.endswith("8bit"))
    yield _compiler(machine)
    free = shutil.disk_usage(".").free / 1e9
    yield Finding("disk", free > 1, f"{free:.1f} GB free here", "checkpoints need room: use --run on another disk")


def version_of(name: str) -> str:
    """The version of an installed library, or "missing"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _eight_bit(machine: Machine, needed: bool) -> Finding:
    """Whether 8-bit AdamW works on the machine's device: only a step there shows it. A fault only if `needed`."""
    law, advice = "8-bit AdamW", "use --optim.name adamw" if needed else "do without --optim.name adamw8bit or muon8bit"
    try:
        up = torch.nn.Linear(128, 128)
        layer = torch.nn.ModuleDict({"up": up}).to(machine.device)
        optimizer = optim.build(layer, OptimConfig(name="adamw8bit"))
        before = up.weight.detach().clone()
        up(torch.ones(1, 128, device=machine.device)).sum().backward()
        optimizer.step()
        moved = not torch.equal(up.weight, before)  # waits for the device, which may only now say what failed
    except Exception as error:
        return Finding(law, not needed, first_line(error), advice, warning=not needed)
    measured = f"{'takes a step' if moved else 'moves nothing'} on {machine.device}"
    return Finding(law, moved or not needed, measured, advice, warning=not (moved or needed))


def _compiler(machine: Machine) -> Finding:
    """Whether torch.compile finds what it needs: a C++ compiler on a CPU, Triton and a C compiler on CUDA."""
    names = ("cc", "gcc", "clang", "cl") if machine.device.type == "cuda" else ("c++", "g++", "clang++", "cl")
    compiler = next((path for name in names if (path := shutil.which(name))), None)
    measured = f"compiler {compiler or 'not found'}, compile is {'on' if machine.compile else 'off'}"
    found, install = bool(compiler), "g++"
    if machine.device.type == "cuda":
        triton = find_spec("triton") is not None
        measured = f"Triton {'found' if triton else 'not found'}, C {measured}"
        found, install = found and triton, "triton and gcc"
    else:
        measured = f"C++ {measured}"
    advice = f"install {install}, or use --machine.compile off"
    return Finding("torch.compile", found or not machine.compile, measured, advice)


def _memory(config: Config, wanted: MachineConfig, machine: Machine) -> Finding:
    """Whether weights, gradients and moments fit into the memory of the device; activations come on top."""
    try:
        needed, hardware = _held(config, wanted), budget.here(machine)
    except UserError as error:
        return Finding("memory", False, str(error), "install what is missing, or use --optim.name adamw")
    room, size = hardware.memory - hardware.process, total_parameters(on_paper(config.model))
    measured = (
        f"{size:,} parameters; weights, gradients and moments take {needed / 1e9:.2f} GB of {room / 1e9:.2f} GB "
        f"on {machine.device}"
    )
    smaller = config.optim.name.removesuffix("8bit") + "8bit"
    return Finding("memory", needed < room, measured, f"use --optim.name {smaller} or a smaller preset")


def _held(config: Config, wanted: MachineConfig) -> int:
    """Bytes of weights, gradients and moments; bf16 where the preset or the command line says so."""
    model = on_paper(config.model)
    if "bf16" in (config.machine.weights, wanted.weights):
        keep_in_bf16(model, "bf16" if "bf16" in (config.machine.gradients, wanted.gradients) else "fp32")
    optimizer = optim.build(model, config.optim)
    parameters: list[Any] = list(model.parameters())
    held = sum(p.numel() * (p.dtype.itemsize + p.grad_dtype.itemsize) for p in parameters)
    return int(held) + optim.state_size(optimizer)
