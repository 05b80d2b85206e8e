"""`python -m khanhllm.chaos.faulty KIND NUMBERS ...` does what `khanhllm ...` does, with faults in the arithmetic."""

import json
import os
import runpy
import sys
from collections.abc import Container
from itertools import count
from typing import Any

import torch

from khanhllm.model import losses


def meet(kind: str, numbers: Container[int]) -> None:
    """Let the training of this process meet "NaN" or "memory" in these micro-batches. They are numbered through all
    steps and processes, of which each has one micro-batch of a step."""
    honest = losses.micro_batch_loss
    own = count(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    def loss_of(*arguments: Any) -> Any:
        loss, nll, routing_L = honest(*arguments)
        if next(own) not in numbers:
            return loss, nll, routing_L
        if kind == "memory":
            raise torch.OutOfMemoryError("a fault of chaos")
        return loss * torch.nan, nll * torch.nan, routing_L

    losses.micro_batch_loss = loss_of  # type: ignore[assignment]


if __name__ == "__main__":
    _, fault, micro_batches, *words = sys.argv
    meet(fault, json.loads(micro_batches))
    sys.argv = ["khanhllm", *words]
    runpy.run_module("khanhllm", run_name="__main__", alter_sys=True)
