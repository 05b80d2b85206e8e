"""The ways to divide a training over several cards: what one card then holds, and what a step brings to it."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch import nn
from torch._subclasses import FakeTensorMode

from khanhllm import optim
from khanhllm.errors import UserError
from khanhllm.machine.owners import LARGEST, dealt
from khanhllm.machine.precision import ROUNDED, keep_in_bf16
from khanhllm.model import Transformer
from khanhllm.model.roles import role
from khanhllm.planning.assumed import HIDDEN
from khanhllm.schema import Config
from khanhllm.settings import resolve


class Traffic(NamedTuple):
    """What arrives at the card that gets most (bytes)."""

    step: int = 0
    """once, after the last micro-batch"""
    micro_batch: int = 0
    """with each micro-batch"""
    hidden: float = 0.0
    """share of the arithmetic in which that arrives unnoticed"""

    def moved(self, turns: int) -> int:
        """In a step of so many micro-batches of a card."""
        return self.step + turns * self.micro_batch


class Way(NamedTuple):
    """What one of several cards has of a training."""

    name: str
    """as one asks for it"""
    weights: float = 1.0
    """share of all that it holds"""
    gradients: float = 1.0
    moments: float = 1.0
    beside: int = 0
    """bytes that it also needs while it computes"""
    after: int = 0
    """bytes that it also needs once it has computed, when no activations are left"""
    traffic: Traffic = Traffic()


Division = Callable[[Config, str, int], Way]
"""of a training in this precision over so many cards"""


class Item(NamedTuple):
    """A parameter on paper: all but its numbers in bytes."""

    numbers: int
    rows: int
    """or experts, by which it is cut"""
    weights: int
    gradients: int
    moments: int
    part: str
    """of the model, that it belongs to: a block, or the module outside of blocks"""
    matrix: bool
    """whether it is large enough to be cut; vectors and routers are not"""
    expert: bool


@lru_cache(maxsize=16)
def items(config: Config) -> tuple[Item, ...]:
    """The parameters of a run, in their order."""
    with FakeTensorMode():
        model = Transformer(config.model, config.loss.chunk)
        if config.machine.weights == "bf16":
            keep_in_bf16(model, config.machine.gradients)
    shapes = optim.state_shapes(optim.build(model, config.optim))

    def item(name: str, parameter: nn.Parameter) -> Item:
        gradient: Any = parameter.grad_dtype
        own = [kind for key, kind in shapes[parameter].items() if not key.startswith("qmap")]  # of which all share one
        return Item(
            parameter.numel(),
            len(parameter),
            parameter.nbytes,
            parameter.numel() * gradient.itemsize,
            sum(math.prod(shape) * dtype.itemsize for dtype, shape in own),
            ".".join(name.split(".")[:2]),
            role(name) in ROUNDED,
            "experts" in name.split("."),
        )

    return tuple(item(name, parameter) for name, parameter in model.named_parameters())


def alone(_config: Config, _precision: str, _cards: int) -> Way:
    """One card does all."""
    return Way("one card")


def by_owners(config: Config, _precision: str, cards: int) -> Way:
    """Each card has all weights; the gradients and moments of a parameter are with its owner (machine/owners.py)."""
    known = items(config)
    owned = _owned(known, cards)
    return Way(
        "owners (the default)",
        moments=max(_sum(own, "moments") for own in owned) / _sum(known, "moments"),
        after=_collecting(owned),
        traffic=Traffic(_moved(owned)),
    )


def by_shards(config: Config, precision: str, cards: int) -> Way:
    """Each card has a part of every matrix, and all of the rest. The weights of a block come together for its forward
    and for its backward pass, which leaves its gradients in parts (FSDP); an update goes by owners."""
    known = items(config)
    whole, cut = ([item for item in known if item.matrix is kind] for kind in (False, True))
    sent = [item.numbers * _sent(precision if item.part.startswith("blocks") else "fp32") for item in cut]
    parts: Counter[str] = Counter()
    each = 0.0
    for item, size in zip(cut, sent, strict=True):
        parts[item.part] += size
        passes = 2 if item.part.startswith(("blocks", "head")) else 1  # the gradient of a table needs no weights
        each += (cards - 1) * _shard(item, cards) * (passes * size + item.gradients)
    (largest, first), *others = parts.most_common(2)
    leaving = sum(item.gradients for item in cut if item.part == largest)
    owned = _owned(known, cards)

    def held(kind: str) -> float:
        part = sum(getattr(item, kind) * _shard(item, cards) for item in cut)
        return (_sum(whole, kind) + part) / _sum(known, kind)

    return Way(
        "machine.split all",
        held("weights"),
        held("gradients"),
        max(_sum(own, "moments") for own in owned) / _sum(known, "moments"),
        beside=first + leaving + sum(size for _, size in others),  # one block computes while another arrives
        after=max(sum(item.weights + item.gradients for item in own if item.matrix) for own in owned),
        traffic=Traffic(_updated_in_shards(owned), round(each), HIDDEN.share),
    )


def _shard(item: Item, cards: int) -> float:
    """The share of a matrix that each card holds and sends: as many rows as the first one has. The last have fewer, and
    fill up with zeros."""
    return -(-item.rows // cards) / item.rows


def _updated_in_shards(owned: list[list[Item]]) -> int:
    """Bytes that an update of shards brings to the card that gets most: of each matrix that it owns all other shards of
    weights and gradients, and of all others its own shard, updated; of the rest all gradients, and the weights that
    others own."""
    cards, whole = len(owned), [item for own in owned for item in own if not item.matrix]
    arrives = [(cards - 1) * _sum(whole, "gradients") + _sum(whole, "weights")] * cards
    for owner, own in enumerate(owned):
        arrives[owner] -= sum(item.weights for item in own if not item.matrix)
        for item in (item for item in own if item.matrix):
            most = -(-item.rows // cards)
            for card in {*range(min(cards, item.rows)), owner}:
                part = max(0, min(most, item.rows - card * most)) / item.rows
                arrives[card] += round(
                    (1 - part) * (item.weights + item.gradients) if card == owner else part * item.weights
                )
    return max(arrives)


def by_experts(config: Config, precision: str, cards: int) -> Way:
    """Each card has some of the experts of every mixture. Rows travel to their experts and back, forward and backward;
    all else has owners, as have experts that several cards have."""
    shape, train = config.model, config.train
    parts = _parts(config, cards)
    copies = cards // parts
    experts = [item for item in items(config) if item.expert]
    rest = [item for item in items(config) if not item.expert]

    def held(kind: str) -> float:
        return 1 - _sum(experts, kind) * (1 - 1 / parts) / _sum(items(config), kind)

    owned = _owned(rest, cards)
    moments = max(_sum(own, "moments") for own in owned) + _sum(experts, "moments") / cards
    stacks = (_sum(experts, "weights") + _sum(experts, "gradients")) / parts * (copies - 1) / copies
    pairs = train.rows * shape.context * shape.experts_per_token * len(shape.moe_layers)
    trips = 6 if config.machine.checkpointing == "full" else 4  # there and back, in each pass
    weight = 4 // 2  # of a pair, in fp32: it takes part in half of the trips
    return Way(
        f"machine.expert_processes {parts}",
        held("weights"),
        held("gradients"),
        moments / _sum(items(config), "moments"),
        after=_collecting(owned),
        traffic=Traffic(
            _moved(owned) + round(stacks),
            round(trips * pairs * (shape.dim * _sent(precision) + weight) * (1 - 1 / parts)),
        ),
    )


def _parts(config: Config, cards: int) -> int:
    """Cards that share the experts of a layer: as many as the run says, or else as many as can."""
    wanted = config.machine.expert_processes
    return wanted if wanted > 1 else math.gcd(cards, config.model.experts)


def _owned(known: Sequence[Item], cards: int) -> list[list[Item]]:
    """What each card owns."""
    owners = dealt([item.numbers for item in known], cards)
    owned: list[list[Item]] = [[] for _ in range(cards)]
    for item, owner in zip(known, owners, strict=True):
        owned[owner].append(item)
    return owned


def _moved(owned: list[list[Item]]) -> int:
    """Bytes that owners make a step bring to the card that gets most: of what it owns the gradients of all others, of
    all else the weights."""
    weights = sum(_sum(own, "weights") for own in owned)
    return max((len(owned) - 1) * _sum(own, "gradients") + weights - _sum(own, "weights") for own in owned)


def _collecting(owned: list[list[Item]]) -> int:
    """Most bytes of the others' gradients that an owner holds at one time, about: they come in rounds."""
    return min((len(owned) - 1) * max(_sum(own, "gradients") for own in owned), 4 * LARGEST)


def _sum(known: Sequence[Item], kind: str) -> int:
    return sum(getattr(item, kind) for item in known)


def chosen(config: Config, precision: str, cards: int) -> Way:
    """The way that a run takes."""
    kind = config.machine
    division = by_shards if kind.split == "all" else by_experts if kind.expert_processes > 1 else by_owners
    return division(config, precision, cards)


def divisions(config: Config, cards: int) -> list[Division]:
    """The ways to divide this training over so many cards, of those that `khanhllm train` accepts."""
    parts = _parts(config, cards)
    ways: dict[Division, dict[str, Any]] = {by_owners: {}, by_shards: {"split": "all"}}
    if parts > 1 and not cards % parts:
        ways[by_experts] = {"expert_processes": parts}
    return [way for way, machine in ways.items() if _is_accepted(config, machine)]


def _is_accepted(config: Config, machine: dict[str, Any]) -> bool:
    """Whether the run can be divided so, instead of as it says."""
    undivided = {"split": "optimizer", "expert_processes": 1}
    try:
        resolve(config.model_dump(), {"machine": undivided | machine})
    except UserError:
        return False
    return True


def _sent(precision: str) -> int:
    """Bytes of a number that is computed with."""
    return 2 if precision == "bf16" else 4
