"""Verbs that examine a model or measure this machine."""

import argparse
from pathlib import Path

from khanhllm.cli.arguments import WHICH, forward_knobs, given, knobs, name, number, short, some, which, whole
from khanhllm.errors import UserError
from khanhllm.settings import preset_names, resolve


def doctor(options: argparse.Namespace) -> int:
    """Check that a preset or a run is healthy: no leak from the future, a sane start, equal expert backends."""
    from khanhllm.lab import doctor

    return doctor.examine(options.patient, resolve(given(options), where="doctor").machine, as_json=options.json)


def doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "patient", metavar="PRESET_OR_RUN", type=name, help=f"a run folder, or one of: {', '.join(preset_names())}"
    )
    parser.add_argument("--json", action="store_true", help="verdicts as one JSON object")
    knobs(parser, ["machine"])


def experts(options: argparse.Namespace) -> None:
    """Examine the experts of a run: which tokens they get, how much of that is luck, what each one is worth.

    Prints a table and writes experts.json and a picture into the run. An expert is worth what it costs to close it: its
    tokens then go to the next best, or get one answer less. All is measured on text that the run held out, or on any
    other (--data), there also in parts (--part).
    """
    if not options.tokens:
        raise UserError("--tokens must be at least 1, got 0")
    from khanhllm.lab import rooms

    machine = resolve(given(options), where="experts").machine
    out = Path(options.out) if options.out else None
    opened = rooms.open_mixture(Path(options.run), machine, options.step, options.ablate)
    asked = (options.data, options.tokens, options.part, options.ablate, options.checkpoints)
    rooms.show(opened, *asked, options.json, out)


def experts_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=name, help="the folder of a run with mixture layers")
    parser.add_argument("--step", metavar="N|best", type=which, help=WHICH)
    parser.add_argument("--data", metavar="SRC", type=name, help="text to read (default: what the run held out)")
    parser.add_argument("--tokens", metavar="N", type=whole, default=200_000, help="how much of it to read (200k)")
    parser.add_argument("--part", choices=("file", "folder", "source"), help="tell these parts of --data apart")
    text = "experts to close, one by one: all, none or LAYER:EXPERT,... (all)"
    parser.add_argument("--ablate", metavar="WHICH", type=name, default="all", help=text)
    parser.add_argument("--checkpoints", action="store_true", help="compare with the earlier checkpoints of the run")
    parser.add_argument("--json", action="store_true", help="print experts.json instead of the table")
    parser.add_argument("--out", metavar="PNG", type=name, help="where the picture goes (RUN/experts.png)")
    forward_knobs(parser)


def lab(options: argparse.Namespace) -> None:
    """Run an experiment that shows what a mixture of experts is good for.

    facts: a mixture and its dense twins, one of equal arithmetic and one of equal parameters, learn made-up facts by
    heart for the same seconds. How much each one holds is counted in bits. Writes facts.json and a picture.
    """
    from khanhllm.lab import recall

    machine = resolve(given(options), where="lab").machine
    recall.show(options.facts, options.seconds, options.seeds, machine, options.json, Path(options.out))


def lab_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", choices=["facts"], metavar="facts", help="which experiment")
    parser.add_argument("--facts", metavar="N", type=some, default=5000, help="how many there are to learn (5000)")
    parser.add_argument("--seconds", metavar="S", default="50", help="time that each model trains (seconds, 50)")
    parser.add_argument("--seeds", metavar="K", type=some, default=3, help="repetitions, each with other facts (3)")
    parser.add_argument("--json", action="store_true", help="print facts.json instead of the table")
    parser.add_argument(
        "--out", metavar="DIR", type=name, default="bench/facts", help="the folder to write (bench/facts)"
    )
    knobs(parser, ["machine"])


def bench(options: argparse.Namespace) -> None:
    """Measure how fast this machine trains, next to our dense twin and Hugging Face's model, and the parts alone.

    Parts: step, moe, decode, tokenizer, data; without one named, all of them (some minutes). All measurements go
    into a JSON file, with the machine and the versions.
    """
    from khanhllm.lab import bench

    names = {"train.steps": "--steps"}
    steps = resolve(short("train", "steps", options.steps), where="bench", names=names).train.steps
    out = Path(options.out) if options.out else None
    bench.run(options.parts, resolve(given(options), where="bench").machine, steps, out, options.json)


def bench_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parts", nargs="*", metavar="PART", help="what to measure (default all)")
    parser.add_argument("--steps", metavar="N", default="20", help="turns that each candidate takes (20)")
    parser.add_argument("--out", metavar="FILE", type=name, help="where the JSON goes (default bench/DATE-DEVICE.json)")
    parser.add_argument("--json", action="store_true", help="print it too")
    knobs(parser, ["machine"])


def chaos(options: argparse.Namespace) -> int:
    """Inject faults into a tiny training run and report which it survives.

    Kills, signals, full disks, damaged files, NaN, a failing network, clients that vanish, and what can happen to one
    of several processes. Every run is compared with an undisturbed one, bit for bit. The same seed injects the same
    faults. --faults 3790 injects all that docs/reliability.md reports, in one or two hours on two cores; saves are cut
    short where strace is installed.
    """
    from khanhllm.chaos.run import checked

    return checked(options.seed, options.faults, options.minutes, options.only)


def chaos_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", metavar="N", type=whole, default=0, help="decides all faults (0)")
    parser.add_argument("--faults", metavar="N", type=whole, default=150, help="how many to inject, about (150)")
    parser.add_argument(
        "--minutes", metavar="M", type=number, default=0, help="begin none after so many; 0: no limit (0)"
    )
    parser.add_argument("--only", metavar="WORD", default="", help="only the kinds with this in their name, as network")
