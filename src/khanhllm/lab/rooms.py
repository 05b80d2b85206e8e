"""Show what experts.py found: a table for each mixture layer, and a picture."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from khanhllm.draw import visible
from khanhllm.errors import UserError
from khanhllm.files import check_writable
from khanhllm.lab import ending, experts
from khanhllm.lab.closing import Cost
from khanhllm.lab.sample import take
from khanhllm.log.pictures import check_picture
from khanhllm.runs.run import FINDINGS, Run, Step, open_run
from khanhllm.schema import MachineConfig
from khanhllm.settings import read_config

MEASURES = {
    "token": ("this token tells", "OpenMoE, arXiv 2402.01739"),
    "previous": ("token before tells", "OpenMoE"),
    "next": ("token after tells", "OpenMoE"),
    "kind": ("kind of token tells", "OLMoE, arXiv 2409.02060"),
    "part": ("part of text tells", "OLMoE"),
    "position": ("position tells", "OpenMoE"),
    "below": ("mixture below tells", "adjusted information, Vinh 2010"),
    "faithful": ("a token's favourite", "OLMoE"),
    "together": ("pair", "OLMoE"),
    "repetition": ("same expert again", "Mixtral, arXiv 2401.04088"),
    "opinion": ("router's entropy", "Shannon 1948"),
}
"""each measure in a few words, and where it comes from; docs/experts.md explains them"""
WIDE, NARROW = 100, 60
"""terminals (characters)"""
GAP = 2
"""between columns (characters)"""


def open_mixture(run: Path, machine: MachineConfig, step: Step, ablate: str) -> Run:
    """Open a run. Raises UserError for a dense one, and for experts that it does not have, before anything is read."""
    shape = read_config(run).model
    experts.wanted(ablate, shape.moe_layers, shape.experts)
    opened = open_run(run, machine, step)
    opened.machine.take_process()
    return opened


def show(
    opened: Run,
    source: str | None,
    tokens: int,
    part: str | None,
    ablate: str,
    earlier: bool,
    as_json: bool,
    out: Path | None,
) -> None:
    """Examine a run, write experts.json and the picture into it, and print the table. Raises UserError."""
    run = opened.checkpoint.parents[1]
    picture = out or run / "experts.png"
    check_picture(picture)
    check_writable(run / FINDINGS)
    found = experts.examine(opened, take(opened, source, tokens, part), ablate, earlier, Console(stderr=True))
    written, name = experts.write(found, run), run.resolve().name
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        drawn = ending.drawn(picture, lambda: draw(found, picture, name))
    except OSError as error:
        raise UserError(f"cannot write {picture}: {error.strerror}") from None
    ending.show(found, told(found, name, Console().width), [f"written: {written}, {drawn}"], as_json)


def told(found: dict[str, Any], name: str, width: int) -> Iterator[Text | Table]:
    """All that is printed, for a terminal of so many characters."""
    again = f", {found['tokens_ablated']:,} of them read again without an expert" if _closed(found) else ""
    yield Text(
        visible(
            f"{name} after {found['step']:,} steps, {found['bits_per_byte']:.3f} bits per byte on {found['tokens']:,} "
            f"tokens of {found['data']}{again}.\n"
        )
    )
    for layer in found["layers"]:
        yield Text(f"Layer {layer['layer']}", "bold")
        if "off" in layer:
            yield Text(verdict(layer))
        yield _rooms(layer, width)
        yield _measured(layer, width)
    if _closed(found):
        yield Text(
            "Costs are in % of the bits, ± one standard error; those in parentheses cannot be told from nothing."
        )


def _closed(found: dict[str, Any]) -> bool:
    return "off" in found["layers"][0]


def verdict(layer: dict[str, Any]) -> str:
    """What the whole mixture is worth, and where that lies, in words."""
    off, dice = Cost(**layer["off"]), Cost(**layer["random"])
    first = f"; the first expert alone costs {_percent(Cost(**layer['first']))}" if "first" in layer else ""
    numbers = f"switched off, it costs {_percent(off)}; random experts cost {_percent(dice)}{first}"
    if not off.told_apart or off.share < experts.WORTHLESS:
        return f"Worth next to nothing: {numbers}."
    if dice.share > 0.8 * off.share:
        return f"Its worth is the routing: {numbers}."
    return f"Its worth is partly the routing: {numbers}."


def _percent(cost: Cost, unit: str = " %") -> str:
    number = f"{100 * cost.share:+.2f} ±{100 * cost.error:.2f}{unit}"
    return number if cost.told_apart else f"({number})"


def _rooms(layer: dict[str, Any], width: int) -> Table:
    """A line for each expert."""
    headers = ["", "share", "closed", *["removed"] * (width >= NARROW)]
    rows = [[str(one["expert"]), _share(one, layer, width)] for one in layer["experts"]]
    for row, one in zip(rows, layer["experts"], strict=True):
        row += [_percent(Cost(**one[key]), "") if key in one else "–" for key in headers[2:]]
    taken = sum(max(map(len, column)) + GAP for column in zip(headers, *rows, strict=True))
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, GAP, 0, 0))
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("gets more than its share of"[: width - taken - GAP], no_wrap=True)
    for row, one in zip(rows, layer["experts"], strict=True):
        kinds = [f"{name} {lift:.1f}x" for name, lift in one["parts"] + one["kinds"]]
        liked = Text(visible(" · ".join(filter(None, [" ".join(one["likes"]), *kinds]))))
        liked.truncate(width - taken - GAP, overflow="ellipsis")
        table.add_row(*map(Text, row), liked)
    return table


def _share(one: dict[str, Any], layer: dict[str, Any], width: int) -> str:
    """The share of an expert, with a bar where there is room."""
    most = max(other["share"] for other in layer["experts"])
    bar = f"{'█' * round(8 * one['share'] / most):<8} " if width >= WIDE else ""
    return f"{bar}{100 * one['share']:.1f} %"


def _measured(layer: dict[str, Any], width: int) -> Table:
    """A line for each measure: its value and what chance would give."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, GAP, 0, 0))
    table.add_column("the choice of expert", no_wrap=True, overflow="ellipsis", min_width=20)
    table.add_column("is", justify="right", no_wrap=True)
    table.add_column("by chance", justify="right", no_wrap=True)
    wide = width >= WIDE
    if wide:
        table.add_column("after")
    for name, (words, origin) in MEASURES.items():
        if name in layer["measures"]:
            _add(table, words + _pair(name, layer), layer["measures"][name], origin if wide else "")
    for step, measure in layer.get("saturation", {}).items():
        _add(table, f"as at step {int(step):,}", measure, "OLMoE" if wide else "")
    table.add_row("")
    return table


