"""What each process of `test_processes` and `test_process_laws` runs: one training after the other, so that torch is
loaded once.

Its argument is a JSON file: a list of [config, folder, resume, fault, more]. A fault is [rank, nths, kind]: what
happens to that process in its nth micro-batches of the training; a signal may come so many collectives later. More may
say that only some of those started train: how many ("size"), beginning with which ("first"). Also that the training
fails ("fails"), that it ends before its first update, with the gradients in the folder ("gradients"), or how much
memory each process has ("room"). And that each process writes its part of a checkpoint ("shared"), that the disk of one
of them is full in the saves of some steps ("full": [rank, steps]), or that the first is killed before it publishes that
of a step ("killed"). And that a process can read no more than so many rows ("unread": [rank, rows]).
"""

import errno
import gc
import json
import os
import signal
import sys
import time
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from khanhllm import optim
from khanhllm.data.shards import Shards
from khanhllm.errors import UserError
from khanhllm.machine import devices, group, owners, probe
from khanhllm.machine.signals import exit_code
from khanhllm.model import losses
from khanhllm.planning import budget
from khanhllm.schema import Config
from khanhllm.training import checkpoint, saver, step, tensor_files
from khanhllm.training.run import train

HONEST = losses.micro_batch_loss
SHARED_FROM, SAVE_FILE, PUBLISH = saver.SHARED_FROM, tensor_files.save_file, checkpoint.publish
ROWS_FROM = Shards.rows_from
HERE, INITIAL, GATHERED = budget.here, step.initial_model, group.Group._gathered


def with_fault(rank: int, nths: int | list[int], kind: str, later: int = 0):
    """`micro_batch_loss` that meets a fault in some of its calls on one process."""
    calls, numbers = count(1), [nths] if isinstance(nths, int) else nths

    def loss_of(*arguments):
        faulty = rank == int(os.environ.get("RANK", 0)) and next(calls) in numbers
        if faulty and kind == "flip":
            for tensor in arguments[0].state_dict().values():
                tensor.data.view(-1)[0] += 1
        if faulty and kind == "bytes":
            print(min(bytes_of_tensors() for _ in range(10)), flush=True)
        loss, nll, routing = HONEST(*arguments)
        if faulty and kind == "nan":
            return loss * torch.nan, nll * torch.nan, routing
        if faulty and kind == "spike":
            return loss * 30, nll * 30, routing
        if faulty and kind == "memory":
            raise torch.OutOfMemoryError("out of memory")
        if faulty and kind.startswith("SIG"):
            send_signal(getattr(signal, kind), later)
        return loss, nll, routing

    return loss_of


def send_signal(number: int, later: int) -> None:
    """To this process, in its collective after so many others."""
    if not later:
        os.kill(os.getpid(), number)
    calls = count(1)

    def gathered(*arguments):
        if next(calls) == later:
            os.kill(os.getpid(), number)
        return GATHERED(*arguments)

    group.Group._gathered = gathered


def write_gradients(model, folder: Path):
    """An optimizer that writes the gradients which this process would apply, and ends the training."""

    def write():
        own = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        save_file(own, folder / f"{os.environ['RANK']}.safetensors")
        raise UserError("enough")

    return SimpleNamespace(param_groups=[], state={}, step=write, zero_grad=lambda set_to_none: None)


def prepare(job: int, folder: Path, rank: int, size: int, gradients: bool, room: list[int]) -> None:
    """Let this process be one of so many in its next training."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    if store := os.environ.get(group.STORE):
        os.environ[group.STORE] = str(Path(store).with_name(f"store-{job}"))
        group.OPENED = count()  # those that sat out have opened fewer
    devices._peak_resident = lambda: (rank + 1) * 10**9
    step.optim, step.initial_model, budget.here, group.Group._gathered = optim, INITIAL, HERE, GATHERED
    if room:
        budget.here = lambda machine: replace(HERE(machine), process=0, memory=room[rank])
    if gradients:
        folder.mkdir(exist_ok=True)
        step.optim = SimpleNamespace(**vars(optim) | {"build": lambda model, *_: write_gradients(model, folder)})
        step.initial_model = lambda config: INITIAL(config).double()


def prepare_saves(rank: int, shared: bool = False, full=(0, ()), killed: int = 0, **_) -> None:
    """How this process writes its checkpoints, and what it meets."""

    def save_file(tensors, path):
        if rank == full[0] and any(f"step-{nth:07}" in str(path) for nth in full[1]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        SAVE_FILE(tensors, path)

    def publish(run, part, files):
        if part.step == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return PUBLISH(run, part, files)

    saver.SHARED_FROM = 0 if shared else SHARED_FROM
    tensor_files.save_file, checkpoint.publish = save_file, publish


def prepare_rows(rank: int, unread=(0, None), **_) -> None:
    """How many rows this process can read until its disk fails."""

    def rows_from(*arguments):
        yield from islice(ROWS_FROM(*arguments), unread[1])
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    Shards.rows_from = rows_from if rank == unread[0] and unread[1] is not None else ROWS_FROM


def bytes_of_tensors() -> int:
    """What all tensors of this process take. A thread of gloo may hold what it sent a moment longer."""
    time.sleep(0.01)
    gc.unfreeze()
    gc.collect()
    storages = [thing.untyped_storage() for thing in gc.get_objects() if type(thing) in (Tensor, Parameter)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def main() -> int:
    torch.set_num_threads(1)
    devices._peak = lambda _device: None
    probe.SIZES = probe.SIZES[:1]  # else each training measures its link for a second
    owners.LARGEST = 3000  # so that small models have many buckets, as large ones do
    name, place, started = "", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for job, (config, folder, resume, fault, more) in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        size, rank = more.get("size", started), place - more.get("first", 0)
        if not 0 <= rank < size:
            continue
        prepare(job, Path(folder), rank, size, more.get("gradients", False), more.get("room", []))
        prepare_saves(rank, **more)
        prepare_rows(rank, **more)
        losses.micro_batch_loss = with_fault(*fault) if fault else HONEST
        try:
            name = train(Config.model_validate(config), Path(folder), resume)
        except UserError as error:
            if "fails" not in more:
                print(error, file=sys.stderr)
                return error.exit_code
            Path(f"{folder}-{rank}.txt").write_text(f"{error.exit_code} {error}")
    return exit_code(name)


if __name__ == "__main__":
    sys.exit(main())
