"""What Python programs and notebooks call; each function is an attribute of the package, as in `khanhllm.load`.

Keys of the config are given by their dotted names: `khanhllm.train("nano", **{"train.seed": 1})`. Whatever the user
can put right raises `khanhllm.UserError`, whose text is one line that names what, where and what to do.
"""

import functools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from khanhllm.errors import UserError, missing_extra
from khanhllm.schema import Config
from khanhllm.settings import (
    folder_for,
    nested,
    nothing_to_resume,
    other_shape,
    preset_names,
    read_config,
    read_toml,
    resolve,
    settings_of,
    with_length,
)

if TYPE_CHECKING:
    from khanhllm.draw import Floats
    from khanhllm.runs.run import Run


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


NAMES = {"steps": "steps", "time": "time", "tokens": "tokens"}
ARGUMENTS = {"for": "time=", "resume": "resume=True", "twin": "the command line's --twin"}
"""what an option of the command line is called here, where it is not NAME= """


def in_python(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Errors of a public function speak of its arguments instead of options; for a module of an extra that is not
    installed, one says what to install."""

    @functools.wraps(function)
    def call(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        try:
            return function(*arguments, **named)
        except UserError as error:
            error.args = (_without_options(str(error)),)
            raise
        except ModuleNotFoundError as error:
            if missing := missing_extra(error):
                raise missing from None
            raise

    return call


def _without_options(text: str) -> str:
    """--run as run=, --optim.lr as optim.lr; a whole command line stays one."""

    def python(found: re.Match[str]) -> str:
        name = found[1]
        bare = "." in name or text[found.end() : found.end() + 1] == ":"
        return name if bare else ARGUMENTS.get(name, f"{name.replace('-', '_')}=")

    return text if "khanhllm " in text else re.sub(r"(?<![\w-])--([a-z][\w.-]*\w)", python, text)


def _place(argument: str, given: object) -> Path:
    """The path that an argument names. UserError if it is none."""
    if not isinstance(given, str | Path) or not str(given).strip():
        raise UserError(f"{argument} must be the name of a folder or file, as str or Path, got {given!r:.60}")
    return Path(given)


@in_python
def load(run: str | Path, device: str = "auto", precision: str = "auto", step: int | str | None = None) -> "Run":
    """A checkpoint of a run folder, ready to write, to score and to be looked into.

    step: of the checkpoint; None for the newest intact one, "best" for that with the lowest validation loss.

    device: auto, cpu, cuda, cuda:N or mps. precision: auto, fp32, tf32 or bf16. Changes nothing of the process
    (threads, garbage collector, allocator); tf32, which torch keeps for the whole process, only where it is asked for.
    """
    import torch

    from khanhllm.runs.run import open_run

    opened = open_run(
        _place("run", run),
        resolve({"machine": {"device": device, "precision": precision}}, where="load").machine,
        step,
    )
    if opened.machine.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    return opened


@in_python
def train(
    preset: str | Path,
    data: str | Path | None = None,
    run: str | Path | None = None,
    *,
    steps: int | None = None,
    time: str | None = None,
    tokens: str | int | None = None,
    resume: bool = False,
    **knobs: Any,
) -> "Run":
    """Train a model and open it, as `khanhllm train` does; also off the main thread, in a notebook, in a loop.

    preset: a name (see `presets`) or the path of a TOML file. data: where the text comes from. run: the folder to
    write (default runs/PRESET). steps, time ("8h") or tokens ("300M"): how long. resume: continue the run in that
    folder. Ctrl-C finishes the step, saves, and returns what was trained so far.
    """
    from khanhllm.runs.run import open_run
    from khanhllm.training import run as training

    folder = folder_for(str(_place("preset", preset))) if run is None else _place("run", run)
    kept = folder / "config.toml"
    if resume and not kept.exists():
        raise nothing_to_resume(folder, "leave resume out to begin one")
    base = read_toml(kept) if resume else _settings(preset)
    if resume and preset in preset_names() and (other := other_shape(str(preset), folder)):
        warnings.warn(other, stacklevel=3)
    if data is not None and not isinstance(data, str | Path):
        raise UserError(
            f"data must be one source of text, as str or Path, got {data!r:.60}; a mixture is 'a.txt:1, b/:2'"
        )
    source = {} if data is None else {"data": {"source": str(data)}}
    chosen = with_length(base, source, nested(knobs), steps=steps, time=time, tokens=tokens, where="train", names=NAMES)
    training.train(chosen, folder, resume=resume)
    return open_run(folder, chosen.machine)


@in_python
def plan(preset: str | Path, card: str | None = None, memory: str | None = None, **knobs: Any) -> dict[str, Any]:
    """What a run takes and how long it lasts, simulated without memory: bytes, seconds, tokens, and what each other
    switch would save.

    card: a graphics card that need not be here, as "RTX 4090". memory: what may be filled, as "8GB".
    """
    from khanhllm.planning import plan as planning
    from khanhllm.planning.budget import fit_micro_batch

    wanted = config(preset, **knobs)
    hardware = planning.hardware_for(wanted, memory, card)
    return planning.plan(fit_micro_batch(wanted, hardware), hardware)


@in_python
def config(preset: str | Path, **knobs: Any) -> Config:
    """The whole, checked config of a preset (or TOML file, or run folder), with single keys changed."""
    return resolve(_settings(preset), nested(knobs), where=str(preset))


def presets() -> list[str]:
    """The names of all presets."""
    return preset_names()


@in_python
def history(run: str | Path) -> "dict[str, Floats]":
    """The columns of a run's training_log.csv, one number for each step; nan where nothing was measured.

    Raises UserError if the folder has no log.
    """
    from khanhllm.log.pictures import read_log

    log = _place("run", run) / "training_log.csv"
    if not log.exists():
        read_config(log.parent)  # which refuses a folder that holds no run
        raise UserError(f"{run} has no {log.name} yet; train the run further")
    return read_log(log, names=None)


def _settings(name: str | Path) -> dict[str, Any]:
    return settings_of(_place("preset", name))