def _pair(name: str, layer: dict[str, Any]) -> str:
    """Which experts the strongest pair is."""
    if name != "together":
        return ""
    table = layer["together"]
    first = max(range(len(table)), key=lambda e: max(table[e]))
    return f" {first} with {table[first].index(max(table[first]))}"


def _add(table: Table, words: str, measure: dict[str, float], origin: str) -> None:
    spread = f" ±{100 * measure['spread']:.1f}" if measure["spread"] >= 0.0005 else ""
    cells = [words, f"{round(100 * measure['value'])} %", f"{round(100 * measure['chance'])}{spread} %"]
    table.add_row(*cells, *([origin] if origin else []))


def draw(found: dict[str, Any], png: Path, name: str) -> None:
    """Shares, costs and what is known of each layer's choice, as an image."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state
    from matplotlib.ticker import MaxNLocator

    layers = found["layers"]
    figure = Figure(figsize=(11, 0.6 + 2.7 * len(layers)), dpi=130, layout="constrained")
    title = f"{visible(name)[-60:]} after {found['step']:,} steps: {found['bits_per_byte']:.3f} bits per byte"
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", parse_math=False)
    grid = figure.subplots(len(layers), 3, squeeze=False, width_ratios=(1, 1.25, 1.25))
    for (shares, costs, known), layer in zip(grid, layers, strict=True):
        for axes in (shares, costs, known):
            axes.spines[["top", "right"]].set_visible(False)
        for axes in (shares, costs):
            axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        _draw_shares(shares, layer)
        _draw_costs(costs, layer)
        _draw_known(known, layer)
    if _closed(found):
        handles = grid[0][1].get_legend_handles_labels()
        figure.legend(*handles, frameon=False, fontsize=9, ncols=4, loc="outside lower center")
    figure.savefig(png)


def _draw_shares(axes: Any, layer: dict[str, Any]) -> None:
    shares = [100 * one["share"] for one in layer["experts"]]
    axes.bar(range(len(shares)), shares, color="#3b6fb5", width=0.7)
    axes.axhline(100 / len(shares), color="#d9622b", linewidth=1.2, linestyle="--", label="even")
    axes.set_title(f"layer {layer['layer']}: share of the tokens (%)", loc="left", fontsize=10)
    axes.set(xlabel="expert", ylim=(0, 1.3 * max(shares)))
    axes.legend(frameon=False, loc="upper right", fontsize=8)


def _draw_costs(axes: Any, layer: dict[str, Any]) -> None:
    """Each expert closed and taken away; the whole mixture as lines across."""
    axes.set_title("cost in bits (%), ± 2 standard errors", loc="left", fontsize=10)
    axes.set(xlabel="expert")
    axes.axhline(0, color="#999999", linewidth=0.8)
    kinds = (("closed", "closed: next best", "#3b6fb5", -0.12), ("removed", "answer removed", "#3f9b5b", 0.12))
    for key, label, colour, shift in kinds:
        with_it = [one for one in layer["experts"] if key in one]
        if with_it:
            places = [one["expert"] + shift for one in with_it]
            values = [100 * one[key]["share"] for one in with_it]
            errors = [200 * one[key]["error"] for one in with_it]
            axes.errorbar(places, values, errors, fmt="o", markersize=4, capsize=2, color=colour, label=label)
    for key, label, style in (("off", "mixture off", "-"), ("random", "random experts", ":")):
        if key in layer:
            axes.axhline(100 * layer[key]["share"], color="#d9622b", linewidth=1.4, linestyle=style, label=label)
    if "off" not in layer:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#666666")


def _draw_known(axes: Any, layer: dict[str, Any]) -> None:
    names = [name for name in MEASURES if MEASURES[name][0].endswith("tells") and name in layer["measures"]][::-1]
    measures = [layer["measures"][name] for name in names]
    labels = [MEASURES[name][0].removesuffix(" tells") for name in names]
    values = [100 * measure["value"] for measure in measures]
    axes.barh(labels, values, xerr=[200 * m["spread"] for m in measures], color="#8a5bb5", height=0.65)
    axes.set(xlim=(min(0, *values) - 1, 100))
    axes.set_title("of the choice of expert, known from … (%)", loc="left", fontsize=10)
