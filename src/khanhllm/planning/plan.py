"""Predict before training whether a run fits and how long it takes, by simulating one of its steps."""

import dataclasses
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from rich.console import Console

from khanhllm.machine.cards import card
from khanhllm.machine.devices import open_machine
from khanhllm.model.counts import active_parameters, flops_per_token, on_paper, total_parameters
from khanhllm.planning import budget
from khanhllm.planning.budget import Hardware
from khanhllm.schema import Config
from khanhllm.units import duration

ASSUMED = {"cuda": 0.4, "cpu": 0.6}
"""assumed share of the peak rate that training reaches, if nothing was measured"""
PAYS = 10.0
"""tokens for each parameter at work from which on mixtures with a common start were ahead of their dense twins after
the same time: above the upper end of what races on a CPU leave open (benchmarks/mixture.py table)"""
Report = dict[str, Any]


def hardware_for(config: Config, memory: str | None = None, card_name: str | None = None) -> Hardware:
    """This machine, or a card known by name. memory: size to fill instead of its own ("8GB")."""
    hardware = budget.on(*card(card_name)) if card_name else budget.here(open_machine(config.machine))
    precision = config.machine.precision
    if card_name and precision not in ("auto", hardware.precision):  # whose rates are not in the table
        hardware = dataclasses.replace(hardware, precision=precision, peak_flops=None)
    return dataclasses.replace(hardware, memory=budget.read_size(memory)) if memory else hardware


def plan(config: Config, hardware: Hardware) -> Report:
    """The memory and time that a run of `config` takes: numbers in bytes, seconds and tokens."""
    model, train = on_paper(config.model), config.train
    step = hardware.takes(config)
    attention = 12 * len(config.model.pattern) * config.model.dim * config.model.context
    flops = flops_per_token(model)
    arithmetic = (step.flops * train.accumulation + step.update) / config.tokens_per_step
    rate = hardware.peak_flops * ASSUMED[hardware.device] / arithmetic if hardware.peak_flops else None
    return {
        "place": hardware.name,
        "parameters": total_parameters(model),
        "active_parameters": active_parameters(model),
        "memory": hardware.memory,
        "process": hardware.process,
        "at_peak": step.at_peak,
        "total": hardware.process + step.peak,
        "weights": step.weights,
        "gradients": step.gradients,
        "optimizer": step.optimizer,
        "micro_batch": train.micro_batch,
        "accumulation": train.accumulation,
        "checkpointing": config.machine.checkpointing,
        "precision": "bf16 weights" if config.machine.weights == "bf16" else hardware.precision,
        "tokens_per_step": config.tokens_per_step,
        "flops_per_token": flops,
        "flops_per_token_causal": flops - attention // 2,
        "rate_from": f"{ASSUMED[hardware.device]:.0%} of the peak rate, assumed; --measure replaces it",
        **_time(config, rate),
        "switches": {
            switch: {"saves_mb": round(saved / 1e6, 1), "adds_arithmetic": round(added, 4)}
            for switch, (saved, added) in _switches(config, hardware).items()
        },
    }


def _time(config: Config, rate: float | None) -> Report:
    train = config.train
    tokens: int | None = train.steps * config.tokens_per_step
    seconds = train.steps * config.tokens_per_step / rate if rate else None
    if train.seconds:
        seconds, tokens = train.seconds, round(rate * train.seconds) if rate else None
    try:
        done = f"{datetime.now() + timedelta(seconds=seconds):%Y-%m-%d %H:%M}" if seconds else None
    except OverflowError:
        done = "in more than 8,000 years"
    return {"tokens": tokens, "tokens_per_s": rate, "seconds": seconds, "done": done}


