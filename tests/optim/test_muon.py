"""Muon against its references: the exact polar factor (SVD in fp64), one matrix at a time, torch.optim.Muon, AdamW."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conftest import build, tiny
from khanhllm import optim
from khanhllm.data.batches import Batch
from khanhllm.machine.owners import Owners
from khanhllm.model.roles import HIDDEN, role
from khanhllm.optim import muon
from khanhllm.schema import OptimConfig
from khanhllm.settings import resolve
from khanhllm.training.step import State, train_step

SHAPES = [(32, 32), (16, 48), (48, 16)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("steps", "least"), [(1, 0.22), (2, 0.06), (3, 0.014), (4, 0.0032), (5, 0.0008)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("many", [False, True])
def test_every_direction_counts_the_same(shape, steps, least, many):
    """Singular values from the largest down to what so many turns reach end between 0.8 and 1.2; directions stay."""
    left, values, right = torch.linalg.svd(random(3, *shape).double(), full_matrices=False)
    # one large value among small ones, or all but one large: the bound is tight, or as loose as it can be
    values = torch.full_like(values, 1.0 if many else least)
    values[:, 0], values[:, 1], values[:, -1] = 1, least, least
    if many:
        least = least * values.shape[-1] ** 0.25
        values[:, 1] = values[:, -1] = least
    turned = muon.orthogonalise((left @ torch.diag_embed(values) @ right).float(), steps).double()
    along = left.mT @ turned @ right.mT
    straight = along.diagonal(dim1=-2, dim2=-1)
    assert (along - torch.diag_embed(straight)).abs().max() < 1e-3
    assert straight.min() > 0.79 and straight.max() < 1.21


REACH = {1: 0.22, 2: 0.056, 3: 0.0132, 4: 0.0032, 5: 0.0008}
"""smallest singular value, relative to the largest, that so many iterations bring near 1"""


def spectrum(kind: int, rank: int, dice: torch.Generator) -> torch.Tensor:
    """Singular values up to 1: as of a random matrix, a power law, many orders of magnitude, a few large, equal."""
    chance = torch.rand(rank, generator=dice, dtype=torch.float64)
    return [
        torch.linalg.svdvals(torch.randn(rank, rank, generator=dice, dtype=torch.float64)),
        torch.arange(1, rank + 1, dtype=torch.float64) ** -(0.2 + 2 * chance[0]),
        10 ** (-5 * chance),
        torch.where(chance > 0.8, 1.0, 0.01 * chance),
        torch.ones(rank, dtype=torch.float64),
    ][kind]


@pytest.mark.parametrize("steps", REACH)
def test_singular_values_end_near_one_whatever_the_shape_and_the_spectrum(steps):
    """None above 1.2 and none within reach below 0.8, by an SVD in fp64."""
    dice = torch.Generator().manual_seed(steps)
    for trial in range(100):
        rows, columns = torch.randint(1, 65, (2,), generator=dice).tolist()
        left, right = (
            torch.linalg.qr(torch.randn(size, min(rows, columns), generator=dice, dtype=torch.float64))[0]
            for size in (rows, columns)
        )
        values = spectrum(trial % 5, min(rows, columns), dice)
        size = 10 ** (8 * torch.rand(1, generator=dice).item() - 4)
        turned = muon.orthogonalise((size * (left * values) @ right.T).float()[None], steps)[0].double()
        along = (left.T @ turned @ right).diagonal()
        within = values >= REACH[steps] * len(values) ** 0.25 * values.max()  # as loose as the bound can be
        assert torch.linalg.svdvals(turned).max() < 1.205, (trial, rows, columns)
        assert not within.any() or along[within].min() > 0.795, (trial, rows, columns)


@pytest.mark.parametrize("steps", REACH)
def test_each_polynomial_leaves_what_the_next_one_takes(steps):
    """At every point between 0 and the largest value at the input, in fp64."""
    chain = muon.ITERATIONS[-steps:]
    s = torch.linspace(0, chain[0][0] / muon.ROOM, 200_001, dtype=torch.float64)
    for (_, a, b, c), following in zip(chain, [*chain[1:], None], strict=True):
        s = a * s + b * s**3 + c * s**5
        assert s.min() >= 0
        assert s.max() < (1.0003 * following[0] if following else 1.2)  # four digits of each coefficient are written


def test_size_does_not_matter_and_zero_stays_zero():
    x = random(2, 16, 24)
    assert torch.allclose(muon.orthogonalise(1e6 * x, 5), muon.orthogonalise(1e-6 * x, 5), atol=1e-4)
    assert muon.orthogonalise(torch.zeros(1, 8, 8), 5).eq(0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_equals_one_by_one(shape):
    x = random(5, *shape)
    alone = torch.cat([muon.orthogonalise(one[None], 5) for one in x])
    assert torch.allclose(muon.orthogonalise(x, 5), alone, atol=1e-5)


def stepped(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int = 4) -> None:
    for step in range(steps):
        for nth, parameter in enumerate(parameters):
            parameter.grad = random(*parameter.shape, seed=100 * step + nth)
        optimizer.step()


def ours(parameters: list[nn.Parameter]) -> muon.Muon:
    group = {"params": parameters, "lr": 0.02, "momentum": 0.9, "newton_schulz": 5, "weight_decay": 0.1}
    return muon.Muon([group], fused=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_moves_as_under_torch_s_muon(shape, monkeypatch):
    """Its polynomial is another, so it is lent ours; momentum, decay, step length and signs must agree."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    ours_for_it = lambda gradient, *_: muon.orthogonalise(gradient[None], 5)[0]  # noqa: E731
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", ours_for_it)
    one, other = (nn.Parameter(random(*shape)) for _ in range(2))
    start = one.detach().clone()
    stepped(ours([one]), [one])
    stepped(torch.optim.Muon([other], lr=0.02, momentum=0.9, weight_decay=0.1), [other])
    assert (one - other).norm() < 1e-4 * (one - start).norm()


