"""Faults of a checkpoint: a changed byte on the disk, a kill or a full disk in the middle of a save."""

import random
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from khanhllm.chaos.arena import Arena, processes
from khanhllm.data.batches import random_batches
from khanhllm.machine.devices import open_machine
from khanhllm.schema import Config
from khanhllm.training import checkpoint
from khanhllm.training.step import Learner, train_step

CALLS = ("openat", "write", "fsync", "rename", "renameat", "renameat2", "mkdir", "unlink", "unlinkat", "rmdir")
"""system calls by which a save changes the disk"""
BOTH = ["step-0000001", "step-0000002"]
"""either may be the newest, once the second is published"""


def flipped(arena: Arena, chance: random.Random) -> Iterator[str]:
    """Change, cut off or zero bytes of a checkpoint, or remove or swap a file: `verify` must find the damage."""
    run = arena.folder()
    shutil.copytree(arena.undisturbed[0], run)
    whole = checkpoint.newest(run)
    assert whole
    files = sorted(whole.iterdir())
    damages = [_flip, _flip, _flip, _flip, _cut, _zero, _remove, _swap]
    while True:
        path = chance.choice(files)
        before = path.read_bytes()
        damage = chance.choice(damages)
        damage(path, before, chance, files)
        changed = not path.exists() or path.read_bytes() != before
        fault = checkpoint.verify(whole)
        path.write_bytes(before)
        clean = checkpoint.verify(whole)
        missed = f"{damage.__name__.strip('_')} of {path.name} was not found" if changed and not fault else ""
        yield missed or (f"false alarm: {clean}" if clean else "")


def _flip(path: Path, before: bytes, chance: random.Random, files: list[Path]) -> None:
    at = chance.randrange(len(before))
    path.write_bytes(before[:at] + bytes([before[at] ^ 1 << chance.randrange(8)]) + before[at + 1 :])


def _cut(path: Path, before: bytes, chance: random.Random, files: list[Path]) -> None:
    path.write_bytes(before[: chance.choice([0, 1, len(before) // 2, len(before) - 1])])


def _zero(path: Path, before: bytes, chance: random.Random, files: list[Path]) -> None:
    at = chance.randrange(len(before))
    path.write_bytes(before[:at] + bytes(len(before[at : at + 512])) + before[at + 512 :])


def _remove(path: Path, before: bytes, chance: random.Random, files: list[Path]) -> None:
    path.unlink()


def _swap(path: Path, before: bytes, chance: random.Random, files: list[Path]) -> None:
    path.write_bytes(chance.choice([other for other in files if other != path]).read_bytes())


def cut_short(arena: Arena, chance: random.Random) -> Iterator[str]:
    """Kill a save, or make a system call of it fail as on a full disk, at each of its system calls in turn.

    Needs strace. Afterwards the old or the new checkpoint must be whole, and the next save must succeed.
    """
    boundaries = [
        (fault, call, number)
        for call, times in _calls(arena).items()
        for number in range(1, times + 1)
        for fault in ("signal=SIGKILL", "error=ENOSPC")
    ]
    chance.shuffle(boundaries)
    for fault, call, number in boundaries:
        folder = arena.folder()
        folder.mkdir()
        code = traced_save(arena.config(), folder, f"--inject={call}:{fault}:when={number}")
        newest = checkpoint.newest(folder)
        where = f"{fault} at {call} number {number}"
        good = {0: BOTH[1:], 3: BOTH, -9: BOTH}.get(code or 0, [])
        if newest is None or newest.name not in good:
            yield f"{where}: the save ended with {code} and left {newest and newest.name}"
        else:
            model, optimizer = _trained(arena.config())
            checkpoint.write(folder, checkpoint.snapshot(3, model, optimizer, {}))
            left = sorted(path.name for path in (folder / "checkpoints").iterdir())
            fine = checkpoint.verify(folder / "checkpoints" / "step-0000003") is None
            yield "" if fine and not any("tmp" in name for name in left) else f"{where}: the next save left {left}"
        shutil.rmtree(folder)


def boundaries(arena: Arena) -> int:
    """How many faults `cut_short` has in all; 0 where there is no strace."""
    return 2 * sum(_calls(arena).values()) if shutil.which("strace") else 0


@cache
def _calls(arena: Arena) -> Counter[str]:
    """How often a save makes each of CALLS."""
    folder = arena.folder()
    folder.mkdir()
    trace = folder / "trace.txt"
    traced_save(arena.config(), folder, f"--trace={','.join(CALLS)}", f"--output={trace}")
    return Counter(re.findall(r"^(?:\d+ +)?(\w+)\(", trace.read_text(), re.MULTILINE))


def traced_save(config: Config, folder: Path, *options: str) -> int | None:
    """Save step 1 undisturbed, then step 2 under strace. Returns the exit code of that process, 3 for an OSError."""
    ours, theirs = processes.Pipe()
    process = processes.Process(target=_save_twice, args=(config, folder, theirs))
    process.start()
    ours.recv()
    tracer = subprocess.Popen(
        ["strace", "--follow-forks", f"--attach={process.pid}", *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert tracer.stderr
    for line in tracer.stderr:
        if "attached" in line:
            break
    ours.send("continue")
    process.join(60)
    tracer.communicate()
    return process.exitcode


def _save_twice(config: Config, folder: Path, connection: Connection) -> None:
    model, optimizer = _trained(config)
    checkpoint.write(folder, checkpoint.snapshot(1, model, optimizer, {}))
    second = checkpoint.snapshot(2, model, optimizer, {})
    connection.send("ready")
    connection.recv()
    try:
        checkpoint.write(folder, second)
    except OSError:
        raise SystemExit(3) from None


def _trained(config: Config) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    learner = Learner.new(config, open_machine(config.machine))
    train_step(learner, learner.start(), random_batches(config, learner.machine.device))
    return learner.model, learner.optimizer