def _switches(config: Config, hardware: Hardware) -> dict[str, tuple[int, float]]:
    """Bytes that each other choice would save at the peak (below zero: cost), and the arithmetic that it adds."""
    changes = budget.savings(config, hardware)
    plain = hardware.takes(config, update=False)
    for rows in (config.train.rows * 2, config.train.rows // 2):
        if rows and config.train.rows_per_step % rows == 0:
            other = budget.with_micro_batch(config, rows)
            switch = f"--train.micro_batch {rows} --train.accumulation {other.train.accumulation}"
            changes[switch] = (plain.peak - hardware.takes(other, update=False).peak, 0.0)
    return changes


def with_measurement(config: Config, report: Report, measured: Mapping[str, Any]) -> Report:
    """The report with the measurement of real steps beside it; their speed replaces the assumed one."""
    foreseen = report["total"] - report["process"]
    beside = {**measured, "foreseen_peak": foreseen, "peak_error": foreseen / measured["peak"] - 1}
    rate = _time(config, measured["tokens_per_s"]) | {"rate_from": "three real steps"}
    return {**report, **rate, "measured": beside}


def show(report: Report, console: Console) -> None:
    """Print a report as a table."""
    for name, value, note in _lines(report):
        console.print(f"{name:<14} {value:>22}  {note}", markup=False, soft_wrap=True)
    console.print("\nwhat another switch would change at the peak:", markup=False)
    for switch, change in report["switches"].items():
        console.print(f"  {switch:<48} {_change(change)}", markup=False, soft_wrap=True)


def _lines(report: Report) -> list[tuple[str, str, str]]:
    def gb(size: float) -> str:
        return f"{size / 1e9:,.2f} GB"

    peak = report["at_peak"]
    lines = [
        ("parameters", f"{report['parameters']:,}", f"{report['active_parameters']:,} at work on each token"),
        *((part, gb(size), "") for part, size in peak.items()),
        ("process", gb(report["process"]), "before the model is there"),
        ("at the peak", gb(report["total"]), f"of {gb(report['memory'])} that may be filled"),
        (
            "micro-batch",
            f"{report['micro_batch']} rows",
            f"accumulated {report['accumulation']} times, as --train.micro_batch auto does",
        ),
        ("a step", f"{report['tokens_per_step']:,} tokens", ""),
        ("checkpointing", report["checkpointing"], ""),
        ("precision", report["precision"], ""),
        (
            "arithmetic",
            f"{report['flops_per_token'] / 1e9:.3f} GFLOP a token",
            f"{report['flops_per_token_causal'] / 1e9:.3f} if attention counts only what it sees",
        ),
    ]
    if report["tokens_per_s"]:
        lines += [
            ("speed", f"{report['tokens_per_s']:,.0f} tokens/s", report["rate_from"]),
            ("time", duration(report["seconds"]), f"for {report['tokens']:,} tokens; done {report['done']}"),
        ]
    if report["tokens"]:
        ratio = report["tokens"] / report["active_parameters"]
        advice = "take a mixture" if ratio >= PAYS else "dense layers do as well"
        note = f"at work: {advice}; small ones with tied_experts, on a CPU, were mostly ahead from about {PAYS:.0f} on"
        lines.append(("tokens", f"{ratio:,.1f} a parameter", note))
    if "measured" in report:
        lines += _measured_lines(report)
    return lines


def _change(change: dict[str, float]) -> str:
    verb = "saves" if change["saves_mb"] >= 0 else "costs"
    extra = f", {change['adds_arithmetic']:+.0%} arithmetic" if abs(change["adds_arithmetic"]) > 0.005 else ""
    return f"{verb} {abs(change['saves_mb']):,.0f} MB{extra}"


def _measured_lines(report: Report) -> list[tuple[str, str, str]]:
    measured = report["measured"]
    exact = [
        (f"{part}, real", f"{measured[part] / 1e9:,.3f} GB", f"foreseen {report[part] / 1e9:,.3f}")
        for part in ("weights", "gradients", "optimizer")
    ]
    peak = f"foreseen {measured['foreseen_peak'] / 1e9:,.3f} ({measured['peak_error']:+.1%})"
    return [*exact, ("peak, real", f"{measured['peak'] / 1e9:,.3f} GB", peak)]
