"""Let the three models of facts.py learn, and show what they hold: a table, a picture, and a file of all figures."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from khanhllm.errors import UserError
from khanhllm.files import check_writable, publish
from khanhllm.lab import ending
from khanhllm.lab.facts import BITS, MARKS, MODELS, RECIPE, Facts, race, summary, vocabulary
from khanhllm.machine.devices import open_machine
from khanhllm.schema import Config, MachineConfig
from khanhllm.settings import resolve
from khanhllm.units import counted, duration, short

VERSION = 1
GAP = 3
"""between columns (characters)"""
COLOURS = {"mixture": "#d9622b", "active": "#3b6fb5", "total": "#7d8b99"}
KNOWN = """\
By the literature a dense model holds about 1 bit per parameter after 100
readings and about 2 after 1,000 (Allen-Zhu and Li 2024, arXiv 2404.05405)."""


def show(number: int, seconds: Any, seeds: int, machine: MachineConfig, as_json: bool, out: Path) -> None:
    """Train the three models with each seed, write facts.json and facts.png, and print the table. Raises UserError."""
    config = _config(number, seconds, machine)
    written, picture = out / "facts.json", out / "facts.png"
    check_writable(written, picture)
    found = learn(config, number, seeds, Console(stderr=True, highlight=False))
    try:
        out.mkdir(parents=True, exist_ok=True)
        publish(written, json.dumps(found, indent=1) + "\n")
        drawn = ending.drawn(picture, lambda: draw(found, picture))
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}; choose another folder with --out") from None
    ending.show(found, told(found), [f"written: {written}, {drawn}"], as_json)


def _config(number: int, seconds: Any, machine: MachineConfig) -> Config:
    size = {"vocab_size": max(vocabulary(number), 264)}  # the least that a model takes
    asked = {"model": size, "train": {"seconds": seconds}, "machine": machine.model_dump()}
    config = resolve(RECIPE, asked, where="lab facts", names={"train.seconds": "--seconds"})
    if not config.train.seconds:
        raise UserError("lab facts: --seconds must be more than 0")
    return config


def learn(config: Config, number: int, seeds: int, console: Console) -> dict[str, Any]:
    """The race of each seed, as it goes to facts.json."""
    # uncompiled: the compiler's time would count as time to learn
    machine, seconds = replace(open_machine(config.machine), compile=False), config.train.seconds
    machine.take_process()
    console.print(
        f"{counted(number, 'made-up fact')}, such as: {Facts.draw(number, 0).in_words(0)}.\n"
        f"That is {short(number * BITS)} bits to know. {len(MODELS)} models take turns, {duration(seconds)} each, with "
        f"{counted(seeds, 'seed')}: {duration(len(MODELS) * seeds * seconds)} and a little.",
        soft_wrap=True,
    )
    rounds = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("learning by heart", total=seeds * MARKS * len(MODELS))
        for seed in range(seeds):
            facts = Facts.draw(number, seed)
            one = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
            runners = race(one, facts, machine, told=lambda: progress.advance(bar))
            rounds.append({name: runner.result(facts) for name, runner in runners.items()})
            held = "; ".join(f"{MODELS[name]}: {short(runner.bits[-1])} bits" for name, runner in runners.items())
            console.print(f"seed {seed}: {held}", soft_wrap=True)
    return {
        "version": VERSION,
        "facts": number,
        "bits": number * BITS,
        "seconds": seconds,
        "seeds": seeds,
        "device": str(machine.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "shape": config.model.model_dump(),
        "models": summary(config, number, rounds),
    }


def verdict(found: dict[str, Any]) -> str:
    """Whether the mixture holds more than the twin that takes as much arithmetic, in words: only what all seeds say."""
    ratio = found["models"]["active"]["mixture_over_it"]
    percent = f"{100 * abs(ratio['median'] - 1):.0f} %"
    after, twin = f"After {duration(found['seconds'])}", "its dense twin of equal arithmetic"
    if ratio["least"] > 1:
        return f"{after}, the mixture holds {percent} more than {twin}"
    if ratio["most"] < 1:
        return f"{after}, the mixture holds {percent} less than {twin}"
    return f"{after}, the mixture does not clearly hold more or less than {twin}"


def told(found: dict[str, Any]) -> Iterator[str | Table]:
    """All that is printed."""
    yield f"\n[bold]{verdict(found)}.[/]"
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    models = [found["models"][name] for name in MODELS]
    for header in ("", *(label.replace(", ", ",\n") for label in MODELS.values())):
        table.add_column(header, justify="right" if header else "left")
    for label, cells in _lines(models):
        table.add_row(label, *cells)
    yield table
    yield f"\nEach model trained for {duration(found['seconds'])}; {_of_seeds(found['seeds'])}.\n{KNOWN}"


def _lines(models: list[dict[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """The lines of the table: what is told, and of each model."""
    yield "parameters", [f"{model['parameters']:,}" for model in models]
    yield "at work on each token", [f"{model['active_parameters']:,}" for model in models]
    yield "readings of each fact", [f"{model['readings']['median']:.0f}" for model in models]
    yield "bits held", [f"{model['bits']['median']:,.0f}" for model in models]
    ranges = [(model["bits"]["least"], model["bits"]["most"]) for model in models]
    if len(models[0]["runs"]) > 1:
        yield "  least and most", [f"{least:,.0f} to {most:,.0f}" for least, most in ranges]
    yield "of all there is", [f"{model['share']['median']:.0%}" for model in models]
    yield "bits per parameter", [f"{model['bits_per_parameter']['median']:.2f}" for model in models]


def draw(found: dict[str, Any], png: Path) -> None:
    """The bits held against seconds of training: a line for each model, a band from its worst seed to its best."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(9, 5.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(verdict(found), loc="left", fontsize=13, fontweight="bold", pad=26)
    subtitle = (
        f"{counted(found['facts'], 'made-up fact')} learned by heart: a name, its birthday, town and trade; "
        f"{_of_seeds(found['seeds'])}"
    )
    axes.annotate(subtitle, (0, 1), (0, 10), "axes fraction", "offset points", fontsize=9.5, color="#555555")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.axhline(found["bits"], color="#222222", linewidth=1.1, linestyle="--")
    axes.annotate("all there is to know", (0, found["bits"]), (2, 4), textcoords="offset points", fontsize=9)
    axes.set(xlabel="seconds of training", ylabel="knowledge held (bits)")
    axes.set(xlim=(0, found["seconds"]), ylim=(0, 1.09 * found["bits"]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda bits, _: short(bits)))
    for name in MODELS:
        _draw_model(axes, name, found["models"][name])
    ends = {name: found["models"][name]["bits"]["median"] / found["bits"] for name in MODELS}
    for name, height in _apart(ends).items():
        _label(axes, name, found["models"][name], found["seconds"], height * found["bits"])
    figure.savefig(png)


