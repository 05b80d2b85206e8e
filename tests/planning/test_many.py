"""A plan for several cards: bytes are those that a group really moves, and the advice follows from the numbers."""

import dataclasses
import json

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import exit_code, plain_machine, tiny
from khanhllm import cli
from khanhllm.data.batches import random_batches
from khanhllm.errors import UserError
from khanhllm.lab import measure
from khanhllm.machine import owners
from khanhllm.machine.group import Group
from khanhllm.model.counts import on_paper
from khanhllm.planning import assumed, budget, many, ways
from khanhllm.planning import plan as one_card
from khanhllm.planning.budget import Hardware
from khanhllm.planning.simulation import simulate_step
from khanhllm.planning.ways import Traffic, by_experts, by_owners, by_shards
from khanhllm.settings import nested, preset, resolve
from khanhllm.training.step import Learner, train_step

KINDS = {
    "adamw": {"optim": {"name": "adamw"}},
    "adamw8bit": {"optim": {"name": "adamw8bit"}, "model": {"dim": 64, "hidden": 128}},
    "muon": {"optim": {"name": "muon"}},
    "muon8bit": {"optim": {"name": "muon8bit"}, "model": {"dim": 64, "hidden": 128}},
    "bf16": {"machine": {"weights": "bf16"}},
    "bf16 gradients": {"machine": {"weights": "bf16", "gradients": "bf16"}},
}


@pytest.fixture(autouse=True)
def micro_batches_of_two_rows(monkeypatch):
    """As otherwise all rows of a tiny model fit into one."""
    monkeypatch.setitem(budget.ENOUGH, "cuda", 2 * tiny().model.context)


CARD = Hardware("test card", "cuda", "bf16", memory=10**10, process=0, peak_flops=1e9)


def config_of(kind="muon", **train):
    return resolve(tiny().model_dump(), KINDS[kind], {"train": {"micro_batch": 2, "accumulation": 4, **train}})


class Counting(Group):
    """One of several processes, which counts the bytes that arrive: of gradients and weights, and of all else."""

    def move(self, moves):
        came = [torch.zeros_like(move.tensor) if move.taker == self.rank else None for move in moves]
        self.counted[0] += sum(tensor.nbytes for tensor in came if tensor is not None)
        return came

    def spread(self, tensors, givers):
        pairs = zip(tensors, givers, strict=True)
        self.counted[0] += sum(tensor.nbytes for tensor, giver in pairs if giver != self.rank)

    def swap(self, rows, sent, came):
        return rows

    def exchange(self, *numbers):
        self.counted[1] += 8 * len(numbers) * (self.size - 1)
        return [numbers] * self.size

    def sum(self, *tensors):
        self.counted[1] += sum(tensor.nbytes for tensor in tensors) * (self.size - 1)
        return list(tensors)


class CountingShards(Counting):
    """The same where all lies in shards; its sums are of gradients, and a little else."""

    def unite(self, whole, part, later=False):
        whole.view(self.size, -1).copy_(part.view(1, -1).expand(self.size, -1))
        self.counted[0] += whole.nbytes - part.nbytes

    def swap(self, rows, sent, came):
        self.counted[0] += (sum(came) - came[self.rank]) * rows.element_size()
        return rows.new_zeros(sum(came), *rows.shape[1:])

    def sum(self, *tensors):
        self.counted[0] += sum(tensor.nbytes for tensor in tensors) * (self.size - 1)
        return list(tensors)


def counted(config, rank, size, kind=Counting, precision="fp32"):
    group = kind(rank, size, shares=(1,) * size, parts=config.machine.expert_processes)
    object.__setattr__(group, "counted", [0, 0])
    precision = "bf16" if config.machine.weights == "bf16" else precision
    learner = Learner.new(config, dataclasses.replace(plain_machine(), precision=precision, group=group))
    group.counted[:] = 0, 0  # a shard is tried before the first step
    train_step(learner, learner.start(), random_batches(config, learner.machine.device))
    return group.counted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3])
def test_a_step_moves_the_bytes_that_the_plan_says(kind, size):
    config = config_of(kind)
    large, small = zip(*(counted(config, rank, size) for rank in range(size)), strict=True)
    assert by_owners(config, "fp32", size).traffic == Traffic(step=max(large))
    assert max(small) < 0.03 * max(large)  # norms, losses, loads


