"""Show what suite.py and harness.py measured: a table, a picture, a JSON file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from khanhllm.draw import visible
from khanhllm.errors import UserError
from khanhllm.files import check_writable, publish
from khanhllm.lab import core, ending, sets, suite
from khanhllm.runs.run import Run
from khanhllm.units import counted

FILE = "evaluation.json"
LEGEND = "accuracies in %, ± one standard error; in parentheses: within two of chance"
HINT = "name the folder where they lie (--files DIR), or fetch those that can be verified (--download)"


def show(
    opened: Run,
    files: Path,
    fetch: bool,
    most: int,
    source: str | None,
    with_core: bool,
    as_json: bool,
    out: Path | None,
) -> None:
    """Evaluate a run by the suite, write the JSON file and the picture, and print the table. Raises UserError."""
    if with_core:
        core.check(opened)
    path = writable(opened, FILE, out)
    if fetch:
        sets.download(suite.wanted(with_core), files)
    with Console(stderr=True).status("measuring") as status:
        found = suite.examine(opened, files, most, source, with_core, status.update)
    name = opened.checkpoint.parents[1].resolve().name
    drawn = write(path, found, name)
    parts = [table(found["measures"], f"{name} after {found['step']:,} steps")]
    ending.show(found, parts, [LEGEND, *told(found), f"written: {path}, {drawn}"], as_json)


def writable(opened: Run, name: str, out: Path | None) -> Path:
    """Where the JSON file goes. Raises UserError now if it cannot be written."""
    path = out or opened.checkpoint.parents[1] / name
    if path.suffix.lower() == ".png":
        raise UserError(f"--out {path}: name the JSON file; the picture lies beside it, with the ending .png")
    check_writable(path)
    return path


def write(path: Path, found: dict[str, Any], name: str) -> str:
    """Write the JSON file, and the picture beside it; the name of the picture, or why there is none."""
    picture = path.with_suffix(".png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        publish(path, json.dumps(found, indent=1))
        return ending.drawn(picture, lambda: draw(found, picture, name))
    except OSError as error:
        raise UserError(f"cannot write {error.filename or path}: {error.strerror}") from None


def told(found: dict[str, Any]) -> Iterator[str]:
    """What the table does not say, in lines."""
    if found["core"]:
        yield from _core(found["core"])
    if found["missing"]:
        blimp = set(sets.blimp())
        other = [name for name in found["missing"] if name not in blimp]
        gone = len(found["missing"]) - len(other)
        names = ([f"BLiMP ({counted(gone, 'file')})"] if gone else []) + other
        yield f"not there: {', '.join(names)}; {HINT}"
    yield from found["notes"]


def _core(found: dict[str, Any]) -> Iterator[str]:
    tasks, value = found["tasks"], found["value"]
    if value is None:
        yield "CORE: none of its files are there"
        return
    for name, task in tasks.items():
        centred = (task["value"] - task["chance"]) / (1 - task["chance"])
        cut = f", {task['cut']:,} cut" if task["cut"] else ""
        yield f"  {name:32} {100 * task['value']:5.1f} %  centred {centred:+.3f}  ({task['items']:,} items{cut})"
    yield f"CORE {value:.4f} ±{found['error']:.4f} over {len(tasks)} of {found['of']} tasks"


def table(measures: dict[str, dict[str, Any]], title: str) -> Table:
    """A line for each measure."""
    shown = Table(box=None, pad_edge=False, header_style="dim")
    shown.title, shown.title_justify, shown.title_style = Text(visible(title)), "left", "bold"
    shown.add_column("measure", no_wrap=True)
    for header in ("score", "per byte", "chance", "items", "cut"):
        shown.add_column(header, justify="right", no_wrap=True)
    for measure in measures.values():
        unit = "" if measure["unit"] == "accuracy" else f", {measure['unit']}"
        shown.add_row(*map(Text, _row(measure["title"] + unit, measure, measure)))
        for name, own in measure.get("fields", {}).items():
            shown.add_row(*map(Text, _row(f"  {name}", own, {**measure, "cut": None, "by_bytes": None})))
    return shown


def _row(title: str, own: dict[str, Any], measure: dict[str, Any]) -> list[str]:
    chance, percent, bytewise = measure["chance"], measure["unit"] == "accuracy", measure.get("by_bytes")
    return [
        visible(title),
        _number(own, chance, percent),
        _number(bytewise, chance, percent) if bytewise else "",
        "–" if chance is None else f"{100 * chance:.0f}" if percent else f"{chance:g}",
        f"{own['items']:,}",
        f"{measure['cut']:,}" if measure["cut"] is not None else "",
    ]


def _number(own: dict[str, Any], chance: float | None, percent: bool) -> str:
    value, error = own["value"], own["error"]
    text = f"{100 * value:.1f}" if percent else f"{value:.3f}"
    if error is not None:
        text += f" ±{100 * error:.1f}" if percent else f" ±{error:.3f}"
    if chance is None or error is None:
        return text if chance is None else f"({text})"
    if percent:  # of all right, or all wrong, its own error would be 0
        error = max(error, (chance * (1 - chance) / own["items"]) ** 0.5)
    return text if abs(value - chance) > 2 * error else f"({text})"


def draw(found: dict[str, Any], png: Path, name: str) -> None:
    """Each accuracy with two standard errors and its chance, as an image."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    rows: list[tuple[str, dict[str, Any], float | None, dict[str, Any] | None]] = []
    for measure in found["measures"].values():
        if measure["unit"] == "accuracy":
            rows.append((measure["title"], measure, measure["chance"], measure.get("by_bytes")))
            rows += [
                (f"{measure['title']} {field}", own, measure["chance"], None)
                for field, own in measure.get("fields", {}).items()
            ]
    figure = Figure(figsize=(9, 1.4 + 0.34 * max(2, len(rows))), dpi=130, layout="constrained")
    title = f"{visible(name)[-60:]} after {found['step']:,} steps"
    if "text" in found["measures"]:
        title += f": {found['measures']['text']['value']:.3f} bits per byte"
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", parse_math=False)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    for y, (_, own, chance, bytewise) in enumerate(rows):
        if chance is not None:
            axes.plot([100 * chance] * 2, [y - 0.35, y + 0.35], color="#d9622b", linewidth=2, label="chance")
        _dot(axes, own, y, "o", "the likeliest choice")
        if bytewise:
            _dot(axes, bytewise, y + 0.2, "D", "the likeliest per byte")
    axes.set_yticks(range(len(rows)), [title for title, *_ in rows], parse_math=False)
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(-2, 102), xlabel="right answers (%), ± 2 standard errors")
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    handles, labels = axes.get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))
    figure.legend(known.values(), known.keys(), frameon=False, fontsize=9, ncols=3, loc="outside lower center")
    figure.savefig(png)


def _dot(axes: Any, own: dict[str, Any], y: float, marker: str, label: str) -> None:
    face = "#3b6fb5" if marker == "o" else "white"
    x, spread = 100 * own["value"], 200 * (own["error"] or 0)
    axes.errorbar(x, y, xerr=spread, fmt=marker, ms=5, capsize=2, color="#3b6fb5", mfc=face, label=label)