def test_a_stack_of_experts_moves_as_its_matrices_alone():
    """Each expert is a matrix of its own, (in, out), and its shape decides how far it moves."""
    for shape in SHAPES:
        stack = nn.Parameter(random(3, *shape))
        singles = [nn.Parameter(matrix.T.clone()) for matrix in stack.detach()]
        optimizers = ours([stack]), ours(singles)
        for step in range(3):
            stack.grad = random(3, *shape, seed=step)
            for single, gradient in zip(singles, stack.grad, strict=True):
                single.grad = gradient.T.clone()
            for optimizer in optimizers:
                optimizer.step()
        assert torch.allclose(stack, torch.stack([single.T for single in singles]), atol=1e-5)


def test_of_copies_only_the_first_moves():
    stack, momenta = nn.Parameter(random(2, 4, 8).repeat(3, 1, 1)), []
    for copies in (1, 3):
        moved = nn.Parameter(stack.detach().clone())
        optimizer = ours([moved])
        optimizer.param_groups[0]["copies"] = copies
        for step in range(3):
            moved.grad = random(2, 4, 8, seed=step).repeat(3, 1, 1)
            optimizer.step()
        momenta.append(optimizer.state[moved]["momentum"])
        if copies == 1:
            expected = moved[:2].detach()
    assert torch.allclose(moved[:2], expected, atol=1e-6)
    assert torch.equal(moved[2:], stack[2:])
    assert torch.equal(*momenta)


def test_stacks_take_turns_and_move_as_far_as_the_steps_between_would():
    """One of four moves in each step, twice as far, by a momentum that all steps add to; copies never wait."""
    kinds = {"turns": {"every": 4}, "all": {"lr": 0.04}, "copies": {"every": 4, "copies": 2}}
    stacks = {kind: [nn.Parameter(random(2, 4, 8, seed=nth)) for nth in range(4)] for kind in kinds}
    optimizers = {kind: ours(stacks[kind]) for kind in kinds}
    for step in range(8):
        moved: dict[str, list[torch.Tensor]] = {}
        for kind, optimizer in optimizers.items():
            optimizer.param_groups[0].update(kinds[kind], step=step, weight_decay=0.0)
            before = [stack.detach().clone() for stack in stacks[kind]]
            for nth, stack in enumerate(stacks[kind]):
                stack.grad = random(2, 4, 8, seed=10 * step + nth)
            optimizer.step()
            moved[kind] = [stack.detach() - old for stack, old in zip(stacks[kind], before, strict=True)]
        turn = -step % 4
        assert torch.allclose(moved["turns"].pop(turn), moved["all"][turn], atol=1e-6)
        assert not any(stack.any() for stack in moved["turns"])
        assert all(stack[0].any() for stack in moved["copies"])


