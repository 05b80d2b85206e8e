"""What a run looks like in a terminal: a live panel for a person, plain lines for a file or a pipe."""

import os
import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import inf, nan
from statistics import fmean
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from khanhllm.draw import bars, braille, on_terminal, visible
from khanhllm.errors import drain
from khanhllm.log.pictures import frame
from khanhllm.units import duration, short

Row = dict[str, Any]
REDRAW = 0.25
"""least time between two drawings of the panel (seconds)"""


@dataclass
class RunView:
    """What the terminal shows of a run."""

    name: str
    parameters: int
    moe_layers: list[int]
    steps: int
    step: int
    row: Row = field(default_factory=dict)
    """the newest"""
    losses: "array[float]" = field(default_factory=lambda: array("d"))
    checked: Row = field(default_factory=dict)
    """the newest with a validation"""
    best_ce: float = inf
    clock: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=100))
    """(step, seconds) of recent steps; each is the end of a step, so the slow first one is never in between"""

    def add(self, row: Row) -> None:
        """Take the row of the next step."""
        self.row, self.step = row, int(row["step"])
        self.losses.append(row.get("loss", nan))
        if "seconds" in row:
            self.clock.append((self.step, row["seconds"]))
        if row.get("val_ce") is not None:
            self.checked = row
            self.best_ce = min(self.best_ce, row["val_ce"])

    def cut(self, step: int, rows: list[Row]) -> "RunView":
        """The view of the run up to `step`, from its rows."""
        story = RunView(self.name, self.parameters, self.moe_layers, self.steps, step)
        for row in rows:
            story.add(row)
        story.clock.clear()  # only this process's own time predicts how long the rest takes
        return story

    @property
    def eta(self) -> str:
        """The time that the rest of the run takes, in words; empty if it is unknown or there is no rest."""
        if len(self.clock) < 2 or self.step == self.steps:
            return ""
        (early, then), (late, now) = self.clock[0], self.clock[-1]
        return f"ETA {duration((now - then) / (late - early) * (self.steps - late))}"


