"""Who owns what, and whose turn it is."""

from types import SimpleNamespace

import pytest
import torch

from khanhllm.errors import UserError
from khanhllm.machine import owners
from khanhllm.machine.group import ALONE, Group, opened
from khanhllm.machine.owners import Apart, Owners, Piece, dealt, in_rounds
from khanhllm.schema import MachineConfig


def test_parameters_are_dealt_evenly_and_each_time_alike():
    assert dealt([5, 1, 4, 4, 2], 2) == [0, 0, 1, 1, 0]
    sizes = [100, 30, 30, 30, 7, 7, 1]
    owner = dealt(sizes, 3)
    loads = [sum(size for size, whose in zip(sizes, owner, strict=True) if whose == rank) for rank in range(3)]
    assert loads == [100, 60, 45] and dealt(sizes, 3) == owner
    assert set(dealt([1, 1], 4)) == {0, 1}


def test_buckets_hold_everything_once_and_no_more_than_fits(monkeypatch):
    monkeypatch.setattr(owners, "LARGEST", 8)
    sizes = [4, 4, 1, 20, 8, 1, 7]
    held = [(torch.nn.Parameter(torch.zeros(size)), nth) for nth, size in enumerate(sizes)]
    buckets = [*owners.in_buckets(held)]
    assert [one for bucket in buckets for one in bucket] == held
    assert [[sizes[nth] for _, nth in bucket] for bucket in buckets] == [[4, 4], [1], [20], [8], [1, 7]]


def test_gradients_come_in_rounds_that_hold_all_of_them_once():
    sizes = [4, 9, 1, 20, 7]
    pieces = [Piece(torch.nn.Parameter(torch.zeros(size)), range(3), nth % 2) for nth, size in enumerate(sizes)]
    rounds = in_rounds(pieces, 6)
    arrived = {piece.parameter: [] for piece in pieces}
    for spans in rounds:
        numbers = [0, 0]
        for piece, part in spans:
            arrived[piece.parameter] += range(part.start, part.stop)
            numbers[piece.owner] += part.stop - part.start
        assert 0 < max(numbers) <= 6
    assert [*arrived.values()] == [[*range(size)] for size in sizes] and len(rounds) == -(-max(12, 29) // 6)


def test_a_part_of_a_stack_belongs_to_one_of_those_that_hold_it():
    matrix, stack = (torch.nn.Parameter(torch.zeros(size)) for size in (70, 60))
    all_owners = [Owners([matrix, stack], Group(rank, 4, parts=2), {stack}) for rank in range(4)]
    plans = [[(piece.holders, piece.owner) for piece in one.pieces] for one in all_owners]
    assert all(plan == plans[0] for plan in plans)
    assert plans[0] == [(range(4), 0), (range(0, 4, 2), 2), (range(1, 4, 2), 1)]
    assert [one.mine for one in all_owners] == [{matrix}, {stack}, {stack}, set()]
    assert [Group(rank, 4, parts=2).part for rank in range(4)] == [(0, 2), (1, 2), (0, 2), (1, 2)]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_sums_run_in_the_order_of_the_ranks(rank, monkeypatch):
    """In fp32, 2^25 + 1 is 2^25: the 1 is lost in this order, and not in the other. They come in rounds."""
    parts = [torch.full((7,), number) for number in (1.0, 2.0**25, -(2.0**25))]
    monkeypatch.setattr(owners, "LARGEST", 4)
    monkeypatch.setattr(Group, "_gathered", lambda *_: [part.clone() for part in parts])
    monkeypatch.setattr(Group, "move", lambda _, moves: [parts[giver][: len(like)].clone() for like, giver, _ in moves])
    group, weight = Group(rank, 3), torch.nn.Parameter(torch.zeros(7))
    assert float(group.sum(torch.zeros(7))[0].abs().max()) == 0
    own = Owners([weight], group)
    own.pieces = [own.pieces[0]._replace(owner=rank)]
    weight.grad = parts[rank].clone()
    own.collect()
    assert float(weight.grad.abs().max()) == 0


@pytest.mark.parametrize("shares", [(1,), (1, 1), (3, 1), (2, 1, 1)])
@pytest.mark.parametrize("count", [1, 4, 6])
def test_each_micro_batch_of_a_step_is_one_process_s(shares, count):
    groups = [Group(rank, len(shares), shares=shares) for rank in range(len(shares))]
    assert all(sum(whose) == 1 for whose in zip(*(group.turns(count) for group in groups), strict=True))
    assert groups[0].turns(4).count(True) == round(4 * shares[0] / sum(shares))


def test_alone_is_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    apart = MachineConfig(expert_processes=2)
    with opened(MachineConfig(processes=1)) as group:
        assert group is ALONE and not torch.distributed.is_initialized()
    with pytest.raises(UserError, match="2 must divide the number of processes, 1 "), opened(apart):
        pass
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = gradient = torch.full((3,), 4.0)
    own = Owners([weight], ALONE)
    own.collect()
    assert weight.grad is gradient and own.mine == {weight}
    assert own.gathered(state := {weight: {"step": 1}}, {}) is state


@pytest.mark.parametrize("tensor", [torch.ones(3, 3), torch.ones(5, dtype=torch.bfloat16), torch.tensor(torch.nan)])
def test_one_bit_is_enough_to_tell_weights_apart(tensor):
    said = []
    group = SimpleNamespace(
        alone=False, size=2, rank=0, parts=1, holders=range, exchange=lambda *n: said.append([*map(float, n)]) or said
    )
    Owners([], group).check({"a": torch.zeros(2), "b": tensor})
    for place in range(tensor.nbytes * 8):
        flipped = tensor.clone()
        flipped.view(-1).view(torch.uint8)[place // 8] ^= 1 << place % 8
        del said[1:]
        with pytest.raises(Apart, match=r"^b has other bits on process 1 than on process 0"):
            Owners([], group).check({"a": torch.zeros(2), "b": flipped})