def test_small_batches_change_nothing(monkeypatch):
    """How many matrices share a product is a matter of memory only."""
    shapes = [(16, 24), (16, 24), (4, 16, 24), (2, 24, 16), (24, 16)]
    whole, small = ([nn.Parameter(random(*shape, seed=7)) for shape in shapes] for _ in range(2))
    stepped(ours(whole), whole)
    monkeypatch.setattr(muon, "LARGEST", 800)
    assert len(list(muon.batches(small))) == 4  # of two, one, one and one; a stack is never cut
    stepped(ours(small), small)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, small, strict=True))


@pytest.mark.parametrize("style", ["classic", "modern"])
def test_hidden_matrices_follow_muon_and_all_else_adamw(style):
    model = build(tiny(style))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optim.build(model, OptimConfig(name="muon", lr=1e-3, muon_lr=0.05)).param_groups
    hidden = {names[id(parameter)] for parameter in groups[0]["params"]}
    assert {name.split(".")[3] for name in hidden} == {"query", "key", "value", "out", "up", "down", "experts"} | (
        {"gate"} if style == "modern" else set()
    )
    assert not any("bias" in name or "norm" in name for name in hidden)
    assert [group["peak_lr"] for group in groups] == [0.05, 1e-3, 1e-3]
    assert sorted(names[id(p)] for group in groups for p in group["params"]) == sorted(names.values())
    decaying = {names[id(parameter)] for parameter in groups[1]["params"]}
    assert decaying == {"head.weight", "blocks.1.feedforward.router.weight"}


def test_what_is_not_muon_s_moves_as_under_adamw():
    model, twin = build(tiny()), build(tiny())
    settings = {"lr": 1e-2, "weight_decay": 0.3}
    pair = [optim.build(m, OptimConfig(name=n, **settings)) for m, n in ((model, "muon"), (twin, "adamw"))]
    for optimizer, one in zip(pair, (model, twin), strict=True):
        stepped(optimizer, list(one.parameters()))
    twins = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, twins[name]) != (role(name) in HIDDEN), name


def test_the_state_is_one_number_a_weight():
    model = build(tiny())
    optimizer = optim.build(model, OptimConfig(name="muon"))
    stepped(optimizer, list(model.parameters()), steps=1)
    for name, parameter in model.named_parameters():
        keys = {"momentum"} if role(name) in HIDDEN else {"step", "exp_avg", "exp_avg_sq"}
        assert set(optimizer.state[parameter]) == keys, name


def test_a_momentum_of_eight_bits_is_a_byte_a_weight_and_moves_nearly_the_same():
    models = [build(tiny(dim=64, hidden=128)) for _ in range(2)]
    start = {name: parameter.detach().clone() for name, parameter in models[0].named_parameters()}
    optimizers = [optim.build(m, OptimConfig(name=n)) for m, n in zip(models, ("muon", "muon8bit"), strict=True)]
    for optimizer, model in zip(optimizers, models, strict=True):
        stepped(optimizer, list(model.parameters()), steps=20)
    rounded = dict(models[1].named_parameters())
    for name, exact in models[0].named_parameters():
        if role(name) in HIDDEN:
            state = optimizers[1].state[rounded[name]]
            assert state["momentum"].nbytes == exact.numel() and state["absmax"].numel() == -(-exact.numel() // 256)
            assert 0 < (exact - rounded[name]).norm() < 0.05 * (exact - start[name]).norm(), name


def test_the_schedule_scales_each_group_s_own_peak(machine):
    config = resolve(tiny().model_dump(), {"optim": {"name": "muon", "lr": 1e-3, "muon_lr": 0.05}})
    model = build(config)
    optimizer = optim.build(model, config.optim)
    parts = SimpleNamespace(
        config=config,
        model=model,
        machine=machine,
        optimizer=optimizer,
        flops_per_token=1,
        owners=Owners(model.parameters(), machine.group),
    )
    ids_BT = torch.randint(300, (2, 33), generator=torch.Generator().manual_seed(0))
    rows = iter([Batch(ids_BT[:, :-1], ids_BT[:, 1:], 2)])
    _, row = train_step(parts, State(9, 0, torch.full((1, 4), 0.25)), rows)
    assert row["lr"] == pytest.approx(1e-3 * 10 / config.schedule.warmup)
    assert [group["lr"] / row["lr"] for group in optimizer.param_groups] == pytest.approx([50, 1, 1])
