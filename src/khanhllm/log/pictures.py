"""Draw the training log as curves: as braille dots for a terminal, and as a PNG."""

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from khanhllm.draw import Floats, braille, visible
from khanhllm.errors import UserError
from khanhllm.files import check_writable
from khanhllm.units import short

CURVES = ("tokens", "loss", "val_ce", "val_bpb")
"""columns that the pictures show"""


def read_log(csv_file: Path, names: Sequence[str] | None = CURVES) -> dict[str, Floats]:
    """Columns of a training log (None: all), for the rows that are whole; nan where nothing was measured."""
    rows: list[dict[str, str]] = []
    header: Sequence[str] = ()
    if csv_file.exists():
        with csv_file.open(newline="", encoding="utf-8", errors="replace") as file:
            whole = (line for line in file if line.endswith("\n"))  # the last one may be half written
            reader = csv.DictReader(whole, restval="")
            rows = [row for row in reader if math.isfinite(_number(row.get("tokens")))]
            header = reader.fieldnames or ()
    columns = header if names is None else names
    return {name: np.array([_number(row.get(name)) for row in rows], dtype=np.float64) for name in columns}


def with_loss(log: dict[str, Floats]) -> dict[str, Floats]:
    """The rows that a curve can show: a step has no loss if that was no number, or if no target of it counted."""
    known = np.isfinite(log["loss"])
    return {name: column[known] for name, column in log.items()}


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def smooth(values: Floats) -> Floats:
    """Replace each point by the mean of the fiftieth of the curve around it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at, reach = np.arange(len(values)), len(values) // 100
    first, last = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    means: Floats = (sums[last] - sums[first]) / (last - first)
    return means


def frame(values: Sequence[float] | Floats) -> tuple[float, float]:
    """Lowest and highest value worth drawing. The first twentieth of a long run does not count: it starts so high that
    all the rest would be drawn as one flat line."""
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    if not len(known):
        return 0.0, 1.0
    low, high = float(known.min()), float(known[len(known) // 20 :].max())
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def check_picture(png: Path) -> None:
    """Raise UserError now if no picture can be written there, by a name that says its kind."""
    if png.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out {png}: the picture is a file that ends in .png, .svg or .pdf")
    check_writable(png)


def loss_curve_text(csv_file: Path, width: int = 76, height: int = 14) -> str:
    """The loss against the tokens seen, as lines of at most `width` characters; dots are validations."""
    log = with_loss(read_log(csv_file))
    tokens, loss, checked = log["tokens"], log["loss"], log["val_ce"]
    if not len(loss):
        return "no loss was logged yet"
    low, high = frame(np.concatenate([loss, checked]))
    across, down = max(8, width - 8), max(3, height - 3)
    lines = braille(smooth(loss), across, down, low, high)
    for x, y in _places(tokens, checked, across, down, low, high):
        lines[y] = lines[y][:x] + "●" + lines[y][x + 1 :]
    labels = {0: high, down // 2: high - (high - low) * (down // 2) / (down - 1), down - 1: low}
    title = f"loss in nats per token, from {loss[0]:.2f}" + ("; ● validation" if np.isfinite(checked).any() else "")
    ends = short(tokens[0]), f"{short(tokens[-1])} tokens"
    return "\n".join(
        [
            title[:width],
            *(f"{labels[y]:6.2f} ┤{line}" if y in labels else f"{'':6} │{line}" for y, line in enumerate(lines)),
            f"{'':6} └" + "─" * across,
            f"{'':8}{ends[0]}{ends[1]:>{max(0, across - len(ends[0]))}}",
        ]
    )


def _places(
    tokens: Floats, checked: Floats, across: int, down: int, low: float, high: float
) -> Iterator[tuple[int, int]]:
    """Column and line of each validation."""
    for x, value in zip((tokens - tokens[0]) / max(1.0, tokens[-1] - tokens[0]), checked, strict=True):
        if math.isfinite(value):
            height = (high - value) / (high - low)
            yield round(x * (across - 1)), min(down - 1, max(0, round(height * (down - 1))))


def loss_curve_png(csv_file: Path, png: Path, title: str) -> None:
    """Draw the same curve as an image: each step thin, their mean bold, validations as points.

    The right axis converts the left one to bits per byte of the validation text."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state
    from matplotlib.ticker import FuncFormatter

    log = with_loss(read_log(csv_file))
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    title = visible(title if len(title) <= 40 else "…" + title[-39:])
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=12, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set(xlabel="tokens seen in training", ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: short(tokens)))
    if len(log["loss"]):
        axes.set_title("; ".join(_draw_curves(axes, log)), loc="right", fontsize=9, color="#666666", pad=12)
        axes.legend(frameon=False, loc="upper right")
    else:
        axes.text(0.5, 0.5, "no loss was logged yet", transform=axes.transAxes, ha="center", color="#666666")
    figure.savefig(png)


def _draw_curves(axes: Any, log: dict[str, Floats]) -> Iterator[str]:
    """Draw the curves and yield the numbers for the title."""
    tokens, loss, checked, bits = log.values()
    low, high = frame(np.concatenate([loss, checked]))
    room = 0.06 * (high - low)
    axes.set(xlim=(0, 1.02 * max(1.0, tokens[-1])), ylim=(low - room, high + room))
    axes.plot(tokens, loss, color="#3b6fb5", linewidth=0.7, alpha=0.35)
    axes.plot(tokens, smooth(loss), "o-"[len(loss) > 1 :], color="#3b6fb5", linewidth=2, label="training")
    yield f"loss at the first step {loss[0]:.2f}"
    known = np.isfinite(checked)
    if known.any():
        axes.plot(tokens[known], checked[known], "o-", color="#d9622b", linewidth=1.2, markersize=5, label="validation")
        yield f"validation at the end {checked[known][-1]:.3f}"
    measured = known & (checked > 0) & (bits > 0)
    if measured.any():
        ratio = float(bits[measured][-1] / checked[measured][-1])
        right = axes.secondary_yaxis("right", functions=(lambda nats: nats * ratio, lambda bpb: bpb / ratio))
        right.set_ylabel("validation, bits per byte")
        right.spines["right"].set_visible(False)
        yield f"{bits[measured][-1]:.3f} bits per byte"
