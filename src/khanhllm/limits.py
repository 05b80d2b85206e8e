"""What this process may use of the machine: cores and memory. Inside a container that is less than the machine has.

On Linux a container, a service or a job of a cluster is a control group, and groups are nested: each may have limits of
its own, and the smallest counts. Version 2 has one tree for all limits, version 1 one for each kind. A container may
see its own group as the root of a tree, so each group between its path and the root is asked, where it exists.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from math import ceil
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path("/")
"""where /proc and /sys lie"""


class Memory(NamedTuple):
    """Main memory that this process may use (bytes)."""

    free: int
    """what it may still take; file caches count as free, since the system gives them up"""
    total: int


def cores() -> int:
    """Cores that this process may use, by its affinity and the quotas of its groups (rounded up)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [ceil(quota / period) for quota, period in _quotas() if quota > 0 and period > 0]
    return max(1, min([count, *quotas]))


def memory() -> Memory:
    """Main memory of the machine, or of the groups that this process is in. Raises what psutil raises."""
    machine = psutil.virtual_memory()
    free, total = machine.available, machine.total
    for limit, used in _memory_limits():
        free, total = min(free, max(0, limit - used)), min(total, limit)
    return Memory(free, total)


def open_files(number: int) -> None:
    """Let this process open so many files at once, as far as the system lets it: macOS begins with 256."""
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= soft < number:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(number, hard) if hard >= 0 else number, hard))


def _quotas() -> Iterator[tuple[int, int]]:
    """(time, period) of each group: its processes together may compute for `time` in each period."""
    for group in _groups(""):
        yield _numbers(_text(group / "cpu.max"))  # "max 100000" or "50000 100000"
    for group in _groups("cpu"):
        time, period = (_numbers(_text(group / f"cpu.cfs_{name}_us"))[0] for name in ("quota", "period"))
        yield time, period


def _memory_limits() -> Iterator[tuple[int, int]]:
    """(limit, memory in use but for file caches) of each group that has a limit, in bytes."""
    second = ("", "memory.max", "memory.current", ("active_file", "inactive_file"))
    first = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
    for controller, limit_name, used_name, caches in (second, first):
        for group in _groups(controller):
            limit, used = (_numbers(_text(group / name))[0] for name in (limit_name, used_name))
            lines = [line.partition(" ") for line in _text(group / "memory.stat").splitlines()]
            cached = sum(max(0, _numbers(size)[0]) for name, _, size in lines if name in caches)
            if limit >= 0:
                yield limit, max(0, used - cached)


def _groups(controller: str) -> Iterator[Path]:
    """The folders of this process's groups in the tree of a controller, "" for version 2, from the inside out; some
    may not exist."""
    mounts = ROOT / "sys/fs/cgroup"
    for line in _text(ROOT / "proc/self/cgroup").splitlines():  # "0::/user.slice/job" or "4:cpu,cpuacct:/docker/abc"
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controller not in controllers.split(","):
            continue
        roots = [mounts / controllers, mounts / controller] if controller else [mounts, mounts / "unified"]
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for root in roots:
            yield from (root.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1))


def _numbers(text: str) -> tuple[int, int]:
    """The first two numbers of a text; -1 for a word ("max"), and for what is not there."""
    first, second = (int(word) if word.isdecimal() else -1 for word in [*text.split(), "", ""][:2])
    return first, second


def _text(path: Path) -> str:
    """What a file holds; nothing if it is missing or cannot be read, as on other systems."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
