"""Where does a mixture learn more than its dense twin of equal arithmetic, and how much more would the twin have to do?

    python benchmarks/mixture.py learn DATA --out runs.jsonl [--cells NAME ...] [--steps 500 1000 2000] [--seeds 1]
    python benchmarks/mixture.py race DATA --out runs.jsonl [--cells NAME ...] [--seconds 150 450] [--seeds 1]
    python benchmarks/mixture.py speed --out runs.jsonl [--cells NAME ...]
    python benchmarks/mixture.py table runs.jsonl [--seeds 1] [--picture PNG]

`learn` trains mixture and twin of each cell for as many steps on the same rows, on one thread each, and appends a line
for each run; runs that FILE already has are not repeated, so that it can be stopped at any time, and load does not
matter. `race` trains both for as many seconds, at the same time, on a core each, so that both feel what else the
machine does. `speed` needs a quiet machine: it takes turns, a step of the one and a step of the other, and appends
their times. `table` puts all together, or only races with as many seeds as `--seeds` says; differences are the
mixture's bits per byte less its twin's. *multiplier*: how many times its own steps, or its own time, the twin would
need for the mixture's bits per byte, read off the line through its budgets (bits per byte over the logarithm of the
budget); less than 1 where the twin is ahead, and `?` where it has one budget only. The last line about races is the
rule that follows from them; `--picture` draws it.
"""

import argparse
import json
import math
import multiprocessing
import random
import statistics
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from khanhllm.lab.candidates import Candidate
from khanhllm.log.compare import COLOURS, read
from khanhllm.model.counts import active_parameters, on_paper, total_parameters
from khanhllm.model.twin import dense_twin
from khanhllm.schema import Config
from khanhllm.settings import preset, resolve
from khanhllm.training.run import train

