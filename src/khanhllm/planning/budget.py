"""Fit a step into the memory: its rows stay, the micro-batch shrinks, and activations are recomputed only if they must
be. simulation.py measures what each choice takes."""

import re
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from khanhllm import limits
from khanhllm.errors import UserError
from khanhllm.machine.cards import Card
from khanhllm.machine.devices import Machine
from khanhllm.model.counts import on_paper
from khanhllm.planning.simulation import SimulatedStep, simulate_step
from khanhllm.schema import Config
from khanhllm.settings import resolve
from khanhllm.units import as_size

CONTEXT = 600_000_000
"""memory that CUDA and its libraries take on a card without a model (bytes, about)"""
MORE_ROWS = "raise train.accumulation or train.micro_batch"
SHARE = 0.95
"""share of the memory that a plan fills: allocators leave gaps"""
ENOUGH = {"cpu": 2**12, "cuda": 2**15}
"""tokens in a micro-batch; a larger one is no faster"""
SWITCHES: dict[str, dict[str, Any]] = {
    "--machine.checkpointing selective": {"machine": {"checkpointing": "selective"}},
    "--machine.checkpointing full": {"machine": {"checkpointing": "full"}},
    "--machine.weights bf16": {"machine": {"weights": "bf16", "precision": "auto"}},
    "--machine.weights bf16 --machine.gradients bf16": {
        "machine": {"weights": "bf16", "gradients": "bf16", "precision": "auto"}
    },
}


@dataclass(frozen=True)
class Hardware:
    """The hardware that a plan is for: this machine, or a card known by name."""

    name: str
    device: str
    """cpu or cuda"""
    precision: str
    memory: int
    """bytes that a run may fill, its process included"""
    process: int
    """bytes in use before the model is made"""
    peak_flops: float | None
    processes: int = 1
    """that share the work; a split of all makes each take less"""

    def takes(self, config: Config, update: bool = True) -> SimulatedStep:
        """What one step of `config` takes on this hardware; `update` as in `simulate_step`."""
        precision = "bf16" if config.machine.weights == "bf16" else self.precision
        step = simulate_step(config, precision, self.device, update)
        return in_shards(step, config, self.processes) if config.machine.split == "all" else step

    def total(self, config: Config) -> int:
        """Bytes at the peak of forward and backward, the process included."""
        return self.process + self.takes(config, update=False).peak


