"""Compare runs: one picture of their losses against steps, tokens, arithmetic and time, and a table."""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from khanhllm.draw import Floats, on_terminal, visible
from khanhllm.errors import UserError
from khanhllm.files import read as read_file
from khanhllm.log.pictures import check_picture, frame, read_log, smooth, with_loss
from khanhllm.log.run_log import FILE
from khanhllm.model.counts import active_parameters, flops_per_token, on_paper, total_parameters
from khanhllm.schema import Config
from khanhllm.settings import read_config
from khanhllm.units import duration, short

WIDTH = 120
"""of the table where it goes to a file (characters)"""
COLOURS = ("#3b6fb5", "#d9622b", "#3f9b5b", "#8a5bb5", "#b59a3b", "#555555")


@dataclass(frozen=True)
class RunLog:
    """The log of a run and the size of its model."""

    name: str
    config: Config
    step: Floats
    tokens: Floats
    """of this run alone, as its seconds are: without what the run had read that it was made of"""
    loss: Floats
    """nats per token"""
    seconds: Floats
    """since the beginning, over all the times that it was resumed"""
    bits: Floats
    """per byte of the validation text; nan where it was not measured"""
    parameters: int
    active: int
    flops_per_token: int
    bits_of_a_nat: float
    """bits per byte for each nat per token, by the last validation; nan before the first"""
    tokenizer: str
    """sha256 of its file, empty if that is missing"""


def read(run: Path) -> RunLog:
    """Read the log of a run. Raises UserError if the folder holds no run, or one without a step."""
    config = read_config(run)
    log = read_log(run / FILE, ("step", "tokens", "loss", "seconds", "val_bpb", "val_ce"))
    columns = with_loss(log)
    if not len(columns["loss"]):
        raise UserError(f"{run / FILE} has no step yet; train the run further")
    model, vocabulary = on_paper(config.model), run / "tokenizer.json"
    ratios = log["val_bpb"] / log["val_ce"]
    ratios = ratios[np.isfinite(ratios)]
    return RunLog(
        name=visible(run.resolve().name),
        config=config,
        step=columns["step"],
        tokens=columns["tokens"] - _before(columns["step"].tolist(), columns["tokens"].tolist(), config),
        loss=columns["loss"],
        seconds=columns["seconds"],
        bits=log["val_bpb"],
        parameters=total_parameters(model),
        active=active_parameters(model),
        flops_per_token=flops_per_token(model),
        bits_of_a_nat=float(ratios[-1]) if len(ratios) else math.nan,
        tokenizer=hashlib.sha256(read_file(vocabulary)).hexdigest() if vocabulary.is_file() else "",
    )


def _before(steps: list[float], tokens: list[float], config: Config) -> float:
    """Tokens in the log that were read before its first step, as an upcycled run goes on where the dense one ended."""
    a_step = (tokens[1] - tokens[0]) / max(1, steps[1] - steps[0]) if len(steps) > 1 else config.tokens_per_step
    return max(0.0, tokens[0] - steps[0] * a_step)


def show(runs: list[Path], png: Path, console: Console | None = None) -> None:
    """Print the table and write the picture. Raises UserError."""
    console = console or Console(width=None if on_terminal() else WIDTH)
    check_picture(png)
    logs = _named_apart([read(run) for run in runs], runs)
    console.print(_table(logs))
    if warning := _differ(logs):
        console.print(warning, markup=False, highlight=False, soft_wrap=True)
    try:
        draw(logs, png)
    except OSError as error:
        raise UserError(f"cannot write {png}: {error.strerror}") from None
    console.print(f"drawn: {png}", markup=False, highlight=False, soft_wrap=True)


def _named_apart(logs: list[RunLog], runs: list[Path]) -> list[RunLog]:
    """Runs of one name get the path that was typed, and a number if that is the same too."""
    names = [log.name for log in logs]
    names = [visible(str(run)) if names.count(name) > 1 else name for name, run in zip(names, runs, strict=True)]
    again = [names[:nth].count(name) for nth, name in enumerate(names)]
    parts = zip(logs, names, again, strict=True)
    return [replace(log, name=f"{name} ({nth + 1})" if nth else name) for log, name, nth in parts]


def _differ(logs: list[RunLog]) -> str:
    """One line if the losses cannot be compared as they are; empty if they can."""
    if len({log.tokenizer for log in logs}) > 1:
        return "these runs have different tokenizers: compare their bits per byte, not their nats per token"
    if len({log.config.data.source for log in logs}) > 1:
        return "these runs learn from different text, so a lower loss may only mean easier text"
    return ""


def _table(logs: list[RunLog]) -> Table:
    table = Table()
    for heading in ("run", "parameters", "active", "steps", "tokens", "FLOP", "time", "tokens/s", "loss", "bits/byte"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for run in logs:
        bits = run.bits[np.isfinite(run.bits)]
        table.add_row(
            Text(run.name),
            short(run.parameters),
            short(run.active),
            f"{run.step[-1]:,.0f}",
            short(run.tokens[-1]),
            f"{run.tokens[-1] * run.flops_per_token:.2e}",
            duration(run.seconds[-1]),
            f"{run.tokens[-1] / run.seconds[-1]:,.0f}",
            f"{smooth(run.loss)[-1]:.3f}",
            f"{bits[-1]:.4f}" if len(bits) else "–",
        )
    return table


def draw(logs: list[RunLog], png: Path) -> None:
    """Draw the smoothed loss against steps, tokens, arithmetic and time. The legend has the last validation."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(12, 8), dpi=130, layout="constrained")
    per_byte = len({run.tokenizer for run in logs}) > 1 and all(math.isfinite(run.bits_of_a_nat) for run in logs)
    losses = [smooth(run.loss) * (run.bits_of_a_nat if per_byte else 1) for run in logs]
    unit = "bits per byte, by the last validation" if per_byte else "nats per token"
    frames = [frame(loss) for loss in losses]  # one by one: a short run, whose loss is still high, stays in sight
    low, high = min(low for low, _ in frames), max(high for _, high in frames)
    room = 0.05 * (high - low)
    for axes, (label, form, of) in zip(figure.subplots(2, 2).flat, _axes(), strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set(xlabel=label, ylabel=f"training loss ({unit})", ylim=(low - room, high + room))
        axes.xaxis.set_major_formatter(FuncFormatter(form))
        for nth, (run, loss) in enumerate(zip(logs, losses, strict=True)):
            axes.plot(of(run), loss, color=COLOURS[nth % len(COLOURS)], linewidth=1.8, label=str(nth))
        if label == "steps":  # put in afterwards: no label may begin with _, and each would be read as maths
            for text, run in zip(axes.legend(frameon=False, loc="upper right").get_texts(), logs, strict=True):
                text.set(text=_label(run), parse_math=False)
    figure.savefig(png)


def _label(run: RunLog) -> str:
    bits = run.bits[np.isfinite(run.bits)]
    return run.name + (f": {bits[-1]:.3f} bits per byte" if len(bits) else "")


def _axes() -> Iterator[tuple[str, Callable[[float, int], str], Callable[[RunLog], np.ndarray]]]:
    """What the loss is drawn against: its name, how a number of it is written, and those of a run."""
    yield "steps", lambda value, _: short(value), lambda run: run.step
    yield "tokens", lambda value, _: short(value), lambda run: run.tokens
    yield "FLOP", lambda value, _: f"{value:.1e}" if value else "0", lambda run: run.tokens * run.flops_per_token
    yield "time", lambda value, _: duration(value), lambda run: run.seconds
