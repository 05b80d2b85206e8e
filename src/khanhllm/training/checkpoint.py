"""A checkpoint is a directory that appears whole or not at all.

It is written aside as `step-N.tmp`, every file is forced to disk and read back, `manifest.json` with sizes and sha256
comes last, and one rename publishes it. A reader takes the newest one whose every byte agrees with its manifest.
Tensors are in safetensors and all else in JSON: nothing that is loaded can run code.

saver.py saves them while the training goes on.
"""

import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from khanhllm import optim
from khanhllm.errors import UserError
from khanhllm.files import SMALL, foreign, read
from khanhllm.model.exchange import WHOLE, Part
from khanhllm.schema import Natural
from khanhllm.training.guard import Guard
from khanhllm.units import as_size

FORMAT = 2
LONGEST_HEADER = 2**24
"""no model of ours needs a longer list of its tensors (bytes)"""
OTHER_MODEL = "check model.* keys"
"""how a fault ends that lies in the model's config, not in the checkpoint"""
Say = Callable[[str], None]
Moments = Mapping[Any, dict[str, Any]]
"""an optimizer's state, by parameter"""
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Numbers(BaseModel):
    """What JSON holds of the optimizer's state, by parameter."""

    kind: str = Field(alias="class")
    state: dict[str, dict[str, int | float]]


