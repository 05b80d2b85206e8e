import sys
from types import ModuleType

import pytest
import torch

from conftest import build, tiny
from khanhllm import optim
from khanhllm.errors import UserError
from khanhllm.schema import OptimConfig


@pytest.mark.parametrize("style", ["classic", "modern"])
def test_every_parameter_is_in_exactly_one_group(style):
    model = build(tiny(style))
    decay, rest = (group["params"] for group in optim.groups(model, OptimConfig()))
    assert len(decay) + len(rest) == len(list(model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {"head.weight", "blocks.1.feedforward.experts.up"} <= {names[id(p)] for p in decay}
    assert all("norm" in names[id(p)] or "bias" in names[id(p)] or "embedding" in names[id(p)] for p in rest)


def test_a_parameter_without_a_role_fails_loudly():
    model = build(tiny())
    model.blocks[0].convolution = torch.nn.Conv1d(32, 32, 3)
    with pytest.raises(ValueError, match=r"blocks\.0\.convolution\.weight has no role.*model/roles\.py"):
        optim.build(model, OptimConfig())
    with pytest.raises(ValueError, match="has no role"):
        model.initialise()


def test_a_library_that_fails_without_a_word_is_told_by_the_type_of_its_error(monkeypatch):
    class Broken(ModuleType):
        def __getattr__(self, name):
            raise OSError

    monkeypatch.setitem(sys.modules, "khanhllm.optim.eight_bit", Broken("eight_bit"))
    with pytest.raises(UserError, match=r"needs bitsandbytes, which fails here \(OSError\); use adamw"):
        optim.build(build(tiny()), OptimConfig(name="adamw8bit"))


def test_eight_bits_take_a_quarter_of_the_memory_and_learn_as_well():
    torch.manual_seed(0)
    size, left = {}, {}
    x = torch.randn(256, 128)
    y = torch.tanh(x @ torch.randn(128, 64))
    for name in ("adamw", "adamw8bit"):
        torch.manual_seed(1)
        layer = torch.nn.ModuleDict({"up": torch.nn.Linear(128, 256), "down": torch.nn.Linear(256, 64)})
        optimizer = optim.build(layer, OptimConfig(name=name, lr=3e-3, weight_decay=0))
        for _ in range(100):
            loss = (layer["down"](layer["up"](x).tanh()) - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        size[name], left[name] = optim.state_bytes(optimizer), loss.item()
    assert size["adamw8bit"] < 0.3 * size["adamw"]  # the small biases stay in fp32
    assert left["adamw8bit"] < 1.2 * left["adamw"] + 0.01


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon", "muon8bit"])
def test_moments_of_parts_are_parts_of_moments(name):
    whole, half = (build(tiny(experts=count, dim=64)) for count in (4, 2))
    optimizer = optim.build(half, OptimConfig(name=name))
    stacks = dict.fromkeys(half.blocks[1].feedforward.experts.parameters(), 2)
    optim.refuse_torn_moments(optimizer, stacks)
    foreseen = optim.state_shapes(optimizer, stacks)
    wanted = optim.state_shapes(optim.build(whole, OptimConfig(name=name)))
    names = [name for name, _ in half.named_parameters() if "router" not in name]
    ours, theirs = dict(half.named_parameters()), dict(whole.named_parameters())
    assert all(foreseen[ours[name]] == wanted[theirs[name]] for name in names)
    if "8bit" in name:
        small = build(tiny(experts=2, dim=32, expert_hidden=32))
        torn = dict.fromkeys(small.blocks[1].feedforward.experts.parameters(), 2)
        with pytest.raises(UserError, match="2 processes would hold 2,048 numbers of a stack each"):
            optim.refuse_torn_moments(optim.build(small, OptimConfig(name=name)), torn)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon", "muon8bit"])
def test_parts_with_a_learning_rate_of_their_own(name):
    model = build(tiny(value_embedding=True))
    optimizer = optim.build(model, OptimConfig(name=name, lr=1e-3, embedding_lr=0.1, head_lr=0.01))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert set(rates) == set(names.values())
    assert rates["embedding.token.weight"] == rates["value_embedding.tables.1.weight"] == 0.1
    assert rates["head.weight"] == 0.01
    assert rates["head.norm.weight"] == 1e-3


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon", "muon8bit"])
def test_routers_and_experts_with_a_recipe_of_their_own(name):
    model = build(tiny())
    own = {"router_lr": 0.005, "router_beta1": 0.8, "expert_out_lr": 0.06, "expert_momentum": 0.9, "expert_every": 3}
    optimizer = optim.build(model, OptimConfig(name=name, lr=1e-3, muon_lr=0.04, momentum=0.8, **own))
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {named[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert set(groups) == set(named.values())
    mixture, dense = "blocks.1.feedforward", "blocks.0.feedforward"
    router = groups[f"{mixture}.router.weight"]
    assert router["peak_lr"] == 0.005 and router["betas"] == (0.8, 0.95)
    assert groups["head.weight"]["betas"] == (0.9, 0.95)
    parts = f"{mixture}.experts.up", f"{mixture}.experts.down", f"{dense}.up.weight", f"{dense}.down.weight"
    rates = [groups[part]["peak_lr"] for part in parts]
    if name.startswith("muon"):
        assert rates == [0.04, 0.06, 0.04, 0.04]
        assert [groups[part]["momentum"] for part in parts] == [0.9, 0.9, 0.8, 0.8]
        assert [groups[part].get("every", 1) for part in parts] == [3, 3, 1, 1]
    else:
        assert rates == [1e-3] * 4


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_rates_carry_over_to_another_width(name):
    """At four times the width, what AdamW does to a matrix is a quarter; Muon's steps fit every width already."""
    rates = []
    for dim in (32, 128):
        model = build(tiny(dim=dim))
        optimizer = optim.build(model, OptimConfig(name=name, lr=1e-3, head_lr=1e-2, embedding_lr=0.1, base_dim=32))
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        rates.append({names[id(p)]: group["peak_lr"] for group in optimizer.param_groups for p in group["params"]})
    same = {"embedding.token.weight", "head.norm.weight"}
    same |= {"blocks.0.attention.out.weight", "blocks.1.feedforward.experts.up"} if name == "muon" else set()
    for part in same:
        assert rates[0][part] == rates[1][part], part
    scaled = {"head.weight", "blocks.1.feedforward.router.weight"}
    scaled |= set() if name == "muon" else {"blocks.0.attention.out.weight", "blocks.1.feedforward.experts.up"}
    for part in scaled:
        assert rates[0][part] == pytest.approx(4 * rates[1][part]), part