class _Console(Console):
    """A console that lets training continue after the reader of its output, such as `head`, has gone."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        drain()


class Terminal:
    """A live panel for a person, plain lines for a file or a pipe."""

    def __init__(self, story: RunView, every: int, console: Console | None) -> None:
        self.console = console or _Console(force_terminal=on_terminal())
        self.story, self.every = story, every
        person = self.console.is_interactive and not self.console.is_jupyter and "utf" in self.console.encoding
        self.live = Live(console=self.console, auto_refresh=False) if person else None
        self.drawn = -inf
        self.shown = story.step

    def open(self) -> None:
        """Show the panel, if there is one."""
        if self.live:
            with self._silent_if_gone():
                self.live.start()
                self._draw()

    def show(self, row: Row) -> None:
        """Take the row of a step, and draw the panel or print a line when it is due."""
        self.story.add(row)
        if self.live:
            if time.monotonic() - self.drawn >= REDRAW:
                with self._silent_if_gone():
                    self._draw()
        elif self.story.step % self.every == 0 or row.get("val_ce") is not None or self.story.step == self.story.steps:
            self._print_line()

    def say(self, text: str) -> None:
        """Print a message, with its control characters escaped. No line of it is broken, so that paths and commands can
        be copied: the terminal wraps it, also above the panel."""
        shown = Text(visible(text, self.console.encoding), no_wrap=True, overflow="ignore")
        with suppress(OSError):  # the output may go to a file on a full disk: training continues
            self.console.print(Group(shown), crop=False)  # print() makes a bare Text anew, which would wrap

    def close(self) -> None:
        """Show the last step and release the terminal."""
        if not self.live:
            if self.shown != self.story.step:
                self._print_line()
            return
        with self._silent_if_gone():
            try:
                self._draw()
            finally:
                self.live.stop()

    @contextmanager
    def _silent_if_gone(self) -> Iterator[None]:
        """Print nothing more once the terminal of the panel has gone, as when its window is closed: the training
        continues."""
        try:
            yield
        except OSError:
            live, self.live, self.console.quiet = self.live, None, True
            with suppress(OSError, IndexError):  # the latter where it never came to start
                live.stop()  # type: ignore[union-attr]
            with suppress(OSError, ValueError):  # what is still buffered would fail again at exit, and change its code
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.console.file.fileno())
                os.close(nowhere)

    def _print_line(self) -> None:
        self.shown = self.story.step
        self.say("  ".join(_line(self.story)))

    def _draw(self) -> None:
        assert self.live is not None
        self.live.update(panel(self.story, *self.console.size), refresh=True)
        self.drawn = time.monotonic()


def _line(story: RunView) -> Iterator[str]:
    row = story.row
    yield f"step {story.step}/{story.steps}"
    yield f"loss {_text(row, 'loss', '.4f')}"
    if row.get("val_ce") is not None:
        base = f"; base {_text(row, 'base_bpb', '.3f')}" if row.get("base_bpb") is not None else ""
        yield f"val {row['val_ce']:.4f} ({_text(row, 'val_bpb', '.3f')} bits/byte{base})"
    yield f"lr {_text(row, 'lr', '.1e')}"
    yield f"grad {_text(row, 'grad_norm', '.2f')}"
    if "balance" in row:
        yield f"balance {row['balance']:.2f}"
    yield from _machine(row, "tok/s", "mfu")
    if story.eta:
        yield story.eta


def _machine(row: Row, rate: str, mfu: str) -> Iterator[str]:
    yield f"{_text(row, 'tokens_per_s', ',.0f')} {rate}"
    if row.get("mfu") is not None:
        yield f"{mfu} {100 * row['mfu']:.{0 if row['mfu'] >= 0.1 else 1}f} %"
    if row.get("waiting", 0) >= 0.01:
        yield f"waits for data {100 * row['waiting']:.0f} %"
    yield f"{_text(row, 'memory_mb', ',.0f')} MB"


def _text(row: Row, name: str, spec: str) -> str:
    return "–" if row.get(name) is None else format(row[name], spec)


def panel(story: RunView, width: int, height: int) -> Panel:
    """The panel of the whole run, at most `height` - 2 lines, so that a message above it stays visible."""
    inner = min(width, 110) - 4
    numbers = list(_numbers(story))
    experts = _experts(story, inner, height - len(numbers) - 12)
    room = height - len(numbers) - len(experts) - 7
    curve = _curve(story, inner, min(6, room)) if room >= 2 else []
    name = visible(story.name) + (f" · {short(story.parameters)} parameters" if story.parameters else "")
    blocks: list[Sequence[RenderableType]] = [[_progress(story)], curve, numbers, experts]
    lines = [line for block in blocks if block for line in ["", *block]][1:]
    return Panel(Group(*lines), title=Text(name, "bold"), title_align="left", border_style="blue", width=inner + 4)


def _progress(story: RunView) -> RenderableType:
    line = Table.grid(padding=(0, 2), expand=True)
    for ratio in (None, 1, None):
        line.add_column(ratio=ratio, no_wrap=True)
    done = f"{100 * story.step / story.steps:.0f} %  {story.eta}"
    bar = ProgressBar(total=story.steps, completed=story.step, complete_style="blue", finished_style="green")
    line.add_row(f"step {story.step:,} / {story.steps:,}", bar, done)
    return line


def _curve(story: RunView, width: int, height: int) -> list[Text]:
    """The loss of all steps so far."""
    low, high = frame(story.losses)
    lines = braille(story.losses, width - 8, height, low, high) if story.losses else [""] * height
    ends = {0: f"{high:.2f}", height - 1: f"{low:.2f}"} if story.losses else {}
    return [Text.assemble((f"{ends.get(y, ''):>6}  ", "dim"), (line, "cyan")) for y, line in enumerate(lines)]


def _numbers(story: RunView) -> Iterator[Text]:
    row, checked = story.row, story.checked
    recent = f"{fmean(story.losses[-20:]):.4f}" if story.losses else "–"
    yield _fact("loss", recent, f"last {_text(row, 'loss', '.4f')}")
    more = f"{_text(checked, 'val_bpb', '.3f')} bits per byte   best {story.best_ce:.4f}" if checked else ""
    yield _fact("validation", _text(checked, "val_ce", ".4f"), more)
    yield _fact("learning", f"rate {_text(row, 'lr', '.1e')}", f"gradient {_text(row, 'grad_norm', '.2f')}")
    speed, *rest = _machine(row, "tokens/s", "MFU")
    yield _fact("speed", speed, "   ".join(rest))


def _fact(label: str, value: str, more: str) -> Text:
    return Text.assemble((f"{label:<12}", "dim"), (value, "bold"), f"   {more}", no_wrap=True, overflow="ellipsis")


def _experts(story: RunView, width: int, room: int) -> list[Text]:
    """The experts of each mixture layer: two layers a line if there are many, only the least even ones if too many."""
    row = story.row
    if "load_per_layer" not in row:
        return []
    layers = list(zip(story.moe_layers, row["load_per_layer"], row["balance_per_layer"], strict=True))
    side = 2 if len(layers) > 4 and width >= 70 else 1
    worst = sorted(layers, key=lambda layer: -layer[2])[: max(1, room) * side]
    cells = [
        Text.assemble((f"layer {layer:<4}", "dim"), bars(shares, width // side - 20), f"  {balance:.2f}")
        for layer, shares, balance in sorted(worst)
    ]
    left_out = f", the {len(cells)} least even of {len(layers)} layers" if len(cells) < len(layers) else ""
    head = Text(f"tokens per expert and balance (1.00 is even){left_out}", "dim", no_wrap=True, overflow="ellipsis")
    lines = [Text("      ").join(cells[start : start + side]) for start in range(0, len(cells), side)]
    return [head, *lines]
