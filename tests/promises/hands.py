"""What each process of `test_processes` runs: one training after the other, so that torch is loaded once.

Its argument is a JSON file: a list of [config, folder, resume, fault]. A fault is [rank, nth, kind]: what happens to
that process in its nth micro-batch of the training.
"""

import gc
import json
import os
import signal
import sys
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from khanhllm.errors import UserError
from khanhllm.machine import devices
from khanhllm.machine.signals import exit_code
from khanhllm.model import losses
from khanhllm.schema import Config
from khanhllm.training.run import train

HONEST = losses.micro_batch_loss


def with_fault(rank: int, nth: int, kind: str):
    """`micro_batch_loss` that meets a fault in its nth call on one process."""
    calls = count(1)

    def loss_of(*arguments):
        now = rank == int(os.environ.get("RANK", 0)) and next(calls) == nth
        if now and kind == "bytes":
            print(bytes_of_tensors(), flush=True)
        loss, nll, routing = HONEST(*arguments)
        if now and kind == "nan":
            return loss * torch.nan, nll * torch.nan, routing
        if now and kind == "memory":
            raise torch.OutOfMemoryError("out of memory")
        if now and kind != "bytes":
            os.kill(os.getpid(), getattr(signal, kind))
        return loss, nll, routing

    return loss_of


def bytes_of_tensors() -> int:
    """What all tensors of this process take."""
    gc.unfreeze()
    gc.collect()
    storages = [thing.untyped_storage() for thing in gc.get_objects() if type(thing) in (Tensor, Parameter)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def main() -> int:
    torch.set_num_threads(1)
    devices._peak = lambda _device: None
    name = ""
    for config, folder, resume, fault in json.loads(Path(sys.argv[1]).read_text()):
        losses.micro_batch_loss = with_fault(*fault) if fault else HONEST
        try:
            name = train(Config.model_validate(config), Path(folder), resume)
        except UserError as error:
            print(error, file=sys.stderr)
            return error.exit_code
    return exit_code(name)


if __name__ == "__main__":
    sys.exit(main())
