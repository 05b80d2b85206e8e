"""Start the processes of a test by forking them from one that has loaded torch, which takes longer than a training."""

import multiprocessing
import os
import sys
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from khanhllm.chaos.many import _forked
from khanhllm.machine import launch

LOADED = ["khanhllm.chaos.many", "khanhllm.data.prepare", "khanhllm.machine.sharded", "torch._dynamo"]


def run(trainings: Path, size: int, place: Path) -> str:
    """What `launch.Hands` returns, or raises, with so many processes that run hands.py."""
    if not hasattr(os, "fork"):
        return launch.Hands(
            [sys.executable, str(Path(__file__).with_name("hands.py")), str(trainings)], size, place
        ).run()
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(LOADED)
    ours, theirs = forks.Pipe(duplex=False)
    hands = launch.Hands([sys.executable, "-m", "hands", str(trainings)], size, place)
    launcher = forks.Process(target=_launch, args=(theirs, hands, launch.GRACE))
    launcher.start()
    theirs.close()
    name, *failed = ours.recv()
    launcher.join()
    if failed:
        raise launch.Failed(*failed)
    return name


def _launch(answer: Connection, hands: launch.Hands, grace: float) -> None:
    """Be the launcher: this process has no threads, so that others can be forked from it."""
    launch.GRACE, launch.Process = grace, partial(_forked, lambda: None)
    try:
        answer.send([hands.run()])
    except launch.Failed as error:
        answer.send(["", str(error), error.exit_code])