def test_two_cards_move_the_half_of_all_gradients_and_weights():
    numbers = sum(item.numbers for item in ways.items(config_of()))
    assert by_owners(config_of(), "fp32", 2).traffic.step == pytest.approx(8 * numbers / 2, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_on_paper_are_those_of_the_simulated_step(kind):
    config, shared = config_of(kind), 2 * 256 * 4
    step = simulate_step(config, "bf16", "cpu", update=False)
    known = ways.items(config)
    assert sum(item.gradients for item in known) == step.gradients
    assert sum(item.moments for item in known) == step.optimizer - (shared if "8bit" in config.optim.name else 0)
    buffers = step.weights - sum(item.weights for item in known)
    assert 0 <= buffers < 0.1 * step.weights


def test_a_part_of_the_moments_or_of_all_is_held():
    owners, shards, experts = (way(config_of(), "fp32", 4) for way in (by_owners, by_shards, by_experts))
    assert owners.weights == owners.gradients == 1 and 1 / 4 <= owners.moments < 0.4
    assert shards.weights == pytest.approx(1 / 4, rel=0.2) and shards.gradients < 0.4
    assert 1 / 4 < experts.weights < 1


class NobodySends(TorchDispatchMode):
    """Within it no collective of torch.distributed may be called."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "c10d" not in func.namespace, func
        return func(*args, **(kwargs or {}))


def counted_in_shards(config, rank, size, precision):
    """What arrives in a step, and what with each micro-batch. All of it comes through the group: FSDP itself sends
    nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        with NobodySends():
            steps = [resolve(config.model_dump(), {"train": {"accumulation": turns * size}}) for turns in (1, 2)]
            one, two = (counted(step, rank, size, CountingShards, precision)[0] for step in steps)
    finally:
        dist.destroy_process_group()
    return 2 * one - two, two - one


TABLES = {"value_embedding": True, "pair_embedding": 50, "vocab_size": 301}


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize(("precision", "model"), [("bf16", {}), ("fp32", TABLES)], ids=["bf16", "tables"])
def test_shards_move_the_bytes_that_the_plan_says(precision, model, size):
    """Also where there are fewer experts (4) than processes, and rows that cannot be shared out evenly."""
    config = resolve(config_of().model_dump(), {"model": model, "machine": {"split": "all"}})
    steps, micro_batches = zip(*(counted_in_shards(config, rank, size, precision) for rank in range(size)), strict=True)
    traffic = by_shards(config, precision, size).traffic
    assert {traffic.micro_batch} == {*micro_batches}
    assert traffic.step == pytest.approx(max(steps), rel=0.01)  # norms, losses and loads come too
    assert by_owners(config, precision, size).traffic.micro_batch == 0


def test_shards_move_weights_twice_and_gradients_once_a_micro_batch():
    """But for tables, whose weights the backward pass does not need."""
    known = [item for item in ways.items(config_of()) if item.matrix]
    numbers, tables = (sum(item.numbers for item in known if kind in item.part) for kind in ("", "embedding"))
    assert by_shards(config_of(), "fp32", 2).traffic.micro_batch == (12 * numbers - 4 * tables) // 2
    assert by_shards(config_of(), "bf16", 2).traffic.micro_batch < (12 * numbers - 4 * tables) // 2


def test_what_a_card_needs_beside_its_part(monkeypatch):
    """Of shards: the two largest parts of the model together, and the gradients of one. Of owners: what arrives."""
    parts = [sum(p.numel() for p in part.parameters() if p.dim() > 1) for part in on_paper(tiny().model).parts()]
    *_, second, largest = sorted(parts)
    assert by_shards(config_of(), "fp32", 2).beside == pytest.approx(4 * (2 * largest + second), rel=0.01)
    numbers = [item.numbers for item in ways.items(config_of())]
    assert by_owners(config_of(), "fp32", 2).after == pytest.approx(4 * sum(numbers) / 2, rel=0.01)
    monkeypatch.setattr(ways, "LARGEST", 1000)
    assert [by_owners(config_of(), "fp32", size).after for size in (2, 3, 60)] == [4000] * 3


@pytest.mark.parametrize("size", [2, 3, 5])
def test_an_owner_never_holds_more_of_the_others_gradients_than_the_plan_says(size, monkeypatch):
    """However many there are: they come in rounds, each of which is added before the next one comes."""
    for module in (owners, ways):
        monkeypatch.setattr(module, "LARGEST", 12_000)
    rounds = []

    class Rounds(Counting):
        def move(self, moves):
            before = self.counted[0]
            came = super().move(moves)
            rounds.append(self.counted[0] - before)
            return came

    counted(config_of(), 0, size, Rounds)
    assert max(rounds) == by_owners(config_of(), "fp32", size).after == 4 * 12_000 and len(rounds) > 2


def test_a_run_is_planned_in_the_way_that_it_takes():
    machines = ({}, {"split": "all"}, {"expert_processes": 2})
    found = [ways.chosen(resolve(config_of().model_dump(), {"machine": one}), "fp32", 4).name for one in machines]
    assert found == ["owners (the default)", "machine.split all", "machine.expert_processes 2"]


def test_a_step_takes_as_long_as_the_card_that_has_most_micro_batches():
    row = many.row(config_of(accumulation=4), CARD, by_owners, 3, assumed.link("1 GB/s"))
    assert (row.accumulation, row.turns) == (4, 2)


@pytest.mark.parametrize("size", [2, 4])
def test_experts_apart_move_the_bytes_that_the_plan_says(size):
    """Where the others send what this one sends."""
    config = resolve(config_of().model_dump(), {"machine": {"expert_processes": 2}})
    most = max(counted(config, rank, size)[0] for rank in range(size))
    assert by_experts(config, "fp32", size).traffic.step == pytest.approx(most, rel=0.1)


def test_copies_of_experts_share_their_moments():
    two, four = ({"machine": {"expert_processes": parts}} for parts in (2, 4))
    ways_of = [by_experts(resolve(config_of().model_dump(), parts), "fp32", 4) for parts in (two, four)]
    assert ways_of[0].moments == ways_of[1].moments and ways_of[0].weights > ways_of[1].weights


def test_rows_travel_to_experts_and_back():
    config, shape = config_of(), tiny().model
    pairs = 2 * shape.context * shape.experts_per_token * len(shape.moe_layers)
    assert by_experts(config, "fp32", 2).traffic.micro_batch == pairs * 4 * (shape.dim * 4 + 2) // 2
    rebuilt = resolve(config.model_dump(), {"machine": {"checkpointing": "full"}})
    times = by_experts(rebuilt, "fp32", 2).traffic.micro_batch / by_experts(config, "fp32", 2).traffic.micro_batch
    assert times == pytest.approx(1.5)


def test_the_time_of_a_step():
    assert many.step_seconds(0.5, 0.1, 4, Traffic(), speed=1) == pytest.approx(2.1)
    assert many.step_seconds(0.5, 0.1, 4, Traffic(step=300), speed=100) == pytest.approx(5.1)
    assert many.step_seconds(0.5, 0.0, 4, Traffic(0, 100, hidden=0.5), speed=100) == pytest.approx(4 * (0.5 + 0.75))
    assert many.step_seconds(5.0, 0.0, 4, Traffic(0, 100, hidden=0.5), speed=100) == 20


@pytest.mark.parametrize(
    ("given", "gigabytes"),
    [
        ("PCIe 4 x8", 6.3),
        ("pcie4x8", 6.3),
        ("PCI-E gen 4.0 x8", 6.3),
        ("PCIe Gen4 x16", 12.6),
        ("PCIe 3.0 x4", 1.6),
        ("PCIe 5 x16", 25.2),
        ("nvlink", 369),
        ("1gbe", 0.11),
        ("2.5 GbE", 0.28),
        ("10 GbE", 1.1),
        ("25GbE", 2.8),
        ("100 gbe", 11),
        ("400 Gb InfiniBand", 45),
        ("6 GB/s", 6),
        ("850 MB/s", 0.85),
        ("10 Gb/s", 1.25),
        ("10 Gbit/s", 1.25),
    ],
)
def test_links_by_the_names_that_people_type(given, gigabytes):
    assert assumed.link(given).speed / 1e9 == pytest.approx(gigabytes, rel=0.03)


@pytest.mark.parametrize("given", ["", "PCIe 9 x8", "1.0 GbE cable", "0 GB/s", "6 gb/s", "9" * 500, "-6 GB/s", "GbE"])
def test_a_link_that_is_not_known_lists_those_that_are(given):
    with pytest.raises(UserError, match=r"^--link: .* is not known; known are PCIe 3 x4, .*, 400 Gb InfiniBand, or a"):
        assumed.link(given)


def plan(config, cards, link, hardware=CARD, **more):
    return many.plan(config, hardware, cards, assumed.link(link), **more)


def test_over_a_fast_link_two_pay_and_over_a_slow_one_never():
    fast, slow = (plan(config_of(), 2, link) for link in ("1 GB/s", "1 MB/s"))
    assert fast["efficiency"][2] > 0.9
    assert fast["advice"] == ["2 cards pay over 1 GB/s: a step is 2.0 times as fast as on one"]
    assert slow["advice"][0] == "never over 1 MB/s: 2 cards are no faster than one"
    assert "MB/s on or with" in slow["advice"][-1] and "--train.accumulation" in slow["advice"][-1]


def test_the_remedies_are_enough():
    config = config_of(micro_batch=2, accumulation=64)
    slow = plan(config, 4, "1 MB/s")
    assert 0.01 < slow["efficiency"][4] < 0.8
    speed, larger = slow["advice"][-1].split(" or with ")
    needed = float(speed.split("from ")[1].removesuffix(" MB/s on"))
    assert plan(config, 4, f"{needed * 1.06:.4f} MB/s")["efficiency"][4] >= 0.8
    steps = int(larger.split("accumulation ")[1].split(")")[0])
    assert plan(config_of(micro_batch=2, accumulation=steps), 4, "1 MB/s")["efficiency"][4] >= 0.8


def test_the_speed_that_is_advised_counts_what_arrives_unnoticed():
    traffic = Traffic(step=10**8, micro_batch=4 * 10**8, hidden=0.5)
    several = many.Row("shards", 4, 0, 2, 64, flops=1000, update=100, part=0.25, traffic=traffic, speed=1.0)
    single = dataclasses.replace(several, cards=1, traffic=Traffic())
    (remedy, *_) = many._remedies(config_of(), several, single, pace=1000)
    advised = float(remedy.removeprefix("from ").removesuffix(" MB/s on")) * 1e6
    enough, short = (dataclasses.replace(several, speed=advised * share) for share in (1.01, 0.99))
    assert enough.efficiency(1000, single) >= many.WELL > short.efficiency(1000, single)


def test_fewer_cards_are_advised_where_many_wait():
    report = plan(config_of(micro_batch=2, accumulation=64), 64, "4 MB/s")
    shares = report["efficiency"]
    assert [*shares] == [2, 4, 8, 16, 32, 64] and [*shares.values()] == sorted(shares.values(), reverse=True)
    well = max(cards for cards, share in shares.items() if share >= 0.8)
    some = max(cards for cards, share in shares.items() if share >= 0.5)
    assert well < some < 64 and f"use {well} to {some} of these" in report["advice"]


def test_more_cards_than_micro_batches_or_rows_are_told():
    few = {"micro_batch": 8, "accumulation": 1}
    for config, cards, says in (
        (config_of(**few), 8, "a step is cut into 8 of 1, which"),
        (config_of(**few), 16, "too few for 16 cards"),
        (config_of(accumulation=4), 3, "do not divide by 3"),
    ):
        assert says in " ".join(plan(config, cards, "1 GB/s")["advice"])


def test_a_mixture_on_cards_is_planned_for_two_paces_and_others_for_one():
    mixture, dense = plan(config_of(), 2, "1 GB/s"), plan(resolve(tiny(pattern="DD").model_dump()), 2, "1 GB/s")
    owners = mixture["ways"][1]
    assert owners["efficiency"][0] > owners["efficiency"][1] == pytest.approx(mixture["efficiency"][2], rel=1e-3)
    assert len(dense["ways"][1]["efficiency"]) == 1 and len(dense["ways"]) == 3
    assert any("12 to 24 %" in line for line in mixture["assumed"])
    assert not any("12 to 24 %" in line for line in dense["assumed"])


def test_one_card_is_planned_alike_alone_and_among_several():
    """Also with Muon, whose update is arithmetic, once a step."""
    config = resolve(config_of(accumulation=8).model_dump(), {"model": {"pattern": "DD"}})
    report = plan(config, 2, "1 GB/s")
    alone = one_card.plan(budget.fit_micro_batch(config, CARD), CARD)
    assert alone["tokens_per_s"] == pytest.approx(report["ways"][0]["tokens_per_s"])


def test_what_was_measured_replaces_what_is_assumed():
    report = plan(config_of(), 2, "1 GB/s", tokens_per_s=1000.0)
    assert report["ways"][0]["tokens_per_s"] == pytest.approx(1000.0)
    assert len(report["ways"][1]["efficiency"]) == 1


def test_what_fits_only_in_shards_is_planned_in_shards():
    config = resolve(tiny(pattern="DMDMDM", hidden=512).model_dump(), {"train": {"accumulation": 8}})
    row = budget.with_micro_batch(config, 1, "full")
    least = [many.OneOf(**vars(CARD), division=way, cards=4).total(row) for way in (by_shards, by_experts, by_owners)]
    assert least == sorted(least) and least[-1] < CARD.total(row)
    tight = dataclasses.replace(CARD, memory=sum(least[:2]) // 2)
    report = plan(config, 4, "NVLink", tight)
    assert ["nothing fits" in way.get("fault", "") for way in report["ways"]] == [True, True, False, True]


def test_a_card_holds_its_part_and_what_it_needs_beside():
    config = budget.with_micro_batch(resolve(tiny(pattern="DMDMDM", hidden=512).model_dump()), 1, "full")
    whole = CARD.takes(config).at_peak
    shards, owners = (many.OneOf(**vars(CARD), division=way, cards=4).takes(config) for way in (by_shards, by_owners))
    way = by_shards(config, "bf16", 4)
    assert shards.at_peak == whole | {
        "weights": round(whole["weights"] * way.weights),
        "gradients": round(whole["gradients"] * way.gradients),
        "optimizer": round(whole["optimizer"] * way.moments),
        "work space": whole["work space"] + way.beside,
    }
    collecting = by_owners(config, "bf16", 4).after  # more than the activations of one row
    assert (owners.at_peak["work space"], owners.at_peak["activations"]) == (collecting, 0)


@pytest.mark.parametrize("machine", [{"split": "all"}, {"expert_processes": 4}])
def test_a_card_holds_its_part_of_the_whole_whatever_the_run_says(machine):
    """What is divided already would else be divided again."""
    whole = budget.with_micro_batch(resolve(tiny(pattern="DMDMDM", hidden=512).model_dump()), 1, "full")
    divided = resolve(whole.model_dump(), {"machine": machine})
    hardware = dataclasses.replace(CARD, processes=4)
    for way in (by_owners, by_shards):
        one = many.OneOf(**vars(hardware), division=way, cards=4)
        assert one.takes(divided) == one.takes(whole)


def test_what_fits_in_no_way_is_one_line():
    with pytest.raises(UserError, match=r"^on each of 2 cards, nothing fits into 0.00 GB: .*; these save most"):
        plan(tiny(pattern="D"), 2, "NVLink", dataclasses.replace(CARD, memory=1000))


@pytest.mark.parametrize(
    ("settings", "others"),
    [
        ({}, ["machine.split all", "machine.expert_processes 4"]),
        ({"machine": {"expert_processes": 4}}, ["machine.split all", "machine.expert_processes 4"]),
        ({"machine": {"weights": "bf16"}}, ["machine.expert_processes 4"]),
        ({"model": {"pattern": "DD"}}, ["machine.split all"]),
        ({"schedule": {"tied_experts": 0.2}}, []),
    ],
)
def test_each_way_that_is_planned_is_one_that_a_training_takes(settings, others):
    """Also of fewer cards than the run wants to share its experts: those are planned beside."""
    config = resolve(config_of().model_dump(), settings)
    assert [way["way"] for way in plan(config, 4, "1 GB/s")["ways"]] == ["one card", "owners (the default)", *others]
    for other in others:
        key, value = other.split()
        resolve(config.model_dump(), {"machine": {"expert_processes": 1}}, nested({key: value}))


def test_a_division_that_leaves_some_without_work_is_not_offered():
    """8 rows over 6 cards: owners take what there is, the others need equally many micro-batches."""
    faults = {way["way"]: way.get("fault", "") for way in plan(config_of(), 6, "1 GB/s")["ways"]}
    assert not faults["owners (the default)"]
    assert "cannot give 6 processes equally many" in faults["machine.split all"]


def test_a_run_whose_experts_are_apart_can_be_measured():
    measure._warm_up(resolve(config_of().model_dump(), {"machine": {"expert_processes": 4}}), plain_machine())


def test_a_machine_of_unknown_speed_needs_a_card():
    with pytest.raises(UserError, match="name a card: --card"):
        plan(config_of(), 2, "NVLink", dataclasses.replace(CARD, peak_flops=None))


NANO = ["plan", "nano", "--card", "RTX 4060"]


def test_the_plan_for_cards_by_command(capsys):
    assert cli.main([*NANO, "--gpus", "2", "--link", "pcie 4 x8", "--json"]) == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert report["link"] == {"name": "PCIe 4 x8", "bytes_per_s": 15.76e9 * 0.4}
    assert report["ways"][1]["moves"] == ways.by_owners(resolve(preset("nano")), "bf16", 2).traffic.step
    for words in ("one card", "owners", "machine.split all", "machine.expert_processes 2", "assumed:"):
        assert words in said.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpus", "2", "--link", "string"], "known are PCIe 3 x4"),
        (["--gpus", "1"], "from 2 to 10,000"),
        (["--gpus", "-2"], "from 2 to 10,000"),
        (["--gpus", "many"], "from 2 to 10,000"),
        (["--link", "NVLink"], "--gpus 2"),
        (["--gpus", "2", "--measure"], "--measure"),
        (["--machine.processes", "2"], "to plan for several together, --gpus 2"),
    ],
)
def test_bad_input_is_one_line(words, says, capsys):
    code = exit_code([*NANO, *words])
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and says in error[-1]
