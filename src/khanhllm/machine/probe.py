"""Measure what joins the processes that will train together, for about a second, before they do.

A pair of cards that cannot speak to each other is found here too, within seconds; NCCL would wait for ever.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Timer
from typing import NamedTuple

import torch

from khanhllm.errors import UserError
from khanhllm.machine.devices import Machine
from khanhllm.machine.group import Move
from khanhllm.units import as_size

SIZES = [2 ** (10 + 2 * power) for power in range(9)]
"""bytes that each process gives in a round, up to 64 MB. The first round opens the connections"""
LONG = 0.15
"""a round after which there is no larger one, which would take four times as long (seconds)"""
LIMIT = 30.0
"""seconds"""
HANGS = (
    f"the cards have not answered each other for {LIMIT:.0f} s. Some pairs cannot speak directly, though NCCL tries: "
    "NCCL_P2P_DISABLE=1 in the environment sends them through the host's memory; NCCL_DEBUG=INFO shows more"
)
TOO_MUCH = 0.5
"""share of a step"""


class LinkSpeed(NamedTuple):
    """What was measured."""

    processes: int
    speed: float
    """bytes a second that a process gets while it gives as many"""
    moved: int
    """bytes that a step of this run brings to the process that gets most"""

    @property
    def seconds(self) -> float:
        """Of a step, for which its processes wait for each other's tensors."""
        return self.moved / self.speed

    def describe(self) -> str:
        return (
            f"link: {as_size(self.speed)}/s between {self.processes} processes; a step moves {as_size(self.moved)}, "
            f"about {self.seconds:.2g} s"
        )

    def warning(self, step: float) -> str:
        """Of a link that takes most of a step (seconds), if it does."""
        if self.seconds <= TOO_MUCH * step:
            return ""
        return (
            f"the processes wait for their link for about {min(1, self.seconds / step):.0%} of a step of {step:.2g} s; "
            "a larger step (train.accumulation), a faster link or fewer processes would help: khanhllm plan --gpus"
        )


def link_speed(machine: Machine, moved: int) -> LinkSpeed:
    """Measure the link of all processes at once; they call this together. moved: as in LinkSpeed."""
    group, fastest = machine.group, 0.0
    with _no_longer_than(LIMIT) if group.direct else nullcontext():
        for size in SIZES:
            took = max(seconds for (seconds,) in group.exchange(_round(machine, size)))
            arrived = size + size // group.size * (group.size - 1)
            fastest = max(fastest, arrived / took)
            if took > LONG and size > SIZES[0]:
                break
    machine.give_back_memory()
    return LinkSpeed(group.size, fastest, moved)


def _round(machine: Machine, size: int) -> float:
    """What a step does: each process gives to another (as gradients to owners), and each to all others (as weights).
    Returns its time (s)."""
    group, ranks = machine.group, range(machine.group.size)
    tensors = [torch.zeros(size // group.size, dtype=torch.uint8, device=machine.device) for _ in ranks]
    given = torch.zeros(size, dtype=torch.uint8, device=machine.device)
    machine.wait()
    started = time.perf_counter()
    group.move([Move(given, rank, (rank + 1) % group.size) for rank in ranks])
    group.spread(tensors, ranks)
    machine.wait()
    return time.perf_counter() - started


@contextmanager
def _no_longer_than(limit: float) -> Iterator[None]:
    """End this process if what is in this context takes longer (s): a thread inside NCCL hears nothing, and waits for
    its card even if it is to end in order."""

    def end() -> None:
        print(UserError(HANGS), file=sys.stderr, flush=True)
        os._exit(UserError.exit_code)

    timer = Timer(limit, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
