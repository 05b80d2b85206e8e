"""Who owns what, and whose turn it is."""

from types import SimpleNamespace

import pytest
import torch

from khanhllm.machine.group import ALONE, Group, opened
from khanhllm.machine.owners import Apart, Owners, dealt
from khanhllm.schema import MachineConfig


def test_parameters_are_dealt_evenly_and_each_time_alike():
    assert dealt([5, 1, 4, 4, 2], 2) == [0, 0, 1, 1, 0]
    sizes = [100, 30, 30, 30, 7, 7, 1]
    owner = dealt(sizes, 3)
    loads = [sum(size for size, whose in zip(sizes, owner, strict=True) if whose == rank) for rank in range(3)]
    assert loads == [100, 60, 45] and dealt(sizes, 3) == owner
    assert set(dealt([1, 1], 4)) == {0, 1}


@pytest.mark.parametrize("shares", [(1,), (1, 1), (3, 1), (2, 1, 1)])
@pytest.mark.parametrize("count", [1, 4, 6])
def test_each_micro_batch_of_a_step_is_one_process_s(shares, count):
    groups = [Group(rank, len(shares), shares=shares) for rank in range(len(shares))]
    assert all(sum(whose) == 1 for whose in zip(*(group.turns(count) for group in groups), strict=True))
    assert groups[0].turns(4).count(True) == round(4 * shares[0] / sum(shares))


def test_alone_is_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with opened(MachineConfig(processes=1)) as group:
        assert group is ALONE and not torch.distributed.is_initialized()
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = gradient = torch.full((3,), 4.0)
    owners = Owners([weight], ALONE)
    owners.collect()
    assert weight.grad is gradient and owners.mine == {weight}
    assert owners.gathered(state := {weight: {"step": 1}}, {}) is state


@pytest.mark.parametrize("tensor", [torch.ones(3, 3), torch.ones(5, dtype=torch.bfloat16), torch.tensor(torch.nan)])
def test_one_bit_is_enough_to_tell_weights_apart(tensor):
    said = []
    group = SimpleNamespace(alone=False, size=2, rank=0, exchange=lambda *n: said.append([*map(float, n)]) or said)
    Owners([], group).check({"a": torch.zeros(2), "b": tensor})
    for place in range(tensor.nbytes * 8):
        flipped = tensor.clone()
        flipped.view(-1).view(torch.uint8)[place // 8] ^= 1 << place % 8
        del said[1:]
        with pytest.raises(Apart, match=r"^b has other bits on process 1 than on process 0"):
            Owners([], group).check({"a": torch.zeros(2), "b": flipped})
