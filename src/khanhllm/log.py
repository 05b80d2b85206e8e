"""One dict per step goes to three places: a CSV, the terminal, and TensorBoard for those who like it.

A row holds plain numbers and tensors that may still be on their way through a device. Asking a device for a number
waits for all that it was given, so `add` only sends copies towards the host and writes the row *before*, whose copies
have long arrived. The log is one step late and the device never waits for it. `flush` catches up: before a checkpoint,
so that no checkpoint is ahead of its log.

The CSV is the memory of a run: the same text for the same number, one line per step, cut back only when a run returns
to a checkpoint. The terminal shows a panel to a person and plain lines to a file. A new measurement is one key in the
row: TensorBoard takes every number it is given, the CSV those that `columns` names.
"""

import os
import sys
import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from math import inf, nan
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from torch import Tensor

from khanhllm.config import Config, UserError
from khanhllm.draw import bars, braille, duration, frame, short, visible
from khanhllm.files import read

Row = dict[str, Any]

FILE = "training_log.csv"
TIMING = {"tokens_per_s": ".1f", "mfu": ".4f", "waiting": ".4f", "memory_mb": ".1f", "seconds": ".2f"}
REDRAW = 0.25
"""least time between two drawings of the panel (seconds)"""


def columns(moe_layers: list[int]) -> list[str]:
    """What the CSV keeps of each row. The timing columns, which no two runs share, come last."""
    measured = ["step", "tokens", "loss", "balance", "router_z", "lr", "grad_norm", "val_ce", "val_bpb"]
    return [*measured, *(f"balance_L{layer}" for layer in moe_layers), *TIMING]


@dataclass
class Log:
    """Where a run tells what happens. A context manager: whatever ends the run, the terminal is given back."""

    moe_layers: list[int]
    csv: "Csv"
    terminal: "Terminal"
    board: Any
    """a SummaryWriter, or None"""
    waiting: tuple[Row, torch.cuda.Event | None] | None = None
    stuck: bool = False

    @classmethod
    def open(
        cls, run: Path, config: Config, start_step: int = 0, parameters: int = 0, console: Console | None = None
    ) -> Self:
        """Begin the log of the run, or continue it after `start_step`: rows beyond that are dropped.

        Raises UserError when the log on disk has other columns, or TensorBoard is asked for but not installed.
        """
        layers = config.model.moe_layers
        board = _open_board(run, start_step) if config.log.tensorboard else None
        csv, earlier = Csv.open(run / FILE, columns(layers), start_step)
        story = Story(run.resolve().name, parameters, layers, config.train.steps, start_step)
        for row in earlier:
            story.hear(row)
        story.clock.clear()  # it is this process's time that says how long the rest takes
        return cls(layers, csv, Terminal(story, config.log.every, console), board)

    def add(self, row: Row) -> None:
        """Take the row of this step and write that of the step before."""
        sent = _send(row)
        self._write_waiting()
        self.waiting = sent

    def flush(self) -> None:
        """Write the row that is waiting, and force the file to disk."""
        self._write_waiting()
        self._try(self.csv.sync)

    def say(self, text: str) -> None:
        """Show a message, after the steps that it follows. The text is shown, never obeyed: no markup, no escapes."""
        self._write_waiting()
        self.terminal.say(text)

    def _write_waiting(self) -> None:
        if self.waiting is None:
            return
        row, self.waiting = _receive(*self.waiting), None
        layers = dict(zip(self.moe_layers, row["balance_per_layer"], strict=True)) if "balance_per_layer" in row else {}
        numbers = row | {f"balance_L{layer}": balance for layer, balance in layers.items()}
        self._try(self.csv.write, numbers)
        if self.board:
            self._try(_write_board, self.board, numbers)
        self.terminal.show(row)

    def _try(self, write: Any, *what: Any) -> None:
        """A full disk must not end the training: it is said once, and rows wait in memory for better times."""
        try:
            write(*what)
            self.stuck = False
        except OSError as error:
            if not self.stuck:
                self.terminal.say(f"the log cannot be written: {error.strerror or error}; training goes on")
            self.stuck = True

    def __enter__(self) -> Self:
        self.terminal.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            with suppress(RuntimeError) if error else nullcontext():  # a device that failed will not answer either
                self.flush()
        finally:
            self.terminal.close()
            self._try(self.csv.file.close)
            if self.board:
                self._try(self.board.close)


