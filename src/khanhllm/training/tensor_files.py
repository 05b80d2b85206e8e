"""The files of a checkpoint that hold tensors: one of the weights and one of the moments, or, where several processes
wrote it, so many of each. These bear the names that transformers gives to the files of a large model:

    model-00001-of-00004.safetensors  optimizer-00001-of-00004.safetensors  model-00002-of-00004.safetensors  ...

No tensor is cut, so a reader needs to know neither who wrote which nor how many there were.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from khanhllm.errors import UserError
from khanhllm.files import read, sha256_of, sync

KINDS = ("model", "optimizer")
"""weights and moments"""
LONGEST_HEADER = 2**24
"""no model of ours needs a longer list of its tensors (bytes)"""
Fingerprint = Mapping[str, int | str]


def name(kind: str, nth: int = 0, of: int = 1) -> str:
    """Of the file that the nth of so many processes writes."""
    return f"{kind}-{nth + 1:05}-of-{of:05}.safetensors" if of > 1 else f"{kind}.safetensors"


def expected(names: Iterable[str], kind: str) -> list[str]:
    """The files of a kind that belong to a checkpoint which has these; one of several may be missing among them."""
    numbered = re.compile(rf"{kind}-[0-9]{{5}}-of-([0-9]{{5}})\.safetensors")
    of = max((int(match[1]) for match in map(numbered.fullmatch, names) if match), default=1)
    return [name(kind, nth, of) for nth in range(max(of, 1))]


def load(checkpoint: Path, kind: str) -> dict[str, Tensor]:
    """All tensors of a kind, mapped: what nobody looks at is not read."""
    return {key: tensor for path in _paths(checkpoint, kind) for key, tensor in load_file(path).items()}


def shapes(checkpoint: Path, kind: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor of a kind, from the headers of the files alone. UserError if one is no safetensors
    file, or if two hold the same tensor."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in _paths(checkpoint, kind):
        there = _shapes(path)
        if twice := found.keys() & there.keys():
            raise UserError(f"{path}: another file of the checkpoint holds {min(twice)[:100]} too")
        found |= there
    return found


def save(tensors: dict[str, Tensor], path: Path) -> Fingerprint:
    """Write a file, force it to disk and read it back. What the manifest will say of it. Raises OSError."""
    try:
        save_file(tensors, path)
        sync(path)
        with safe_open(path, framework="pt") as there:
            for key, tensor in tensors.items():
                if not np.array_equal(_bytes(there.get_tensor(key)), _bytes(tensor.cpu())):
                    raise OSError(f"{path} reads back differently from what was written ({key}); is the disk sound?")
    except (SafetensorError, RuntimeError) as error:  # torch says the latter where it cannot map a file
        raise OSError(str(error)) from None
    return fingerprint(path)


def fingerprint(path: Path) -> Fingerprint:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def identity(checkpoint: Path) -> str:
    """A hash by which others may name the weights: that of their file, or of the hashes of their files. Raises what
    a manifest that is none raises."""
    manifest = json.loads(read(checkpoint / "manifest.json"))
    found = [str(manifest[file]["sha256"]) for file in expected(manifest, "model")]
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def _paths(checkpoint: Path, kind: str) -> list[Path]:
    return [checkpoint / file for file in expected(json.loads(read(checkpoint / "manifest.json")), kind)]


def _shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER:
            raise UserError(f"{path} is no safetensors file of ours: it claims a header of {length:,} bytes")
        with safe_open(path, "pt") as tensors:
            parts = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118  no mapping
            return {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in parts.items()}
    except (SafetensorError, RuntimeError) as error:  # the latter if there is no room to map it
        raise UserError(f"{path} is no safetensors file: {str(error)[:200]}") from None


def _bytes(tensor: Tensor) -> np.ndarray:
    """For NumPy, whose comparison stays on one thread. A parallel operation of torch would give the saver's thread a
    team of OpenMP threads of its own; libgomp then counts more threads than cores, makes all of them sleep between
    operations instead of spin, and a small model's steps take twice as long from the first save on."""
    return tensor.flatten().view(torch.uint8).numpy()
