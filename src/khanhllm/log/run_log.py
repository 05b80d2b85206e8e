"""Write one dict per step to three places: a CSV, the terminal and, if the config asks for it, TensorBoard.

A row holds plain numbers, and tensors that a device may still have to compute. Reading a number from a device waits for
all its work, so `add` only starts copies to the host and writes the *previous* row, whose copies have arrived. The log
is one step late, and the device never waits for it. `flush` writes the last row too, before a checkpoint, so that no
checkpoint is ahead of its log.

The CSV is the record of a run: the same text for the same number, one line per step, cut back only when a run returns
to a checkpoint. A second one, kept in the same way, has the load of each expert every few steps. The terminal shows a
panel to a person and plain lines to a file. A new measurement is one key in the row: TensorBoard takes every number,
the CSV those that `columns` names.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime
from math import inf, isfinite, nan
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from rich.console import Console
from torch import Tensor

from khanhllm.errors import UserError
from khanhllm.files import publish, read
from khanhllm.log.alarms import Alarms
from khanhllm.log.terminal import Row, RunView, Terminal
from khanhllm.schema import Config

FILE = "training_log.csv"
EXPERTS = "experts.csv"
"""each expert's share of its layer's load, one row for a layer, every log.every steps; a dense run has none"""
MESSAGES = "messages.txt"
LARGEST = 2**30
"""size of the largest log that is read (bytes)"""
TIMING = {"tokens_per_s": ".1f", "mfu": ".4f", "waiting": ".4f", "memory_mb": ".1f", "seconds": ".2f"}


def columns(config: Config) -> list[str]:
    """The columns of the CSV. Those of timing, which differ between equal runs, come last."""
    moe_layers, some = config.model.moe_layers, config.train.targets != "all"
    measured = ["step", "tokens", "loss", "balance", "router_z", "lr", "grad_norm", "rejected", "val_ce", "val_bpb"]
    routed = ["max_violation", "least_share", *(f"balance_L{layer}" for layer in moe_layers)] if moe_layers else []
    own = ["counted"] * some + ["base_bpb"] * bool(config.data.base)
    return [*measured, *own, *routed, *TIMING]


def expert_columns(experts: int) -> list[str]:
    """The columns of experts.csv."""
    return ["step", "layer", *(f"share_{expert}" for expert in range(experts))]


@dataclass
class Log:
    """The log of a run. As a context manager it restores the terminal, however the run ends."""

    moe_layers: list[int]
    csv: "Csv"
    loads: "Csv | None"
    """experts.csv; None for a dense model"""
    terminal: Terminal
    board: Any
    """a SummaryWriter, or None"""
    alarms: Alarms
    validations: dict[int, float] = field(default_factory=dict)
    """the loss of each validation (nats per token), by step"""
    waiting: tuple[Row, torch.cuda.Event | None] | None = None
    stuck: bool = False

    @classmethod
    def open(
        cls,
        run: Path,
        config: Config,
        start_step: int = 0,
        parameters: int = 0,
        console: Console | None = None,
        quiet: bool = False,
    ) -> Self:
        """Begin the log of the run, or continue it after `start_step` and drop the rows beyond.

        Raises UserError if the log on disk has other columns, or if the config asks for TensorBoard and it is missing.
        """
        layers = config.model.moe_layers
        board = _open_board(run, start_step + 1 if start_step else None) if config.log.tensorboard else None
        csv, earlier = Csv.open(run / FILE, columns(config), start_step)
        loads = Csv.open(run / EXPERTS, expert_columns(config.model.experts), start_step)[0] if layers else None
        story = RunView(run.resolve().name, parameters, layers, config.train.steps, 0).cut(start_step, earlier)
        terminal = Terminal(story, config.log.every, Console(quiet=True) if quiet else console)
        return cls(layers, csv, loads, terminal, board, Alarms(layers, config.model), _validations(earlier))

    def add(self, row: Row) -> None:
        """Take the row of this step and write that of the step before."""
        sent = _send(row)
        self._write_waiting()
        self.waiting = sent

    def flush(self) -> None:
        """Write the last row and force the file to disk."""
        self._write_waiting()
        for file in self.files:
            self._try(file.sync)

    @property
    def files(self) -> list["Csv"]:
        return [self.csv, *([self.loads] if self.loads else [])]

    @property
    def seconds(self) -> float:
        """The time that the run has taken, over all the times that it was resumed."""
        return float(self.terminal.story.row.get("seconds") or 0)

    def expect(self, steps: int) -> None:
        """Set the step with which the run is now expected to end."""
        self.terminal.story.steps = steps

    def rewind(self, step: int) -> None:
        """Drop the rows beyond `step`, from which the run continues."""
        self.flush()
        earlier: list[Row] = []
        self._try(self.csv.cut, step, earlier)
        if self.loads:
            self._try(self.loads.cut, step, [])
        self.terminal.story = self.terminal.story.cut(step, earlier)
        self.validations = _validations(earlier)
        if self.board:
            self._try(self.board.close)
            self._try(self._begin_board_again, step)

    def _begin_board_again(self, step: int) -> None:
        self.board = _open_board(Path(self.csv.file.name).parent, step + 1)

    def best(self, steps: Iterable[int]) -> int | None:
        """`best_of` these steps of the run."""
        return best_of(steps, self.validations)

    def complete(self, score: Mapping[str, Any]) -> None:
        """Give the last row, which was written without it, its validation, and say so."""
        self.flush()
        self._try(self.csv.fill_in, score)
        story = self.terminal.story
        story.checked = story.row = story.row | dict(score)
        story.best_ce = min(story.best_ce, score["val_ce"])
        self.validations |= _validations([{"step": story.step, **score}])
        if self.board:
            self._try(_write_board, self.board, {"step": story.step, **score})
        base = f"; base {score['base_bpb']:.3f}" if "base_bpb" in score else ""
        self.say(f"validation after step {story.step}: {score['val_ce']:.4f} ({score['val_bpb']:.3f} bits/byte{base})")

    def say(self, text: str) -> None:
        """Show a message, after the steps that it follows, and keep it in messages.txt. Markup and escapes in it have
        no effect."""
        self._write_waiting()
        self._tell(text)

    def _tell(self, text: str) -> None:
        self.terminal.say(text)
        self._try(self._keep, text)

    def _keep(self, text: str) -> None:
        with Path(self.csv.file.name).with_name(MESSAGES).open("a", encoding="utf-8", errors="replace") as file:
            file.write(f"{datetime.now().isoformat(' ', 'seconds')}  {text}\n")

    def _write_waiting(self) -> None:
        if self.waiting is None:
            return
        row, self.waiting = _receive(*self.waiting), None
        layers = dict(zip(self.moe_layers, row["balance_per_layer"], strict=True)) if "balance_per_layer" in row else {}
        numbers = row | {f"balance_L{layer}": balance for layer, balance in layers.items()}
        self._try(self.csv.write, numbers)
        if self.loads and "load_per_layer" in row and row["step"] % self.terminal.every == 0:
            shares = zip(self.moe_layers, row["load_per_layer"], strict=True)
            self._try(self.loads.write, *(_load_row(row["step"], *share) for share in shares))
        self.validations |= _validations([row])
        if self.board:
            self._try(_write_board, self.board, numbers)
        self.terminal.show(row)
        for text in self.alarms.check(row):
            self._tell(text)

    def _try(self, write: Any, *what: Any) -> None:
        """Write something. A full disk does not end the training: this reports it once, and rows wait in memory."""
        try:
            write(*what)
            self.stuck = False
        except OSError as error:
            if not self.stuck:
                self.terminal.say(f"the log cannot be written: {error.strerror or error}; training continues")
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
            for file in self.files:
                self._try(file.file.close)
            if self.board:
                self._try(self.board.close)


def _send(row: Row) -> tuple[Row, torch.cuda.Event | None]:
    """Start to copy the row's tensors to the host. Returns the row of copies and the event of their arrival.

    Only copies from CUDA run while the device works: other devices have no event to wait for.
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
    """A CSV file that only grows. What a full disk refuses stays in the buffer, to be written with the next row."""

    file: BinaryIO
    columns: list[str]

    @classmethod
    def open(cls, path: Path, names: list[str], step: int) -> tuple[Self, list[Row]]:
        """Cut the file back to `step` (0: begin anew), in one rename. Returns the open file and the rows it keeps."""
        try:
            earlier = list(_rows_up_to(path, names, step)) if step and path.exists() else []
            lines = [",".join(names), *(line for line, _ in earlier)]
            publish(path, "".join(f"{line}\n" for line in lines), durable=True)
            return cls(path.open("ab", buffering=1 << 20), names), [row for _, row in earlier]
        except OSError as error:
            raise UserError(f"cannot use {path}: {error.strerror}") from None

    def write(self, *rows: Row) -> None:
        """Append rows."""
        lines = (",".join(_cell(name, row.get(name)) for name in self.columns) + "\n" for row in rows)
        self.file.write("".join(lines).encode())
        self.file.flush()

    def cut(self, step: int, earlier: list[Row]) -> None:
        """Drop the rows beyond `step` in place, which takes no room on a full disk; adds those before to `earlier`."""
        path = Path(self.file.name)
        with suppress(OSError):  # what a full disk refused is lost now
            self.file.close()
        self.file = path.open("ab", buffering=1 << 20)
        kept = list(_rows_up_to(path, self.columns, step))
        last = f"{kept[-1][0] if kept else ','.join(self.columns)}\n".encode()
        os.truncate(path, (b"\n" + read(path, LARGEST)).rfind(b"\n" + last) + len(last))
        earlier += (row for _, row in kept)

    def fill_in(self, values: Mapping[str, Any]) -> None:
        """Put values into empty cells of the last row, in one rename. Raises OSError."""
        path = Path(self.file.name)
        self.file.close()
        try:
            *before, last, _end = read(path, LARGEST).decode().split("\n")
            cells = [
                cell or _cell(name, values.get(name)) for name, cell in zip(self.columns, last.split(","), strict=True)
            ]
            publish(path, "\n".join([*before, ",".join(cells), ""]), durable=True)
        finally:
            self.file = path.open("ab", buffering=1 << 20)

    def sync(self) -> None:
        """Force the file to disk."""
        self.file.flush()
        os.fsync(self.file.fileno())


