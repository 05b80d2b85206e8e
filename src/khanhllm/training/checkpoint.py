"""A checkpoint is a directory that appears whole or not at all.

It is written aside as `step-N.tmp`, every file is forced to disk and read back, `manifest.json` with sizes and sha256
comes last, and one rename publishes it. A reader takes the newest one whose every byte agrees with its manifest.
Tensors are in safetensors (tensor_files.py) and all else in JSON: nothing that is loaded can run code.

    prepare -> write_part -> publish    of several processes each writes its part, and the first does the rest

saver.py saves them while the training goes on.
"""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from khanhllm import optim
from khanhllm.errors import UserError
from khanhllm.files import SMALL, foreign, read, sync
from khanhllm.model import Transformer
from khanhllm.model.exchange import WHOLE, Part
from khanhllm.schema import Natural, Rate
from khanhllm.training import tensor_files
from khanhllm.training.guard import Cursor, Guard
from khanhllm.training.tensor_files import LONGEST_HEADER, Fingerprint
from khanhllm.units import as_size

FORMAT = 2
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
    cursor: Cursor = 0
    load: list[list[Share]] = []
    guard: Guard = Guard()
    seconds: Rate = 0.0
    ended: Rate = 0.0
    """the time that the run was given, if that has passed (seconds): less is used, as another step would not fit in"""
    tied: bool = False
    model: dict[str, Any] = {}
    """the [model] that was trained; empty in a checkpoint from before it was noted"""
    data: str = ""
    tokenizer: str = ""
    folder: Annotated[str, Field(max_length=4000, pattern=r"^[^\x00]*$")] = ""


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint will hold, or of its tensors the part that this process writes."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]  # for JSON

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.model.values(), *self.optimizer.values()))

    def copied(self) -> "Snapshot":
        """The same in the host's memory, untouched by what the training does next. What is copied is given up: some of
        it was gathered for this alone, and would lie there twice."""
        model, optimizer = (
            {name: tensors.pop(name).to("cpu", copy=True) for name in list(tensors)}
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
    """The tensors themselves, no copies. moments, weights: those to be saved, if not what optimizer and model hold."""
    tensors, numbers = _flatten(model, optimizer, optimizer.state if moments is None else moments)
    weights = {n: t.contiguous() for n, t in (model.state_dict() if weights is None else weights).items()}
    return Snapshot(step, weights, tensors, {"format": FORMAT, "step": step, "optimizer": numbers, **state})


def size(model: nn.Module, optimizer: torch.optim.Optimizer, part: Part = WHOLE) -> int:
    """Bytes of the tensors of a checkpoint, known before the first step. part: see `load_model`."""
    moments = (kept for each in optim.state_shapes(optimizer, part.counts(model)).values() for kept in each.values())
    return sum(math.prod(shape) * kind.itemsize for kind, shape in chain(part.shapes(model).values(), moments))


def write(run: Path, whole: Snapshot) -> Path:
    """Write `run/checkpoints/step-N` and return it. Raises OSError (disk full, read-only, ...) and leaves nothing
    half-written behind; checkpoints that were there stay as they are."""
    try:
        prepare(run, whole.step, whole.bytes)
        return publish(run, whole, write_part(run, whole))
    except OSError:
        discard(run, whole.step)
        raise


def prepare(run: Path, step: int, needed: int) -> None:
    """Make the folder to write a checkpoint into, aside, and remove what was left by those that were not finished.
    needed: bytes of its tensors. Raises OSError, also if there is no room: now rather than after minutes of writing."""
    aside = _aside(run, step)
    for left_over in aside.parent.glob("step-*.tmp"):
        shutil.rmtree(left_over)
    if (free := room(run)) < needed:
        raise OSError(f"the disk of {run} has {as_size(free)} free, a checkpoint takes {as_size(needed)}")
    aside.mkdir(parents=True)


def write_part(run: Path, part: Snapshot, nth: int = 0, of: int = 1) -> dict[str, Fingerprint]:
    """Write the tensors that the nth of so many processes has. What the manifest will say of its files. OSError if that
    fails."""
    aside, tensors = _aside(run, part.step), (part.model, part.optimizer)
    names = [tensor_files.name(kind, nth, of) for kind in tensor_files.KINDS]
    return {name: tensor_files.save(own, aside / name) for name, own in zip(names, tensors, strict=True)}


def publish(run: Path, part: Snapshot, files: dict[str, Fingerprint]) -> Path:
    """Add to the files of all processes what else a checkpoint has, and give it its name. Raises OSError.

    part: that of any of them; its tensors are no longer needed."""
    aside, final = _aside(run, part.step), folder(run, part.step)
    if unseen := [name for name in files if not (aside / name).is_file()]:
        raise OSError(f"{aside / unseen[0]} was written, but is not there; do all processes see the same disk?")
    _write_json(aside / "state.json", part.state)
    files = files | {"state.json": tensor_files.fingerprint(aside / "state.json")}
    _write_json(aside / "manifest.json", dict(sorted(files.items())))
    sync(aside)
    aside.replace(final)
    sync(final.parent)
    sync(run)
    return final


def discard(run: Path, step: int) -> None:
    """Remove what was written of a checkpoint that will not be published."""
    shutil.rmtree(_aside(run, step), ignore_errors=True)


def prune(run: Path, keep: int, best: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints and the one of step `best`. Each was read back before it was
    published."""
    for old in steps(run)[keep:]:
        if step_of(old) != best:
            shutil.rmtree(old, ignore_errors=True)


def reject_after(run: Path, step: int, paper: Transformer | None = None) -> None:
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
    paper: Transformer | None = None,
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
        try:
            fits = not fault and suits(read_state(path))
        except FileNotFoundError:
            fault = "state.json is gone"
        if fault and not path.exists():  # a training has removed it by now, for it has a newer one
            return newest(run, say, paper, suits)
        if fault:
            say(f"checkpoint {path.name} rejected: {fault}")
            faults.append(fault)
        elif fits:
            return path
        else:
            whole += 1
    if found and not whole:
        if other := [fault for fault in faults if fault.endswith(OTHER_MODEL)]:
            what = f"{run} holds checkpoints of another model than its config.toml describes: {other[0]}"
            raise UserError(f"{what}, or start again in another folder (--run)")
        raise UserError(f"{run}: none of the {len(found)} checkpoints is intact; start again in another folder")
    return None


def verify(path: Path, paper: Transformer | None = None) -> str | None:
    """What is wrong with a checkpoint, or None. Reads every byte (about 1 GB/s), but first looks at what is claimed:
    a file may be a link, a pipe without end, or of terabytes without content."""
    if fault := "it is a link" if path.is_symlink() else foreign(path):
        return fault
    # weights and two moments in fp32 are 12 bytes a number
    most = 2**63 if paper is None else 16 * sum(t.numel() for t in paper.state_dict().values()) + LONGEST_HEADER
    try:
        manifest = json.loads(read(path / "manifest.json"))
        tensors = {name for kind in tensor_files.KINDS for name in tensor_files.expected(manifest, kind)}
        if missing := tensors.union(["state.json"]) - set(manifest):
            return f"the manifest lacks {', '.join(sorted(missing)[:3])}"
        for name, expected in manifest.items():
            if name != Path(name).name or name in ("", ".."):
                return f"the manifest names a file elsewhere: {name[:60]!r}"
            if (size := (path / name).stat().st_size) != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if size > (most if name in tensors else SMALL):
                return f"{name} has {size:,} bytes, more than there is to keep"
            most -= size if name in tensors else 0
        if paper is not None:
            _compare(path, paper)
        for name, expected in manifest.items():
            if tensor_files.fingerprint(path / name) != expected:
                return f"{name} does not match its sha256"
        trained = read_state(path)["model"]
        if other := [key for key, has in (paper.config if paper else ()) if trained.get(key, has) != has]:
            was = ", ".join(f"model.{key} = {json.dumps(trained[key])[:60]}" for key in other)
            return f"{path} was trained with {was}; {OTHER_MODEL}"
        for kind in tensor_files.KINDS:
            tensor_files.shapes(path, kind)
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except UserError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "manifest.json is not a manifest"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """Where the run stood. UserError if that is not what `publish` writes."""
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


def _compare(path: Path, model: nn.Module, part: Part = WHOLE) -> None:
    """UserError if the tensors of a checkpoint are not those of the model, by name, shape and kind of number."""
    saved, wanted = tensor_files.shapes(path, "model"), part.shapes(model)
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
    model.load_state_dict(part.weights(tensor_files.load(path, "model")))


def load_optimizer(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    numbers: dict[str, Any],
    mine: Container[nn.Parameter] | None = None,
    part: Part = WHOLE,
    named: Iterable[tuple[str, nn.Parameter]] = (),
) -> None:
    """Give the optimizer back the state that `snapshot` took; `numbers` is the "optimizer" entry of the saved state.

    mine: the parameters that this process updates, if not all. The state of others is checked but not kept. part: see
    `load_model`. named: all parameters, if the optimizer's are not the model's.

    UserError if it was written by another kind of optimizer, or is not what that keeps for this model.
    """
    kind = type(optimizer).__name__
    if numbers["class"] != kind:
        raise UserError(f"{path} was written by {numbers['class']}, but optim.name now asks for {kind}")
    tensors = tensor_files.load(path, "optimizer")
    if not tensors:  # saved before the first update
        optimizer.state.clear()
        return
    wanted, own = optim.state_shapes(optimizer, part.counts(model)), optim.state_shapes(optimizer)
    for name, parameter in named or model.named_parameters():
        kept = {key: tensors.pop(f"{name}/{key}") for key in wanted[parameter] if f"{name}/{key}" in tensors}
        if {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in kept.items()} != wanted[parameter]:
            raise UserError(f"{path}: the moments of {name} are not those that {kind} keeps for this model")
        if mine is None or parameter in mine:
            cut = {key for key in kept if own[parameter][key] != wanted[parameter][key]}
            here = {key: part.slice(tensor) if key in cut else tensor for key, tensor in kept.items()}
            # copied: on a CPU they are the file itself, which would fill the disk after its checkpoint is deleted
            copies = {key: tensor.to(parameter.device, copy=True) for key, tensor in here.items()}
            optimizer.state[parameter] = numbers["state"].get(name, {}) | copies
    if tensors:
        raise UserError(f"{path}: {min(tensors)[:100]} among the moments belongs to no parameter")


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


def home(run: Path) -> Path:
    """A folder on the disk on which the checkpoints of a run lie, or will lie."""
    found = run / "checkpoints"
    return found if found.exists() else run


def room(run: Path) -> int:
    """Bytes free on that disk."""
    return shutil.disk_usage(home(run)).free


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
    sync(path)


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:07d}"


def _aside(run: Path, step: int) -> Path:
    return folder(run, step).with_suffix(".tmp")


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def steps(run: Path) -> list[Path]:
    """Published checkpoints, newest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if re.fullmatch("[0-9]+", path.name[5:])]
    return sorted(found, key=step_of, reverse=True)