ALL = {"pattern": "MMMM"}
WIDE = ALL | {"hidden": 768, "expert_hidden": 384, "vocab_size": 2048}
NARROW = WIDE | {"dim": 64, "heads": 2, "hidden": 512, "expert_hidden": 256}
PLAIN = {"value_embedding": False, "pair_embedding": 0}
NARROWER = NARROW | PLAIN | {"dim": 32, "hidden": 256, "expert_hidden": 128, "vocab_size": 1024}
HALVES = {"experts_per_token": 4, "expert_hidden": 64}
CELLS: dict[str, dict[str, Any]] = {
    "micro": {},
    "micro, vocabulary 2048": {"vocab_size": 2048},
    "mixtures only": ALL,
    "mixtures only, vocabulary 2048": ALL | {"vocab_size": 2048},
    "wide": WIDE,
    "wide, vocabulary 512": WIDE | {"vocab_size": 512},
    "wide, vocabulary 8192": WIDE | {"vocab_size": 8192},
    "wide, no tables": WIDE | PLAIN,
    "wide, no tables, 16 experts": WIDE | PLAIN | {"experts": 16},
    "wide, 16 experts": WIDE | {"experts": 16},
    "wide, 32 experts": WIDE | {"experts": 32},
    "wide, 64 experts": WIDE | {"experts": 64},
    "wide, 32 experts of a quarter": WIDE | {"experts": 32, "experts_per_token": 8, "expert_hidden": 96},
    "wide, 32 experts, no tables": WIDE | PLAIN | {"experts": 32},
    "narrow": NARROW,
    "narrow, no tables": NARROW | PLAIN,
    "narrow, no tables, 16 experts": NARROW | PLAIN | {"experts": 16},
    "narrower, no tables": NARROWER,
    "narrower, no tables, 16 experts": NARROWER | {"experts": 16},
    "narrower, no tables, 32 experts": NARROWER | {"experts": 32},
    "narrower, no tables, 16 experts of a half": NARROWER | HALVES | {"experts": 16},
    "narrower, no tables, 32 experts of a half": NARROWER | HALVES | {"experts": 32},
}
"""what differs from the preset micro, under [model]"""
PRESETS = ("hour", "evening")
"""cells too, with their own recipe"""
OWN = {"router_lr": 0.0017, "router_beta1": 0.9, "expert_out_lr": 0.057, "expert_momentum": 0.95}
"""keys of [optim] that a twin, which has no router and no experts, does not heed"""
RARE = OWN | {"expert_every": 4}
HALF = RARE | {"muon_lr": 0.02, "expert_out_lr": 0.0285}
"""muon_lr is the twin's too"""
COPY = {"induction_head": True}
TABLES = {"value_embedding": True, "embedding_skip": True, "pair_embedding": 2**14}
WITH = {
    "": {},
    "tables, ": TABLES,
    "values, ": {"value_embedding": True},
    "normed values, ": {"value_embedding": "normed"},
    "pairs, ": {"pair_embedding": 2**14},
}
"""keys of [model], by the word for them in a recipe's name"""
UNSHIFTED = {"token_shift": False, "value_every": 2}
FOUR = UNSHIFTED | {"heads": 4}
UNSCALED = ALL | FOUR | {"stream_scale": False}
BEFORE = {"model": UNSCALED | {"token_norm": False}, "optim": {"head_lr": 0}}
"""hour as it was without token_shift, stream_scale and token_norm, with more heads and layers, and lr for its head"""
WIDER = BEFORE["model"] | {"hidden": 1024, "expert_hidden": 512}
"""of the former hour"""
TIED = {"tied_experts": 0.2}
ROWS = {"micro_batch": 16}
RECIPES: dict[str, dict[str, Any]] = {
    "one rate": {},
    "one rate, induction": {"model": COPY},
    "the preset's": {},
    "the preset's, two layers": {"model": {"pattern": "MM"}},
    "the preset's, tokens not shifted": {"model": UNSHIFTED},
    "the preset's, four heads": {"model": FOUR},
    "the preset's, two layers, four heads": {"model": FOUR | {"pattern": "MM"}},
    "the preset's, stream not scaled": {"model": UNSCALED},
    "the preset's, tokens not normed, head at lr": BEFORE,
    "the preset's, wide, tables": BEFORE | {"model": WIDER | TABLES},
    "the preset's, wide, without values": BEFORE | {"model": WIDER | {"value_embedding": False}},
    "own rates": {"optim": OWN},
    "own rates, 4096 tokens a step": {"optim": OWN, "train": ROWS},
    "own rates, tied": {"optim": OWN, "schedule": TIED},
    "own rates, tied, 4096 tokens a step": {"optim": OWN, "schedule": TIED, "train": ROWS},
    "own rates and steps, tied": {"optim": RARE, "schedule": TIED},
    "own rates and steps, tied, 4096 tokens a step": {"optim": RARE, "schedule": TIED, "train": ROWS},
    **{
        f"induction, {name}half rates, tied, 4096 tokens a step": {
            "model": COPY | tables,
            "optim": HALF,
            "schedule": TIED,
            "train": ROWS,
        }
        for name, tables in WITH.items()
    },
    "induction, normed values and tokens, half rates and head's own, tied, 4096 tokens a step": {
        "model": COPY | {"value_embedding": "normed", "token_norm": True},
        "optim": HALF | {"head_lr": 0.004},
        "schedule": TIED,
        "train": ROWS,
    },
    "own rates, tied, 8192 tokens a step": {"optim": OWN, "schedule": TIED, "train": {"micro_batch": 32}},
}
"""what else differs from the preset"""
MARKERS = {32: "o", 64: "s", 96: "^", 128: "D", 160: "v"}
"""by width"""
MODELS = ("mixture", "twin")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["learn", "race", "speed", "table"])
    parser.add_argument("data", nargs="?", help="as for khanhllm train; of a table, the file")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cells", nargs="*", default=list(CELLS), choices=[*CELLS, *PRESETS], metavar="NAME")
    parser.add_argument("--recipe", default="own rates", choices=list(RECIPES))
    parser.add_argument("--steps", nargs="*", type=int, default=[500, 1000, 2000])
    parser.add_argument("--seconds", nargs="*", type=int, default=[150, 450])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of speed")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="of a race: keep its runs there")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="of a table: its races with a common start")
    options = parser.parse_args()
    if options.what == "table":
        runs = [json.loads(line) for line in Path(options.data).read_text("utf-8").splitlines()]
        table(runs, options.seeds)
        if options.picture:
            draw(started_together(runs), options.picture)
    elif not options.out:
        parser.error("--out FILE says where to keep the results")
    elif options.what == "speed":
        for cell in options.cells:
            row = {"what": "speed", "cell": cell, "recipe": options.recipe, "threads": options.threads}
            append(options.out, row | speed(cell, RECIPES[options.recipe], options.threads))
    elif options.what == "race":
        race(options)
    else:
        learn(options)


def config(cell: str, recipe: dict[str, Any], **given: Any) -> Config:
    machine = {"machine": {"device": "cpu", "threads": 1}}
    return resolve(preset(cell if cell in PRESETS else "micro"), {"model": CELLS.get(cell, {})}, recipe, machine, given)


def race(options: argparse.Namespace) -> None:
    """Both models for as many seconds, at the same time."""
    known = done(options.out)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for seed, seconds, cell in product(range(options.seeds), options.seconds, options.cells):
            run = {"what": "race", "seconds": seconds, "seed": seed, **described(cell, options)}
            if key(run) not in known:
                both = [run | {"model": model} for model in MODELS]
                found = pool.map(partial(learned, options.data, keep=options.keep), both)
                append(options.out, run | dict(zip(MODELS, found, strict=True)))