def _of_seeds(seeds: int) -> str:
    return "one seed" if seeds == 1 else f"median and range of {seeds} seeds"


def _draw_model(axes: Any, name: str, model: dict[str, Any]) -> None:
    times, bits = ([run[key] for run in model["runs"]] for key in ("seconds", "bits"))
    at = [median(column) for column in zip(*times, strict=True)]
    columns = list(zip(*bits, strict=True))
    least, middle, most = ([of(column) for column in columns] for of in (min, median, max))
    axes.fill_between(at, least, most, color=COLOURS[name], alpha=0.18, linewidth=0)
    axes.plot(at, middle, color=COLOURS[name], linewidth=2.6 if name == "mixture" else 1.9)


def _apart(heights: dict[str, float], least: float = 0.135) -> dict[str, float]:
    """Heights of labels (0 to 1) moved apart, so that none covers another."""
    order = sorted(heights, key=heights.__getitem__)
    placed: dict[str, float] = {}
    floor = 0.03
    for name in order:
        placed[name] = floor = max(heights[name], floor)
        floor += least
    above = math.inf
    for name in reversed(order):
        placed[name] = above = min(placed[name], above, 1.0)
        above -= least
    return placed


def _label(axes: Any, name: str, model: dict[str, Any], seconds: float, height: float) -> None:
    """The name of a line at its end, with what explains it."""
    bits, each = model["bits"]["median"], model["bits_per_parameter"]["median"]
    text = (
        f"{MODELS[name]}\n{short(bits)} bits, {model['share']['median']:.0%} of all\n"
        f"{short(model['parameters'])} parameters, {each:.2f} bits each"
    )
    axes.annotate(
        text, (seconds, height), (8, 0), textcoords="offset points", color=COLOURS[name], fontsize=9, va="center",
        fontweight="bold" if name == "mixture" else "normal", annotation_clip=False,
    )  # fmt: skip