def here(machine: Machine) -> Hardware:
    """This machine, as it is now: what is free, and what this process holds already."""
    if machine.device.type == "cuda":
        memory = round(SHARE * _card_memory(machine.device))
        size = machine.group.size
        return Hardware(str(machine.device), "cuda", machine.precision, memory, CONTEXT, machine.peak_flops, size)
    try:
        process = psutil.Process().memory_info().rss
        free, total = limits.memory()
    except (OSError, psutil.Error, NotImplementedError) as error:
        raise UserError(f"this machine's memory cannot be read ({error}); give it: --memory 8GB") from None
    memory, size = min(total, free // machine.group.local_size + process), machine.group.size
    return Hardware("this machine", "cpu", machine.precision, round(SHARE * memory), process, machine.peak_flops, size)


def least(machine: Machine) -> Hardware:
    """This machine, with as much free as the process has that has least. All processes of its group call it at once."""
    own = here(machine)
    free = min(machine.group.exchange(own.memory - own.process))[0]
    return replace(own, memory=own.process + round(free))


def _card_memory(device: torch.device) -> int:
    """Bytes of a CUDA device for this process, its context included: what others use of the card is theirs."""
    free, whole = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * whole + CONTEXT
    return min(whole, round(allowed), free + torch.cuda.memory_reserved(device) + CONTEXT)


def on(name: str, card: Card) -> Hardware:
    """A card known by name; its precision is bf16, which all of them have."""
    return Hardware(name, "cuda", "bf16", round(SHARE * card.memory * 1e9), CONTEXT, card.tflops * 1e12)


def read_size(given: Any) -> int:
    """What --memory says, such as "8GB", in bytes. UserError for anything else."""
    match = re.fullmatch(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([kmgt]?)(i?)b?\s*", str(given).lower())
    if not match or not float(match[1]):
        raise UserError(f"--memory: must be a size, such as 8GB or 600MB (got {str(given)[:60]!r})")
    size = round(float(match[1]) * (1024 if match[3] else 1000) ** ("kmgt".find(match[2] or "?") + 1))
    if size < 10**6 and not match[2]:  # nobody means so few bytes
        raise UserError(f"--memory: {str(given)[:60]} has no unit; write such as 8GB or 600MB")
    return size


def fit_micro_batch(config: Config, hardware: Hardware) -> Config:
    """The same step in micro-batches that fit: with the least recomputation possible, then as large as possible.

    Raises UserError if nothing fits.
    """
    rows = micro_batch_sizes(config, ENOUGH[hardware.device])
    for checkpointing in ("none", "selective", "full"):
        least = with_micro_batch(config, 1, checkpointing)
        if hardware.total(least) <= hardware.memory:
            first = bisect_left(
                rows, True, key=lambda size: hardware.total(with_micro_batch(least, size)) <= hardware.memory
            )
            if hardware.process + hardware.takes(with_micro_batch(least, rows[first])).peak <= hardware.memory:
                return with_micro_batch(least, rows[first])
            break  # the update itself is too large, however the step is cut
    takes = hardware.process + hardware.takes(with_micro_batch(config, 1, "full")).peak
    raise UserError(
        f"nothing fits into {hardware.memory / 1e9:.2f} GB: a micro-batch of one row, everything recomputed, takes "
        f"{takes / 1e9:.2f} GB; {advice(with_micro_batch(config, 1, 'full'), hardware)}"
    )


def in_shards(step: SimulatedStep, config: Config, processes: int) -> SimulatedStep:
    """What a step takes of one of these processes, where all lies in shards.

    At most two parts of the model are together at one time, one at work and one on its way, and the gradients of one:
    as they are, and twice on their way. Copies in bf16, which shards make none of, are still counted.
    """
    if processes == 1:
        return step
    largest = max(sum(p.numel() for p in part.parameters()) for part in on_paper(config.model).parts())
    cut = {part: step.at_peak[part] // processes for part in ("weights", "gradients", "optimizer")}
    cut["work space"] = step.at_peak["work space"] + 5 * 4 * largest
    weights, gradients, optimizer = (size // processes for size in (step.weights, step.gradients, step.optimizer))
    return SimulatedStep(weights, gradients, optimizer, step.at_peak | cut, step.flops, step.update)


def micro_batch_sizes(config: Config, enough: int) -> list[int]:
    """Micro-batches that divide the rows of a step, from the largest of `enough` tokens down to one row."""
    rows, context = config.train.rows_per_step, config.model.context
    return [size for size in range(rows, 0, -1) if rows % size == 0 and (size == 1 or size * context <= enough)]


def shared_out(config: Config, hands: int, evenly: bool = False) -> Config:
    """The same step in at least so many micro-batches, as each process needs one; evenly many where that can be.

    Raises UserError if it has too few rows, or must come out `evenly` and cannot.
    """
    train = config.train
    if train.accumulation >= hands and not (evenly and train.accumulation % hands):
        return config
    smaller = [size for size in micro_batch_sizes(config, 2**62) if size <= train.rows]
    cuts = [size for size in smaller if train.rows_per_step // size >= hands]
    if not cuts:
        shares = config.machine.shares
        who = f"the shares {shares} need {hands} micro-batches" if shares else f"{hands} processes need one row each"
        raise UserError(f"a step has {train.rows_per_step} rows, but {who}; {MORE_ROWS}")
    even = [size for size in cuts if train.rows_per_step // size % hands == 0]
    if evenly and not even:
        few = f"a step of {train.rows_per_step} rows cannot give {hands} processes equally many micro-batches"
        raise UserError(f"{few}; take a train.accumulation that {hands} divides")
    return with_micro_batch(config, (even or cuts)[0])


def with_micro_batch(config: Config, rows: int, checkpointing: str | None = None) -> Config:
    """The config with as many rows in a step, but `rows` in each micro-batch."""
    train = {"micro_batch": rows, "accumulation": config.train.rows_per_step // rows}
    machine = {"checkpointing": checkpointing} if checkpointing else {}
    return resolve(config.model_dump(), {"train": train, "machine": machine})


def savings(config: Config, hardware: Hardware) -> dict[str, tuple[int, float]]:
    """For each switch that changes something: bytes that it saves at the peak, and arithmetic that it adds (share)."""
    plain = hardware.takes(config, update=False)
    saved = {}
    smaller = config.optim.name.removesuffix("8bit") + "8bit"
    switches = SWITCHES | {f"--optim.name {smaller}": {"optim": {"name": smaller}}}
    if hardware.processes > 1:
        switches |= {"--machine.split all": {"machine": {"split": "all"}}}
    for switch, settings in switches.items():
        try:
            other = resolve(config.model_dump(), settings)
            switched = hardware.takes(other, update=False) if other != config else None
        except UserError:  # it does not go with what is on already, or a library that it needs is missing
            continue
        if switched:
            saved[switch] = (plain.peak - switched.peak, switched.flops / plain.flops - 1)
    return saved


def advice(config: Config, hardware: Hardware) -> str:
    """The three switches that would save most, in words."""
    saved = sorted(
        ((size, switch) for switch, (size, _) in savings(config, hardware).items() if size > 0), reverse=True
    )
    if not saved:
        return "every switch is on already: take a smaller model or a shorter model.context"
    return "these save most: " + ", ".join(f"{switch} ({as_size(size)})" for size, switch in saved[:3])