class Noted(BaseModel):
    """What state.json must hold. It may have been written by a stranger, who also made the sha256 agree."""

    model_config = ConfigDict(strict=True, extra="allow")

    format: int
    step: Natural
    optimizer: Numbers
    cursor: Annotated[int, Field(ge=0, le=2**62)] = 0
    load: list[list[Share]] = []
    guard: Guard = Guard()
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    data: str = ""
    tokenizer: str = ""
    folder: Annotated[str, Field(max_length=4000, pattern=r"^[^\x00]*$")] = ""


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint will hold."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    """for JSON"""

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.model.values(), *self.optimizer.values()))

    def copied(self) -> "Snapshot":
        """The same in the host's memory, untouched by what the training does next."""
        model, optimizer = (
            {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
            for tensors in (self.model, self.optimizer)
        )
        return replace(self, model=model, optimizer=optimizer)


def snapshot(
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    moments: Moments | None = None,
    weights: dict[str, Tensor] | None = None,
) -> Snapshot:
    """The tensors themselves, not copies. moments, weights: all of them, where optimizer and model hold only some."""
    tensors, numbers = _flatten(model, optimizer, optimizer.state if moments is None else moments)
    weights = {name: tensor.contiguous() for name, tensor in (weights or model.state_dict()).items()}
    return Snapshot(step, weights, tensors, {"format": FORMAT, "step": step, "optimizer": numbers, **state})


def size(model: nn.Module, optimizer: torch.optim.Optimizer, part: Part = WHOLE) -> int:
    """Bytes of the tensors of a checkpoint, known before the first step. part: see `load_model`."""
    moments = (kept for each in optim.state_shapes(optimizer, part.counts(model)).values() for kept in each.values())
    return sum(math.prod(shape) * kind.itemsize for kind, shape in chain(part.shapes(model).values(), moments))


def write(run: Path, whole: Snapshot) -> Path:
    """Write `run/checkpoints/step-N` and return it. Raises OSError (disk full, read-only, ...) and leaves nothing
    half-written behind; checkpoints that were there stay as they are."""
    final = _folder(run, whole.step)
    aside = final.with_suffix(".tmp")
    try:
        for left_over in final.parent.glob("step-*.tmp"):
            shutil.rmtree(left_over)
        _make_room(run, whole.bytes)
        aside.mkdir(parents=True)
        _save_tensors(whole.model, aside / "model.safetensors")
        _save_tensors(whole.optimizer, aside / "optimizer.safetensors")
        _write_json(aside / "state.json", whole.state)
        _write_json(aside / "manifest.json", {path.name: _fingerprint(path) for path in sorted(aside.iterdir())})
        _sync(aside)
        aside.replace(final)
        _sync(final.parent)
        _sync(run)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch says the last where it cannot map a file
        shutil.rmtree(aside, ignore_errors=True)
        raise error if isinstance(error, OSError) else OSError(str(error)) from None
    return final


def prune(run: Path, keep: int, best: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints and the one of step `best`. Each was read back before it was
    published."""
    for old in steps(run)[keep:]:
        if step_of(old) != best:
            shutil.rmtree(old, ignore_errors=True)


def reject_after(run: Path, step: int, paper: nn.Module | None = None) -> None:
    """Put aside, with the reason, every checkpoint beyond `step`: the road there will be walked again. Only the newest
    of all that were put aside is kept, as each is as large as a checkpoint.

    paper: see `newest`; with it, a file that claims more than there can be is not read to its end.
    """
    newest_aside = None
    for path in steps(run):
        if step_of(path) > step:
            fault = verify(path, paper) or f"the run went back to step {step}"
            aside = path.with_suffix(".rejected")
            shutil.rmtree(aside, ignore_errors=True)
            path.replace(aside)
            (aside / "reason.txt").write_text(f"{fault}\n", encoding="utf-8")
            newest_aside = newest_aside or aside
    for old in (run / "checkpoints").glob("step-*.rejected") if newest_aside else ():
        if old != newest_aside:
            shutil.rmtree(old, ignore_errors=True)


def to_stderr(text: str) -> None:
    print(UserError(text), file=sys.stderr)


def newest(
    run: Path,
    say: Say = to_stderr,
    paper: nn.Module | None = None,
    suits: Callable[[dict[str, Any]], bool] = lambda _state: True,
) -> Path | None:
    """The newest checkpoint that verifies and whose state `suits`; `say` hears of each one that does not verify. None
    if there is none.

    paper: the run's model, of which only the shapes are read; a checkpoint of other shapes is then none of its own.
    Raises UserError if there are checkpoints but each of them is broken, or of another model.
    """
    found = steps(run)
    whole, faults = 0, []
    for path in found:
        fault = verify(path, paper)
        if fault:
            say(f"checkpoint {path.name} rejected: {fault}")
            faults.append(fault)
        elif suits(read_state(path)):
            return path
        else:
            whole += 1
    if found and not whole:
        if other := [fault for fault in faults if fault.endswith(OTHER_MODEL)]:
            what = f"{run} holds checkpoints of another model than its config.toml describes: {other[0]}"
            raise UserError(f"{what}, or start again in another folder (--run)")
        raise UserError(f"{run}: none of the {len(found)} checkpoints is intact; start again in another folder (--run)")
    return None


def verify(path: Path, paper: nn.Module | None = None) -> str | None:
    """What is wrong with a checkpoint, or None. Reads every byte (about 1 GB/s), but first looks at what is claimed:
    a file may be a link, a pipe without end, or of terabytes without content."""
    if path.is_symlink() or (fault := foreign(path)):
        return "it is a link" if path.is_symlink() else fault
    # weights and two moments in fp32 are 12 bytes a number
    most = 2**63 if paper is None else 16 * sum(t.numel() for t in paper.state_dict().values()) + LONGEST_HEADER
    try:
        manifest = json.loads(read(path / "manifest.json"))
        missing = {"model.safetensors", "optimizer.safetensors", "state.json"} - set(manifest)
        if missing:
            return f"the manifest lacks {', '.join(sorted(missing))}"
        for name, expected in manifest.items():
            if name != Path(name).name or name in ("", ".."):
                return f"the manifest names a file elsewhere: {name[:60]!r}"
            if (path / name).stat().st_size != expected["bytes"]:
                return f"{name} has {(path / name).stat().st_size} bytes instead of {expected['bytes']}"
            if (path / name).stat().st_size > (most if name.endswith(".safetensors") else SMALL):
                return f"{name} has {(path / name).stat().st_size:,} bytes, more than there is to keep"
        if paper is not None:
            _compare(path, paper)
        for name, expected in manifest.items():
            if _fingerprint(path / name) != expected:
                return f"{name} does not match its sha256"
        read_state(path)
        for name in ("model.safetensors", "optimizer.safetensors"):
            _tensor_shapes(path / name)
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except UserError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "manifest.json is not a manifest"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """Where the run stood. UserError if that is not what `save` writes."""
    try:
        noted = Noted.model_validate_json(read(path / "state.json"))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part)[:60] for part in first["loc"])
        raise UserError(f"{path / 'state.json'} is not the state of a run ({key}: {first['msg'][:200]})") from None
    if noted.format != FORMAT:
        raise UserError(f"{path} has checkpoint format {noted.format}, this version reads {FORMAT}")
    if noted.step != step_of(path):
        raise UserError(f"{path / 'state.json'} is of another step, {noted.step}")
    return noted.model_dump(by_alias=True)


def _tensor_shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor in a file, from its header alone. UserError if it is not a safetensors file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER:
            raise UserError(f"{path} is no safetensors file of ours: it claims a header of {length:,} bytes")
        with safe_open(path, "pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  no mapping
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except (SafetensorError, RuntimeError) as error:  # the latter if there is no room to map it
        raise UserError(f"{path} is no safetensors file: {str(error)[:200]}") from None


def _compare(path: Path, model: nn.Module, part: Part = WHOLE) -> None:
    """UserError if the tensors of a checkpoint are not those of the model, by name, shape and kind of number."""
    saved, wanted = _tensor_shapes(path / "model.safetensors"), part.shapes(model)
    for name in sorted(saved.keys() | wanted.keys()):
        ours, theirs = wanted.get(name), saved.get(name)
        if ours is None or theirs is None or ours[1] != theirs[1]:
            has, needs = theirs and theirs[1], ours and ours[1]
            raise UserError(f"{path}: {name[:100]} is {has} in the checkpoint but {needs} in this model; {OTHER_MODEL}")
        if theirs[0] not in ("F32", "BF16"):
            raise UserError(f"{path}: {name} holds numbers of type {theirs[0]}, not fp32 or bf16")


def load_model(path: Path, model: nn.Module, part: Part = WHOLE) -> None:
    """Copy the weights into `model`, which has a `part` of its experts. UserError if its shapes are others."""
    _compare(path, model, part)
    model.load_state_dict(part.weights(load_file(path / "model.safetensors")))


def load_optimizer(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    numbers: dict[str, Any],
    mine: Container[nn.Parameter] | None = None,
    part: Part = WHOLE,
    named: Iterable[tuple[str, nn.Parameter]] = (),
) -> None:
    """Give the optimizer back the state that `save` took; `numbers` is the "optimizer" entry of the saved state.

    mine: the parameters that this process updates, if not all. The state of others is checked but not kept. part: see
    `load_model`. named: all parameters, if the optimizer's are not the model's.

    UserError if it was written by another kind of optimizer, or is not what that keeps for this model.
    """
    kind = type(optimizer).__name__
    if numbers["class"] != kind:
        raise UserError(f"{path} was written by {numbers['class']}, but optim.name now asks for {kind}")
    tensors = load_file(path / "optimizer.safetensors")
    if not tensors:  # saved before the first update
        return
    wanted, own = optim.state_shapes(optimizer, part.counts(model)), optim.state_shapes(optimizer)
    for name, parameter in named or model.named_parameters():
        kept = {key: tensors.pop(f"{name}/{key}") for key in wanted[parameter] if f"{name}/{key}" in tensors}
        if {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in kept.items()} != wanted[parameter]:
            raise UserError(f"{path}: the moments of {name} are not those that {kind} keeps for this model")
        if mine is None or parameter in mine:
            cut = {key for key in kept if own[parameter][key] != wanted[parameter][key]}
            here = {key: (part.slice(t) if key in cut else t).to(parameter.device) for key, t in kept.items()}
            optimizer.state[parameter] = numbers["state"].get(name, {}) | here
    if tensors:
        raise UserError(f"{path}: {min(tensors)[:100]} in optimizer.safetensors belongs to no parameter")


def _flatten(
    model: nn.Module, optimizer: torch.optim.Optimizer, moments: Moments
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state by parameter name: as tensors, and as what JSON can hold."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        state = moments.get(parameter, {})
        numbers[name] = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        for key, value in state.items():
            if isinstance(value, Tensor):
                shared = value.data_ptr() in seen  # tables that all parameters use; safetensors wants one owner each
                tensors[f"{name}/{key}"] = value.clone() if shared else value.contiguous()
                seen.add(value.data_ptr())
    return tensors, {"class": type(optimizer).__name__, "state": numbers}


def room(run: Path) -> int:
    """Bytes free where the checkpoints of a run lie, or will lie."""
    kept = run / "checkpoints"
    return shutil.disk_usage(kept if kept.exists() else run).free


def _make_room(run: Path, needed: int) -> None:
    """Raise OSError now rather than after minutes of writing."""
    free = room(run)
    if free < needed:
        raise OSError(f"the disk of {run} has {as_size(free)} free, a checkpoint takes {as_size(needed)}")


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path)
    _sync(path)
    with safe_open(path, framework="pt") as there:
        for name, tensor in tensors.items():
            if not np.array_equal(_bytes(there.get_tensor(name)), _bytes(tensor.cpu())):
                raise OSError(f"{path} reads back differently from what was written ({name}); is the disk sound?")


def _bytes(tensor: Tensor) -> np.ndarray:
    """For NumPy, whose comparison stays on one thread. A parallel operation of torch would give the saver's thread a
    team of OpenMP threads of its own; libgomp then counts more threads than cores, makes all of them sleep between
    operations instead of spin, and a small model's steps take twice as long from the first save on."""
    return tensor.flatten().view(torch.uint8).numpy()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
    _sync(path)


def _fingerprint(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    """Force a file, or the names in a directory, to disk."""
    if os.name == "nt" and path.is_dir():  # Windows has no handle for this and orders renames itself
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:07d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def steps(run: Path) -> list[Path]:
    """Published checkpoints, newest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if re.fullmatch("[0-9]+", path.name[5:])]
    return sorted(found, key=step_of, reverse=True)
