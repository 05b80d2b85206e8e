"""Predict what several cards do together: what each holds, what a step moves between them, and how long it takes.

    a step = micro-batches of a card x (arithmetic + what is not hidden of their bytes / speed of the link)
             + its part of the update + bytes of a step / speed of the link

assumed.py has what nobody has measured. No time is set aside for latency, nor for a link that several cards share.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rich.console import Console

from khanhllm.errors import UserError
from khanhllm.model.counts import on_paper, total_parameters
from khanhllm.planning.assumed import HIDDEN, MIXTURE, Link
from khanhllm.planning.budget import MORE_ROWS, Hardware, fit_micro_batch, shared_out, with_micro_batch
from khanhllm.planning.plan import ASSUMED
from khanhllm.planning.simulation import SimulatedStep
from khanhllm.planning.ways import Division, Traffic, alone, by_experts, by_shards, divisions
from khanhllm.schema import Config
from khanhllm.units import as_size

Report = dict[str, Any]
WELL, HARDLY = 0.8, 0.5
"""efficiency from which on cards pay, and below which half of them would do as much"""
FASTER = 1.1
"""times one card; several that reach less are no faster"""


@dataclass(frozen=True)
class OneOf(Hardware):
    """One of several cards that train together."""

    division: Division = alone
    cards: int = 1

    def takes(self, config: Config, update: bool = True) -> SimulatedStep:
        """What one step takes on this card, which holds its part."""
        way = self.division(config, self.precision, self.cards)
        undivided = config.machine.model_copy(update={"split": "optimizer", "expert_processes": 1})
        step = super().takes(config.model_copy(update={"machine": undivided}), update)
        part = {"weights": way.weights, "gradients": way.gradients, "optimizer": way.moments}
        held = {name: round(getattr(step, name) * share) for name, share in part.items()}
        computing = {name: round(size * part.get(name, 1)) for name, size in step.at_peak.items()}
        computing["work space"] += way.beside
        after = dict.fromkeys(computing, 0) | held | {"work space": way.after}
        return replace(step, **held, at_peak=max(computing, after, key=lambda parts: sum(parts.values())))


def step_seconds(arithmetic: float, update: float, turns: int, traffic: Traffic, speed: float) -> float:
    """The time of a step (s): arithmetic of one micro-batch (s), the card's part of the update (s), its micro-batches,
    what arrives, and the speed of the link (bytes/s)."""
    waiting = max(0.0, traffic.micro_batch / speed - traffic.hidden * arithmetic)
    return turns * (arithmetic + waiting) + update + traffic.step / speed


@dataclass(frozen=True)
class Row:
    """What one way to divide a step comes to."""

    way: str
    cards: int
    holds: int
    """bytes at the peak of one card"""
    micro_batch: int
    """rows"""
    accumulation: int
    """micro-batches of all cards"""
    flops: int
    """of one micro-batch"""
    update: int
    """floating-point operations of the whole update"""
    part: float
    """share of it of the card that has most"""
    traffic: Traffic
    speed: float
    """of the link (bytes/s)"""

    @property
    def turns(self) -> int:
        """Micro-batches of the card that has most."""
        return -(-self.accumulation // self.cards)

    @property
    def moves(self) -> int:
        """Bytes that a step brings to the card that gets most."""
        return self.traffic.moved(self.turns)

    def seconds(self, pace: float) -> float:
        """The time of a step where each card computes so fast (FLOP/s)."""
        return step_seconds(self.flops / pace, self.update * self.part / pace, self.turns, self.traffic, self.speed)

    def alone(self, pace: float) -> float:
        """The time of the same micro-batches on one card."""
        return (self.flops * self.accumulation + self.update) / pace

    def efficiency(self, pace: float, single: "Row") -> float:
        """Share of their time in which the cards do what one card does."""
        return single.alone(pace) / (self.cards * self.seconds(pace))


def row(config: Config, hardware: Hardware, division: Division, cards: int, link: Link) -> Row:
    """A step, in micro-batches that fit into the cards. Raises UserError if none do."""
    one = OneOf(**vars(hardware), division=division, cards=cards)
    config = fit_micro_batch(config, one)
    few = config.train.rows_per_step < cards
    evenly = division in (by_shards, by_experts)
    config = with_micro_batch(config, 1) if few else shared_out(config, cards, evenly)
    step = one.takes(config)
    way = division(config, hardware.precision, cards)
    return Row(
        way.name,
        cards,
        holds=one.process + step.peak,
        micro_batch=config.train.rows,
        accumulation=config.train.accumulation,
        flops=step.flops,
        update=step.update,
        part=way.moments,
        traffic=way.traffic,
        speed=link.speed,
    )


class Fault(NamedTuple):
    """Why there is no row."""

    way: str
    text: str


def attempt(config: Config, hardware: Hardware, division: Division, cards: int, link: Link) -> Row | Fault:
    """The row, if the step fits."""
    try:
        return row(config, hardware, division, cards, link)
    except UserError as error:
        return Fault(division(config, hardware.precision, cards).name, str(error))


def attempts(config: Config, hardware: Hardware, cards: int, link: Link) -> list[Row | Fault]:
    """Of all ways to divide the step."""
    return [attempt(config, hardware, division, cards, link) for division in divisions(config, cards)]


def plan(config: Config, hardware: Hardware, cards: int, link: Link, tokens_per_s: float | None = None) -> Report:
    """Compare the ways to train on so many cards. tokens_per_s: measured on one of them.

    Raises UserError if no way fits, or if nobody knows how fast the hardware is.
    """
    if not hardware.peak_flops:
        unknown = f"nobody knows how fast {hardware.name} is in {hardware.precision}"
        raise UserError(f"{unknown}; for bf16 name a card: --card 'RTX 4090'")
    one = attempt(config, hardware, alone, 1, link)
    ways = attempts(config, hardware, cards, link)
    shares = _shares(config, hardware)
    paces = [share * hardware.peak_flops for share in shares]
    if tokens_per_s and isinstance(one, Row):
        paces = [one.alone(1.0) * tokens_per_s / config.tokens_per_step]
    tried = [*(attempts(config, hardware, count, link) for count in _fewer(cards)), ways]
    series = {best.cards: best for found in tried if (best := _best(found, paces[-1]))}
    if cards not in series:
        fault = next(found.text for found in ways if isinstance(found, Fault))
        raise UserError(f"on each of {cards} cards, {fault}")
    single = one if isinstance(one, Row) else series[cards]
    return {
        "place": hardware.name,
        "parameters": total_parameters(on_paper(config.model)),
        "tokens_per_step": config.tokens_per_step,
        "memory": hardware.memory,
        "cards": cards,
        "link": {"name": link.name, "bytes_per_s": link.speed},
        "ways": [_told(found, single, paces, config.tokens_per_step) for found in (one, *ways)],
        "efficiency": {count: round(found.efficiency(paces[-1], single), 4) for count, found in series.items()},
        "advice": [*_hints(one, ways[0], series[cards]), *_advice(config, series, single, paces[-1], link)],
        "assumed": [*_assumed(shares, link, measured=bool(tokens_per_s))],
    }


def _best(ways: list[Row | Fault], pace: float) -> Row | None:
    """The first way that fits, unless another is clearly faster."""
    fits = [found for found in ways if isinstance(found, Row)]
    fastest = min(fits, key=lambda found: found.seconds(pace), default=None)
    return fastest if fastest and fastest.seconds(pace) * FASTER < fits[0].seconds(pace) else next(iter(fits), None)


def _fewer(cards: int) -> list[int]:
    """The powers of two below."""
    return [2**power for power in range(1, 20) if 2**power < cards]


def _shares(config: Config, hardware: Hardware) -> list[float]:
    """Shares of its peak rate at which a card may compute. The last is the highest: a fast card waits most."""
    mixture = hardware.device == "cuda" and config.model.moe_layers
    return [*([MIXTURE.share] if mixture else []), ASSUMED[hardware.device]]


def _told(found: Row | Fault, single: Row, paces: list[float], tokens: int) -> Report:
    if isinstance(found, Fault):
        return {"way": found.way, "fault": found.text}
    seconds = found.seconds(paces[0])
    return {
        "way": found.way,
        "memory": found.holds,
        "moves": found.moves,
        "micro_batch": found.micro_batch,
        "accumulation": found.accumulation,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "efficiency": [found.efficiency(pace, single) for pace in paces],
    }


def _hints(one: Row | Fault, owners: Row | Fault, best: Row) -> Iterator[str]:
    """What a user may not expect."""
    cards, size, rows = best.cards, best.micro_batch, best.micro_batch * best.accumulation
    if isinstance(one, Fault):
        yield "this does not fit into one card; efficiency is against one that it would fit into"
    if best is not owners:
        why = "do not fit" if isinstance(owners, Fault) else "take longer"
        yield f"take {best.way}: owners {why} on {cards:,} cards"
    if rows < cards:
        yield f"a step has {rows:,} rows, too few for {cards:,} cards, so `khanhllm train` refuses them; {MORE_ROWS}"
    elif isinstance(one, Row) and one.accumulation < cards:
        yield (
            f"{one.accumulation} micro-batches of {one.micro_batch} rows, which one card takes, are fewer than {cards} "
            f"cards: a step is cut into {best.accumulation} of {size}, which may be slower than this plan knows"
        )
    elif best.accumulation % cards:
        yield f"{best.accumulation} micro-batches do not divide by {cards}: some cards wait for the last of them"


def _advice(config: Config, series: dict[int, Row], single: Row, pace: float, link: Link) -> Iterator[str]:
    """What to do with so many cards, in words."""
    efficiency = {count: found.efficiency(pace, single) for count, found in series.items()}
    cards, several = max(series), series[max(series)]
    gain = cards * efficiency[cards]
    if efficiency[cards] >= WELL:
        yield f"{cards} cards pay over {link.name}: a step is {gain:.1f} times as fast as on one"
        return
    useful = [count for count, share in efficiency.items() if share >= HARDLY and count * share >= FASTER]
    good = [count for count in useful if efficiency[count] >= WELL]
    if gain >= FASTER:
        yield f"{cards:,} cards over {link.name} are {gain:.1f} times as fast as one"
    elif useful:
        yield f"{cards:,} cards over {link.name} are no faster than one"
    else:
        yield f"never over {link.name}: {cards:,} cards are no faster than one"
    if useful:
        least, most = max(good, default=min(useful)), max(useful)
        yield f"use {least} to {most} of these" if least < most else f"use {most} of these"
    remedies = list(_remedies(config, several, single, pace))
    yield (
        f"{cards:,} cards pay {' or '.join(remedies)}" if remedies else f"{cards:,} cards need a larger model and step"
    )


def _remedies(config: Config, several: Row, single: Row, pace: float) -> Iterator[str]:
    """What would let so many cards pay."""
    arithmetic = several.turns * several.flops / pace
    budget = single.alone(pace) / (several.cards * WELL) - arithmetic - several.update * several.part / pace
    if budget > 0:
        speed = several.moves / (budget + several.traffic.hidden * arithmetic)
        yield f"from {as_size(speed)}/s on"
    for times in (2**power for power in range(1, 12)):
        longer, alone = (replace(row, accumulation=row.accumulation * times) for row in (several, single))
        if longer.efficiency(pace, alone) >= WELL:
            larger = f"--train.accumulation {config.train.accumulation * times}"
            yield f"with {times:,} times as many tokens a step ({larger}), as for a larger model"
            return


def _assumed(shares: list[float], link: Link, measured: bool) -> Iterator[str]:
    if measured:
        yield "a card computes as fast as three real steps did here"
    else:
        yield f"a card computes at {shares[0]:.0%} of its peak rate; --measure replaces that on this machine"
    if len(shares) > 1 and not measured:
        yield (
            f"{MIXTURE.source}; the lower efficiency, which the advice goes by, is for {shares[-1]:.0%}, as a faster "
            "card waits more"
        )
    yield f"{link.name} brings a card {as_size(link.speed)}/s and takes as much from it: {link.why.source}"
    yield f"machine.split all hides what arrives in {HIDDEN.share:.0%} of the arithmetic: {HIDDEN.source}"


def show(report: Report, console: Console) -> None:
    """Print a report as a table."""
    cards = f"{report['cards']:,} x {report['place']} with {report['memory'] / 1e9:.2f} GB to fill"
    sizes = f"{report['parameters']:,} parameters, {report['tokens_per_step']:,} tokens a step"
    lines = [
        f"{sizes}; {cards}, joined by {report['link']['name']}",
        "",
        _columns("", "a card holds", "a step moves", "a step takes", "tokens/s", "efficiency"),
        *map(_line, report["ways"]),
        "",
        *(f"{said[0].upper()}{said[1:]}." for said in report["advice"]),
    ]
    if len(report["efficiency"]) > 1:
        counts = ", ".join(f"{count:,}: {share:.0%}" for count, share in report["efficiency"].items())
        lines.append(f"Efficiency of other numbers of cards: {counts}.")
    for line in [*lines, "", "assumed:", *(f"  {said}" for said in report["assumed"])]:
        console.print(line, markup=False, soft_wrap=True)


def _columns(first: str, *others: str) -> str:
    return f"{first:<28}" + "".join(f"{other:>14}" for other in others)


def _line(way: Report) -> str:
    if "fault" in way:
        return f"{way['way']:<28}  {way['fault'].partition(';')[0]}"
    shares = [f"{share:.0%}" for share in sorted(way["efficiency"])]
    return _columns(
        way["way"],
        f"{way['memory'] / 1e9:,.2f} GB",
        f"{way['moves'] / 1e9:,.2f} GB" if way["moves"] else "",
        _seconds(way["seconds"]),
        f"{way['tokens_per_s']:,.0f}",
        " to ".join(dict.fromkeys(shares)) if way["moves"] else "",
    )


def _seconds(time: float) -> str:
    return f"{time:.{3 if time < 0.1 else 2 if time < 10 else 1}f} s"