def done(path: Path) -> set[tuple[Any, ...]]:
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return {key(run) for run in map(json.loads, lines) if run["what"] != "speed"}


def learn(options: argparse.Namespace) -> None:
    known = done(options.out)
    for steps, cell, seed, model in product(options.steps, options.cells, range(options.seeds), MODELS):
        run = {"what": "learn", "model": model, "steps": steps, "seed": seed, **described(cell, options)}
        if key(run) not in known:
            append(options.out, run | learned(options.data, run))


def described(cell: str, options: argparse.Namespace) -> dict[str, str]:
    return {"cell": cell, "data": Path(options.data).name, "recipe": options.recipe}


def key(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(map(run.get, ("what", "cell", "data", "recipe", "model", "steps", "seconds", "seed")))


def learned(source: str, run: dict[str, Any], keep: Path | None = None) -> dict[str, Any]:
    """Train one model; its bits per byte on held-out documents. The run stays in the folder `keep`."""
    quiet = {"eval_every": 0, "save_every": 0, "sample_tokens": 0, "eval_tokens": 2**18}
    until = {part: run[part] for part in ("steps", "seconds") if part in run}
    given = config(
        run["cell"],
        RECIPES[run["recipe"]],
        data={"source": source, "validation": 0.02},
        train={**until, "seed": run["seed"], **quiet},
    )
    if run["model"] == "twin":
        given = given.model_copy(update={"model": dense_twin(given.model)})
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        kept = (run["cell"], f"{run['model']}-{run.get('seconds')}s-{run['seed']}")
        path = Path(keep or folder, *kept)
        train(given, path)
        told = read(path)
    return {
        "parameters": total_parameters(on_paper(given.model)),
        "active": active_parameters(on_paper(given.model)),
        "bits_per_byte": float(told.bits[-1]),
        "loss": statistics.mean(told.loss[-100:].tolist()),
        "steps_done": int(told.step[-1]),
        "tokens": int(told.tokens[-1]),
        "cpu_seconds": time.process_time() - started,
    }


def speed(cell: str, recipe: dict[str, Any], threads: int, turns: int = 25) -> dict[str, Any]:
    """Seconds of a step of the mixture, once its experts have parted, over those of its twin, step by step in turns."""
    given = config(cell, recipe | {"schedule": {"tied_experts": 0}}, machine={"threads": threads})
    pair = [Candidate.enter(name, given) for name in ("ours", "dense twin")]
    seconds = [[candidate.step() for candidate in pair] for _ in range(turns)][3:]
    for candidate in pair:
        candidate.leave()
    over = statistics.quantiles([mixture / twin for mixture, twin in seconds], n=4)
    return {"seconds": [statistics.median(its) for its in zip(*seconds, strict=True)], "time_over_twin": over}


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        print(json.dumps(row), file=file)


def table(runs: list[dict[str, Any]], seeds: int) -> None:
    races, by_steps, times = defaultdict(list), defaultdict(list), {}
    for run in runs:
        what = (run["cell"], run["recipe"], run.get("data", ""))
        if run["what"] == "race":
            races[what].append(run)
        elif run["what"] == "learn":
            by_steps[what].append(run)
        else:
            times[*what[:2], run.get("threads", 1)] = run["time_over_twin"][1]
    for what, told in sorted(races.items()):
        if max(run["seed"] for run in told) >= seeds - 1:
            print(heading(what))
            print(" seconds  seeds  tokens/parameter  mixture     twin  difference (of seeds)  multiplier")
            print_races(told)
    if together := started_together(runs):
        print_rule(together)
    if seeds > 1:
        return
    for (cell, recipe, threads), over in sorted(times.items()):
        print(f"\n{cell} ({recipe}), {threads} thread{'s' * (threads > 1)}: a step takes {over:.3f} of the twin's time")
    for what, told in sorted(by_steps.items()):
        print(heading(what))
        print("   steps  mixture     twin  difference  multiplier")
        print_learned(told)


def print_races(races: list[dict[str, Any]]) -> None:
    """All races of one cell on one text."""
    by_budget = defaultdict(list)
    for run in races:
        by_budget[run["seconds"]].append(run)
    mean = {
        (model, seconds): statistics.mean(run[model]["bits_per_byte"] for run in told)
        for seconds, told in by_budget.items()
        for model in MODELS
    }
    steep = slope({seconds: mean["twin", seconds] for seconds in by_budget})
    for seconds, told in sorted(by_budget.items()):
        gaps = [gap(run) for run in told]
        spread = f"({min(gaps):+.4f} to {max(gaps):+.4f})" if len(gaps) > 1 else ""
        mixture, twin = (mean[model, seconds] for model in MODELS)
        line = f"{seconds:8} {len(told):6} {statistics.mean(map(often, told)):17.1f} {mixture:8.4f} {twin:8.4f}"
        print(shown(f"{line} {mixture - twin:+8.4f} {spread:22} {math.exp((mixture - twin) / steep):6.2f}"))


def print_rule(races: list[dict[str, Any]]) -> None:
    found, low, high = rule(races)
    print(f"\nwith a common start the line through all races crosses zero at {found:.1f} tokens a parameter", end=" ")
    print(f"({low:.1f} to {high:.1f})")


def rule(races: list[dict[str, Any]], draws: int = 2000) -> tuple[float, float, float]:
    """Tokens per parameter at which the line through all races crosses zero, and between which numbers nine tenths of
    the lines do that go through cells and texts drawn anew, each with all of its races (bootstrap)."""
    groups = defaultdict(list)
    for run in races:
        groups[run["cell"], run["data"]].append(run)
    chance, crossings = random.Random(0), []
    for drawn in [list(groups.values()), *(chance.choices(list(groups.values()), k=len(groups)) for _ in range(draws))]:
        together = [run for group in drawn for run in group]
        if len({often(run) for run in together}) > 1:
            steep, level = line(together)
            crossings.append(math.exp(-level / steep) if steep < 0 else math.inf)
    low, *_, high = statistics.quantiles(crossings[1:], n=20)
    return crossings[0], low, high


def line(races: list[dict[str, Any]]) -> tuple[float, float]:
    """Slope and intercept of their difference over the logarithm of tokens per parameter."""
    return statistics.linear_regression([math.log(often(run)) for run in races], list(map(gap, races)))


def draw(races: list[dict[str, Any]], png: Path) -> None:
    """Each race as a point, its difference over its tokens per parameter, and the line through all."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    axes = Figure(figsize=(10, 5), dpi=130, layout="constrained").add_subplot()
    axes.axhline(0, color="#999999", linewidth=1)
    groups = defaultdict(list)
    for run in races:
        groups[run["data"], config(run["cell"], {}).model.dim].append(run)
    colour = dict(zip(sorted({text for text, _ in groups}), COLOURS, strict=False))
    for (text, width), told in sorted(groups.items()):
        points = [list(map(often, told)), list(map(gap, told))]
        axes.plot(*points, MARKERS[width], color=colour[text], label=f"{text}, width {width}")
    steep, level = line(races)
    ends = [min(map(often, races)), max(map(often, races))]
    axes.plot(ends, [level + steep * math.log(end) for end in ends], "--", color="#555555", label="line through all")
    axes.set(xscale="log", xlabel="tokens for each parameter at work", ylabel="bits per byte, mixture less twin")
    axes.set_xticks([5, 10, 20, 40, 80])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.figure.savefig(png)


def print_learned(runs: list[dict[str, Any]]) -> None:
    """All runs of one cell on one text that ended after a number of steps."""
    bits: dict[int, dict[str, dict[int, float]]] = defaultdict(lambda: {model: {} for model in MODELS})
    for run in runs:
        bits[run["steps"]][run["model"]][run["seed"]] = run["bits_per_byte"]
    steep = slope({steps: statistics.mean(by["twin"].values()) for steps, by in bits.items() if by["twin"]})
    for steps, by in sorted(bits.items()):
        if both := by["mixture"].keys() & by["twin"].keys():  # seeds
            mixture, twin = (statistics.mean(by[model][seed] for seed in both) for model in MODELS)
            over = mixture - twin
            print(shown(f"{steps:8} {mixture:8.4f} {twin:8.4f} {over:+11.4f} {math.exp(over / steep):11.2f}"))


def started_together(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The races whose experts had a common start. A recipe that is known no more counts as that of its preset."""

    def tied(run: dict[str, Any]) -> bool:
        return config(run["cell"], RECIPES.get(run["recipe"], {})).schedule.tied_experts > 0

    return [run for run in runs if run["what"] == "race" and tied(run)]


def gap(race: dict[str, Any]) -> float:
    return float(race["mixture"]["bits_per_byte"] - race["twin"]["bits_per_byte"])


def often(race: dict[str, Any]) -> float:
    """Tokens that the mixture read for each of its parameters at work."""
    return float(race["mixture"]["tokens"] / race["mixture"]["active"])


def slope(bits: dict[int, float]) -> float:
    """Bits per byte over the logarithm of a budget; nan for a single budget."""
    if len(bits) < 2:
        return math.nan
    return statistics.linear_regression([math.log(budget) for budget in bits], list(bits.values())).slope


def shown(line: str) -> str:
    return line.replace("nan", "  ?").rstrip()


def heading(cell: tuple[str, ...]) -> str:
    return "\n{} ({}), {}".format(*cell)


if __name__ == "__main__":
    main()
