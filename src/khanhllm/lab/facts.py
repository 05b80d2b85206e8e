"""How many made-up facts does a model hold, in bits? A mixture beside its two dense twins, in the same seconds.

Each fact is one row of seven tokens: first name, last name, and the day, month, year, town and trade that only this
name has. Values are drawn evenly, so how much there is to know is known exactly, and nothing but memory helps. The
three models take turns on the same facts in the same order, and what they hold is measured at several times.

The default size is such that fifty seconds on two cores decide something. Facts are short rows of a small vocabulary
and the model is narrow, so in that time it reads each fact some seventy times or more, and a dense model is known to
hold about a bit for each parameter after a hundred readings and about two after a thousand (Allen-Zhu and Li 2024,
arXiv 2404.05405). 5,000 facts are 147,000 bits: more than two for each parameter of the twin with the mixture's
arithmetic, which therefore cannot learn all, and 1.2 for each of the mixture's, which nearly can. Of much fewer facts
every model learns all; of much more, none comes to its limit in this time. Sixteen experts: with thirty-two
the mixture held less after the same time.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import count
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import nn

from khanhllm.data.batches import Batch, batches
from khanhllm.machine.devices import Machine
from khanhllm.model.counts import active_parameters, on_paper, total_parameters
from khanhllm.model.twin import dense_twin
from khanhllm.schema import Config
from khanhllm.training.step import Learner, State, train_step

CHOICES = {"day": 28, "month": 12, "year": 100, "town": 200, "trade": 100}
"""what each fact says, and among how many values; all are equally likely"""
NAMES = 2
"""tokens before the values"""
SYLLABLES = ["ba", "de", "fi", "go", "ha", "ju", "ke", "li", "mo", "na", "pe", "ri", "so", "tu", "va", "we"]
MODELS = {
    "mixture": "mixture of experts",
    "active": "dense twin, equal arithmetic",
    "total": "dense twin, equal parameters",
}
RECIPE: dict[str, Any] = {
    "model": {
        "pattern": "DM",
        "dim": 32,
        "heads": 2,
        "hidden": 128,
        "expert_hidden": 64,
        "experts": 16,
        "feedforward": "relu2",
        "context": NAMES + len(CHOICES) - 1,
    },
    "train": {"micro_batch": 192},
    "optim": {
        "name": "muon",
        "muon_lr": 0.02,
        "newton_schulz": 3,
        "lr": 0.015,
        "beta2": 0.98,
        "weight_decay": 0.0,  # it makes a model forget
    },
    "schedule": {"kind": "wsd", "warmup": 50, "decay": 0.6, "floor": 0.0},
}
"""the mixture that is measured; its twins differ in model.pattern and model.hidden"""
MARKS = 12
"""times at which the models are measured"""
ROWS = 1024
"""facts read at one time to measure"""
Clock = Callable[[], float]


BITS = sum(map(math.log2, CHOICES.values()))
"""what there is to know of one fact"""


def names_for(number: int) -> int:
    """First names that so many facts need, and last names."""
    return math.isqrt(number - 1) + 1


def vocabulary(number: int) -> int:
    """Tokens of so many facts."""
    return 2 * names_for(number) + sum(CHOICES.values())


@dataclass(frozen=True)
class Facts:
    """Made-up people. A source of rows, as prepared shards are."""

    ids: np.ndarray
    """(N, 7), int64: a row for each fact"""
    names: int
    """first names there are, and last names"""

    @classmethod
    def draw(cls, number: int, seed: int) -> "Facts":
        """So many facts with unique names. Nearly all pairs of a first and a last name are taken, because knowing which
        of them exist is knowledge too, which nobody counts here."""
        names, random = names_for(number), np.random.default_rng(seed)
        pair = random.permutation(names**2)[:number]
        columns, start = [pair // names, names + pair % names], 2 * names
        for choices in CHOICES.values():
            columns.append(start + random.integers(choices, size=number))
            start += choices
        return cls(np.stack(columns, axis=1).astype(np.int64), names)

    def rows_from(self, cursor: int, seed: int, stopped: Event) -> Iterator[np.ndarray]:
        """The rows of a training, endlessly: in each epoch every fact once, in an order of its own."""
        for epoch in count(cursor // len(self.ids)):
            order = np.random.default_rng([seed, epoch]).permutation(len(self.ids))
            yield from self.ids[order[max(0, cursor - epoch * len(self.ids)) :]]

    def in_words(self, fact: int) -> str:
        """One fact as people read it."""
        first, last, *values = self.ids[fact].tolist()
        starts = np.cumsum([2 * self.names, *CHOICES.values()])[:-1]
        day, month, year, town, trade = (value - start for value, start in zip(values, starts.tolist(), strict=True))
        name = f"{_word(first).title()} {_word(last).title()}"
        return (
            f"{name}, born {1900 + year}-{month + 1:02}-{day + 1:02} in {_word(town).title()}, {_word(trade)} by trade"
        )


def _word(number: int) -> str:
    return "".join(SYLLABLES[number // 16**place % 16] for place in range(3))


def bits_stored(mean_nats_A: list[float], number: int) -> list[float]:
    """The bits about so many facts that a model holds at least, for each attribute, from the mean of -ln p of the true
    value over all facts, given all that stands before it.

        bits = facts x max(0, log2(choices) - mean nats / ln 2)

    A model that knows which values there are, but not whose they are, takes ln(choices) nats: so format is worth
    nothing. Who knows a value takes none. The mean is taken before the maximum, else lucky guesses would count and
    unlucky ones would not. It is the part of Allen-Zhu and Li's lower bound that is about values (2024, arXiv
    2404.05405); theirs also counts names, of which here nearly all exist.
    """
    pairs = zip(CHOICES.values(), mean_nats_A, strict=True)
    return [number * max(0.0, math.log2(choices) - nats / math.log(2)) for choices, nats in pairs]


@torch.no_grad()
def measure(model: nn.Module, facts: Facts, machine: Machine) -> list[float]:
    """The bits that the model holds about each attribute: see `bits_stored`."""
    sums_A = torch.zeros(len(CHOICES), dtype=torch.float64)
    for ids_BT in torch.from_numpy(facts.ids).split(ROWS):
        ids_BT = ids_BT.to(machine.device)
        with machine.autocast():
            nll_BT, _ = model(ids_BT[:, :-1], ids_BT[:, 1:])
        sums_A += nll_BT[:, NAMES - 1 :].double().sum(0).cpu()
    return bits_stored((sums_A / len(facts.ids)).tolist(), len(facts.ids))


@dataclass
class Runner:
    """A model in training, with a clock that stands still while others train and while it is measured."""

    name: str
    learner: Learner
    state: State
    rows: Iterator[Batch]
    clock: Clock
    seconds: list[float] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)
    by_attribute: list[float] = field(default_factory=list)

    def train_until(self, share: float) -> None:
        """Train until so much of its time is used up."""
        whole, started = self.learner.config.train.seconds, self.clock()
        before = self.state.share or 0.0
        while (self.state.share or 0.0) < share:
            state, _ = train_step(self.learner, self.state, self.rows)
            self.state = replace(state, share=before + (self.clock() - started) / whole)

    def note(self, facts: Facts) -> None:
        """Measure what it holds now."""
        self.by_attribute = measure(self.learner.model, facts, self.learner.machine)
        self.seconds.append((self.state.share or 0.0) * self.learner.config.train.seconds)
        self.bits.append(sum(self.by_attribute))

    def result(self, facts: Facts) -> dict[str, Any]:
        """What facts.json says of one training."""
        return {
            "seed": self.learner.config.train.seed,
            "steps": self.state.step,
            "readings": self.state.cursor / len(facts.ids),
            "seconds": self.seconds,
            "bits": self.bits,
            "bits_by_attribute": dict(zip(CHOICES, self.by_attribute, strict=True)),
        }


def configs(config: Config) -> dict[str, Config]:
    """The mixture and its twins."""
    shapes = {
        "mixture": config.model,
        "active": dense_twin(config.model, "active"),
        "total": dense_twin(config.model, "total"),
    }
    return {name: config.model_copy(update={"model": shape}) for name, shape in shapes.items()}


def race(
    config: Config,
    facts: Facts,
    machine: Machine,
    clock: Clock = time.perf_counter,
    told: Callable[[], object] = lambda: None,
) -> dict[str, Runner]:
    """Train the three models on the same rows for equal times, and measure each at MARKS times. They take turns, so
    that whatever else the machine does slows all of them. `told` is called after each turn."""
    with ExitStack() as readers:
        runners = {}
        for name, one in configs(config).items():
            learner, train = Learner.new(one, machine), config.train
            rows = readers.enter_context(closing(batches(facts, train.rows, train.seed, 0, machine.device)))
            runners[name] = Runner(name, learner, learner.start(), rows, clock)
            runners[name].note(facts)
        for mark in range(1, MARKS + 1):
            for runner in runners.values():
                runner.train_until(mark / MARKS)
                runner.note(facts)
                told()
    return runners


def summary(config: Config, number: int, rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """What facts.json says of each model, from the results of all seeds."""
    found: dict[str, Any] = {}
    for name, one in configs(config).items():
        model, runs = on_paper(one.model), [results[name] for results in rounds]
        bits = [run["bits"][-1] for run in runs]
        over = [results["mixture"]["bits"][-1] / max(results[name]["bits"][-1], 1.0) for results in rounds]
        found[name] = {
            "parameters": total_parameters(model),
            "active_parameters": active_parameters(model),
            "hidden": one.model.hidden,
            "bits": spread(bits),
            "share": spread([each / (number * BITS) for each in bits]),
            "bits_per_parameter": spread([each / total_parameters(model) for each in bits]),
            "readings": spread([run["readings"] for run in runs]),
            "mixture_over_it": spread(over),
            "runs": runs,
        }
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}