def _send(row: Row) -> tuple[Row, torch.cuda.Event | None]:
    """Copies of the row's tensors, on their way to the host, and what will tell of their arrival.

    Only CUDA's copies may travel while the device works on: elsewhere nothing tells when they have arrived.
    """
    tensors = [value for value in row.values() if isinstance(value, Tensor)]
    sent = {
        name: value.detach().to("cpu", non_blocking=value.is_cuda, copy=True) if isinstance(value, Tensor) else value
        for name, value in row.items()
    }
    device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
    return sent, torch.cuda.current_stream(device).record_event() if device else None


def _receive(row: Row, arrival: torch.cuda.Event | None) -> Row:
    if arrival:
        arrival.synchronize()
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in row.items()}


@dataclass
class Csv:
    """A file that only grows. What a full disk refuses stays in the buffer and is written with the next row."""

    file: BinaryIO
    columns: list[str]

    @classmethod
    def open(cls, path: Path, names: list[str], step: int) -> tuple[Self, list[Row]]:
        """The file, cut back to `step` (0: begun anew) in one rename, and the rows that it keeps."""
        aside = path.with_suffix(".tmp")
        try:
            kept = list(_rows_up_to(path, names, step)) if step and path.exists() else []
            with aside.open("wb") as file:
                file.write("".join(f"{line}\n" for line in [",".join(names), *(line for line, _ in kept)]).encode())
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
            return cls(path.open("ab", buffering=1 << 20), names), [row for _, row in kept]
        except OSError as error:
            raise UserError(f"cannot use {path}: {error.strerror}") from None

    def write(self, row: Row) -> None:
        self.file.write((",".join(_cell(name, row.get(name)) for name in self.columns) + "\n").encode())
        self.file.flush()

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())


def _cell(name: str, value: int | float | None) -> str:
    """Nine digits tell any two fp32 numbers apart, and equal numbers always look equal."""
    if value is None or isinstance(value, int):
        return "" if value is None else str(value)
    return format(value, TIMING.get(name, ".9g"))


def _rows_up_to(path: Path, names: list[str], step: int) -> Iterator[tuple[str, Row]]:
    """Each line up to `step`, as it stands and as numbers. A line that a crash left in pieces is no row."""
    header, *lines = read(path, 2**30).decode(errors="replace").split("\n")
    if lines and header != ",".join(names):
        raise UserError(f"{path} has other columns than this run; choose another folder (--run) or move the file away")
    for line in lines[:-1]:  # what follows the last line feed was cut off
        cells = line.split(",")
        with suppress(ValueError):
            row = {name: float(cell) for name, cell in zip(names, cells, strict=True) if cell}
            if int(cells[0]) <= step:
                yield line, row


def _open_board(run: Path, start_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("log.tensorboard needs TensorBoard: pip install 'khanhllm[tensorboard]'") from None
    return SummaryWriter(run / "tensorboard", purge_step=start_step + 1 if start_step else None)  # type: ignore[no-untyped-call]


def _write_board(board: Any, row: Row) -> None:
    for name, value in row.items():
        if isinstance(value, int | float) and name != "step":
            board.add_scalar(name, value, row["step"])


@dataclass
class Story:
    """What the terminal tells of a run."""

    name: str
    parameters: int
    moe_layers: list[int]
    steps: int
    step: int
    row: Row = field(default_factory=dict)
    """the newest"""
    losses: "array[float]" = field(default_factory=lambda: array("d"))
    checked: Row = field(default_factory=dict)
    """the newest that was validated"""
    best_ce: float = inf
    clock: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=100))
    """(step, seconds) of recent steps; each is the end of a step, so the slow first one is never in between"""

    def hear(self, row: Row) -> None:
        self.row, self.step = row, int(row["step"])
        self.losses.append(row.get("loss", nan))
        if "seconds" in row:
            self.clock.append((self.step, row["seconds"]))
        if row.get("val_ce") is not None:
            self.checked = row
            self.best_ce = min(self.best_ce, row["val_ce"])

    @property
    def eta(self) -> str:
        if len(self.clock) < 2 or self.step == self.steps:
            return ""
        (early, then), (late, now) = self.clock[0], self.clock[-1]
        return f"ETA {duration((now - then) / (late - early) * (self.steps - late))}"


