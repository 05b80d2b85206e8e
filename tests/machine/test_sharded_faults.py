"""What a run in shards ends with where a process fails; that it computes the same is a promise (tests/promises)."""

import pytest
import torch

from khanhllm.machine.owners import Owners
from khanhllm.machine.sharded import Sharded
from khanhllm.schema import TrainConfig

FULL = torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize(
    ("rows", "way"),
    [
        (4, "--train.micro_batch 2 --train.accumulation 12"),
        (9, "--train.micro_batch 3 --train.accumulation 18"),
        (1, "--machine.checkpointing full"),
    ],
)
def test_a_step_without_memory_cannot_be_taken_again_by_some(rows, way):
    train = TrainConfig(micro_batch=rows, accumulation=6)
    assert (
        str(Sharded.final(Sharded, FULL, train))
        == f"out of memory with a micro-batch of {rows}; go on with --resume {way}"
    )
    assert Owners.final(Owners, FULL, train) is None  # there all begin it again


def test_other_faults_end_it_as_they_are():
    unknown, compiler = RuntimeError("?"), torch._dynamo.exc.TorchDynamoException("no compiler\nfound")
    assert Sharded.final(Sharded, unknown, TrainConfig()) is unknown
    assert str(Sharded.final(Sharded, compiler, TrainConfig())).endswith(
        "here: no compiler; take --machine.compile off"
    )