def _load_row(step: int, layer: int, shares: list[float]) -> Row:
    return {"step": step, "layer": layer} | {f"share_{expert}": share for expert, share in enumerate(shares)}


def _cell(name: str, value: int | float | None) -> str:
    """A value as text. Nine digits distinguish any two fp32 numbers, and equal numbers give equal text."""
    if value is None or isinstance(value, int):
        return "" if value is None else str(value)
    return format(value, TIMING.get(name, ".9g"))


def _rows_up_to(path: Path, names: list[str], step: int) -> Iterator[tuple[str, Row]]:
    """Each line up to `step`, as text and as numbers. Skips a line that a crash has cut."""
    header, *lines = read(path, LARGEST).decode(errors="replace").split("\n")
    if lines and header != ",".join(names):
        raise UserError(f"{path} has other columns than this run; choose another folder (--run) or move the file away")
    for line in lines[:-1]:  # what follows the last line feed was cut off
        cells = line.split(",")
        with suppress(ValueError):
            row = {name: float(cell) for name, cell in zip(names, cells, strict=True) if cell}
            if int(cells[0]) <= step:
                yield line, row


def _validations(rows: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    return {int(row["step"]): row["val_ce"] for row in rows if isfinite(row.get("val_ce") or nan)}


def validations_of(run: Path, config: Config) -> dict[int, float]:
    """The loss of each validation in the log of a run, by step. UserError if there is a log that cannot be read."""
    path, names = run / FILE, columns(config)
    try:
        return _validations(row for _, row in _rows_up_to(path, names, 2**62)) if path.exists() else {}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def best_of(steps: Iterable[int], validations: Mapping[int, float]) -> int | None:
    """The step with the lowest validation: the one after it, or else the latest before it. Of equal steps the first,
    which is the nearest to its validation. None if no step has one."""
    latest = {step: max((at for at in validations if at <= step), default=None) for step in sorted(steps)}
    known = {step: validations[at] for step, at in latest.items() if at is not None}
    return min(known, key=known.__getitem__, default=None)


def lacks_validation(run: Path, config: Config, step: int) -> bool:
    """Whether the log has the row of a step, but not its validation, which a signal cut short."""
    row = _last_row(run, config, step)
    return row.get("step") == step and "val_ce" not in row


def last_step(run: Path, config: Config) -> int:
    """The last step in the log of a run; 0 without one."""
    return int(_last_row(run, config, 2**62).get("step", 0))


def seconds_of(run: Path, config: Config, step: int) -> float:
    """The time that a run had taken up to a step, by its log; 0 where that does not say it."""
    seconds = float(_last_row(run, config, step).get("seconds") or 0)
    return seconds if 0 < seconds < inf else 0.0


def _last_row(run: Path, config: Config, step: int) -> Row:
    """The last row up to a step; empty if the log has none, or cannot be read."""
    with suppress(OSError, UserError):
        rows = [row for _, row in _rows_up_to(run / FILE, columns(config), step)]
        return rows[-1] if rows else {}
    return {}


def _open_board(run: Path, purge_step: int | None) -> Any:
    """purge_step: the first step that is to be forgotten."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("log.tensorboard needs TensorBoard: pip install 'khanhllm[tensorboard]'") from None
    return SummaryWriter(run / "tensorboard", purge_step=purge_step)  # type: ignore[no-untyped-call]


def _write_board(board: Any, row: Row) -> None:
    for name, value in row.items():
        if isinstance(value, int | float) and name != "step":
            board.add_scalar(name, value, row["step"])