class _Console(Console):
    """Training goes on when whoever read its output, `head` for one, has gone."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Terminal:
    """A live panel for a person, plain lines for a file or a pipe."""

    def __init__(self, story: Story, every: int, console: Console | None) -> None:
        self.console = console or _Console(force_terminal=sys.stdout.isatty())
        self.story, self.every = story, every
        person = self.console.is_interactive and not self.console.is_jupyter and "utf" in self.console.encoding
        self.live = Live(console=self.console, auto_refresh=False) if person else None
        self.drawn = -inf
        self.shown = story.step

    def open(self) -> None:
        if self.live:
            self.live.start()
            self._draw()

    def show(self, row: Row) -> None:
        self.story.hear(row)
        if self.live:
            if time.monotonic() - self.drawn >= REDRAW:
                self._draw()
        elif self.story.step % self.every == 0 or row.get("val_ce") is not None or self.story.step == self.story.steps:
            self._print_line()

    def say(self, text: str) -> None:
        shown = Text(visible(text, self.console.encoding))
        self.console.print(shown, soft_wrap=not self.live, markup=False, highlight=False, emoji=False)

    def close(self) -> None:
        if not self.live:
            if self.shown != self.story.step:
                self._print_line()
            return
        try:
            self._draw()
        finally:
            self.live.stop()

    def _print_line(self) -> None:
        self.shown = self.story.step
        self.say("  ".join(_line(self.story)))

    def _draw(self) -> None:
        assert self.live is not None
        self.live.update(panel(self.story, *self.console.size), refresh=True)
        self.drawn = time.monotonic()


def _line(story: Story) -> Iterator[str]:
    row = story.row
    yield f"step {story.step}/{story.steps}"
    yield f"loss {_text(row, 'loss', '.4f')}"
    if row.get("val_ce") is not None:
        yield f"val {row['val_ce']:.4f} ({_text(row, 'val_bpb', '.3f')} bits/byte)"
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


def panel(story: Story, width: int, height: int) -> Panel:
    """The whole run at a glance, at most `height` - 2 lines, so that a message above it stays in sight."""
    inner = min(width, 110) - 4
    numbers = list(_numbers(story))
    experts = _experts(story, inner, height - len(numbers) - 12)
    room = height - len(numbers) - len(experts) - 7
    curve = _curve(story, inner, min(6, room)) if room >= 2 else []
    name = visible(story.name) + (f" · {short(story.parameters)} parameters" if story.parameters else "")
    blocks: list[Sequence[RenderableType]] = [[_progress(story)], curve, numbers, experts]
    lines = [line for block in blocks if block for line in ["", *block]][1:]
    return Panel(Group(*lines), title=Text(name, "bold"), title_align="left", border_style="blue", width=inner + 4)


def _progress(story: Story) -> RenderableType:
    line = Table.grid(padding=(0, 2), expand=True)
    for ratio in (None, 1, None):
        line.add_column(ratio=ratio, no_wrap=True)
    done = f"{100 * story.step / story.steps:.0f} %  {story.eta}"
    bar = ProgressBar(total=story.steps, completed=story.step, complete_style="blue", finished_style="green")
    line.add_row(f"step {story.step:,} / {story.steps:,}", bar, done)
    return line


def _curve(story: Story, width: int, height: int) -> list[Text]:
    """The loss of all steps so far."""
    low, high = frame(story.losses)
    lines = braille(story.losses, width - 8, height, low, high) if story.losses else [""] * height
    ends = {0: f"{high:.2f}", height - 1: f"{low:.2f}"} if story.losses else {}
    return [Text.assemble((f"{ends.get(y, ''):>6}  ", "dim"), (line, "cyan")) for y, line in enumerate(lines)]


def _numbers(story: Story) -> Iterator[Text]:
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


def _experts(story: Story, width: int, room: int) -> list[Text]:
    """The experts of each mixture layer; two layers a line if there are many, the least even ones if too many."""
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
