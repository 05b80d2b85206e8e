"""What each verb does with a command line; the verbs that make data are in data_verbs.py."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from khanhllm.cli.arguments import given, knobs, short
from khanhllm.errors import UserError
from khanhllm.schema import Config, Sampling
from khanhllm.settings import amount, checked, preset, preset_names, read_toml, resolve, seconds


def train(options: argparse.Namespace) -> None:
    """Train a model: a preset, perhaps a TOML file, perhaps single knobs; later ones win.

    The run folder keeps the resolved config.toml, which alone reproduces the run (--config), training_log.csv,
    samples.txt, the tokenizer and the newest checkpoints. Ctrl-C finishes the step, saves and exits; --resume goes on.
    """
    name = options.preset or (Path(options.config).stem if options.config is not None else None)
    name = f"{name}-twin" if name and options.twin else name
    folder = Path(options.run) if options.run else Path("runs") / name if name else None
    if folder is None:
        raise UserError(f"name a preset ({', '.join(preset_names())}), a --config FILE, or a --run to --resume")
    kept = folder / "config.toml"
    if options.resume and kept.exists():
        layers = [read_toml(kept)]
    else:
        layers = [preset(options.preset)] if options.preset else []
        if not layers and options.config is None:
            raise UserError(
                f"{folder} holds no run to resume; name a preset ({', '.join(preset_names())}) to begin one"
            )
    layers += [] if options.config is None else [read_toml(Path(options.config))]
    layers += [short("data", "source", options.data), given(options)]
    config = resolve(*layers, _length(options, resolve(*layers, where="train")), where="train")
    from khanhllm.training.run import train

    train(_twin(options, config), folder, resume=options.resume)


def _length(options: argparse.Namespace, config: Config) -> dict[str, dict[str, Any]]:
    """How long to train: the last of what was said counts, and not the preset's."""
    said = [name for name in ("steps", "time", "tokens") if getattr(options, name) is not None]
    if len(said) > 1:
        raise UserError("give one of --steps, --for and --tokens")
    if options.time is not None:
        return {"train": {"seconds": seconds(options.time)}}
    if options.tokens is not None:
        return {"train": {"steps": -(-amount(options.tokens) // config.tokens_per_step), "seconds": 0}}
    return {"train": {"steps": options.steps, "seconds": 0}} if said else {}


def _twin(options: argparse.Namespace, config: Config) -> Config:
    if not options.twin:
        return config
    from khanhllm.model.twin import dense_twin

    if options.resume:
        raise UserError("--twin begins a run of its own; to go on with one, leave it out")
    return config.model_copy(update={"model": dense_twin(config.model, options.twin)})


def train_options(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "khanhllm train [PRESET] [--config FILE] [--data SRC] [--run DIR] [--steps N | --for TIME | --tokens N]\n"
        "                      [--resume] [--section.key VALUE ...]"
    )
    parser.add_argument("preset", nargs="?", metavar="PRESET", help=f"one of: {', '.join(preset_names())}")
    parser.add_argument("--config", metavar="FILE", help="a whole TOML, or a few keys of one")
    parser.add_argument("--data", metavar="SRC", help="where the text comes from; the same as --data.source")
    parser.add_argument("--run", metavar="DIR", help="the run folder (default runs/PRESET)")
    parser.add_argument("--steps", metavar="N", help="optimizer steps; the same as --train.steps")
    parser.add_argument("--for", dest="time", metavar="TIME", help="time to train for, as 480s, 90m, 8h or 1d12h")
    parser.add_argument("--tokens", metavar="N", help="tokens to train on, as 300M or 5B")
    parser.add_argument(
        "--twin", choices=["active", "total"], help="train the dense model of equal arithmetic or equal parameters"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest intact checkpoint in the run folder"
    )
    knobs(parser)


def compare(options: argparse.Namespace) -> None:
    """Hold runs against each other: loss against steps, tokens, arithmetic and time, in one picture and a table."""
    from khanhllm.log import compare

    compare.show([Path(run) for run in options.runs], Path(options.out))


def compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--out", metavar="PNG", default="compare.png", help="the picture to write (compare.png)")


def upcycle(options: argparse.Namespace) -> None:
    """Turn a dense run into a mixture whose experts begin as copies of its layers, in a run folder of its own.

    `khanhllm train --resume --run OUT --steps N` goes on from there, with rows that the dense run had not reached.
    """
    from khanhllm.runs.upcycle import upcycle

    upcycle(Path(options.run), Path(options.out), options.pattern, options.experts, options.experts_per_token)
    print(f"{options.out} computes what {options.run} did; to go on: khanhllm train --resume --run {options.out}")


def upcycle_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a dense run, such as --twin trains")
    parser.add_argument("--out", metavar="DIR", required=True, help="the run folder to write")
    parser.add_argument("--pattern", default="", help="D or M for each layer (every other one becomes a mixture)")
    parser.add_argument("--experts", metavar="N", type=int, default=8, help="experts in each mixture layer (8)")
    parser.add_argument("--experts-per-token", metavar="K", type=int, default=2, help="experts for each token (2)")


def generate(options: argparse.Namespace) -> None:
    """Let a trained model continue a prompt; the text streams as it is made."""
    sampling = checked(Sampling, {key: getattr(options, key) for key in Sampling.model_fields}, "generate")
    machine = resolve(given(options)).machine
    from khanhllm.draw import visible
    from khanhllm.inference.generate import write
    from khanhllm.runs.run import open_run

    saved = open_run(Path(options.run), machine)
    shown = visible if sys.stdout.isatty() else str
    print(options.prompt, end="", flush=True)
    for piece in write(saved.model, saved.tokenizer, saved.machine, options.prompt, sampling):
        print(shown(piece), end="", flush=True)
    print()


def generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--prompt", metavar="TEXT", default="", help="text to continue; empty begins a fresh document")
    for key, field in Sampling.model_fields.items():
        text = f"{field.description} (default {field.default})"
        parser.add_argument(f"--{key.replace('_', '-')}", metavar="N", default=field.default, help=text)
    knobs(parser, ["machine"])


def evaluate(options: argparse.Namespace) -> None:
    """Validation cross entropy (nats per token) and bits per byte of a run, over every byte of the text."""
    from khanhllm.runs.evaluate import score_run

    score = score_run(Path(options.run), options.data, resolve(given(options)).machine)
    if options.json:
        print(json.dumps(score))
    else:
        print(f"cross entropy  {score['val_ce']:.4f} nats per token   ({score['val_tokens']:,} tokens)")
        print(f"bits per byte  {score['val_bpb']:.4f}                   ({score['val_bytes']:,} bytes)")


def evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--data", metavar="SRC", help="text to score, all of it (default: what the run held out)")
    parser.add_argument("--json", action="store_true", help="one JSON object: val_ce, val_bpb, val_bytes, val_tokens")
    knobs(parser, ["machine"])


def doctor(options: argparse.Namespace) -> int:
    """Examine a preset or a run: no leak from the future, a sane start, equal roads, devices and libraries."""
    from khanhllm.lab import doctor

    return doctor.examine(options.patient, resolve(given(options)).machine, as_json=options.json)


def doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "patient", metavar="PRESET_OR_RUN", help=f"a run folder, or one of: {', '.join(preset_names())}"
    )
    parser.add_argument("--json", action="store_true", help="verdicts as one JSON object")
    knobs(parser, ["machine"])


def plan(options: argparse.Namespace) -> None:
    """Will it fit, and how long will it take: memory, micro-batch, speed and date, before anything is trained.

    The step is rehearsed without memory, so the plan also works for a card that is not here.
    """
    config = resolve(preset(options.preset), given(options), where="plan")
    if options.card and options.measure:
        raise UserError("--measure runs on this machine, so it cannot go with --card")
    from khanhllm.planning import plan

    plan.show(config, options.memory, options.card, options.measure, options.json)


def plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preset", metavar="PRESET", help=f"one of: {', '.join(preset_names())}")
    parser.add_argument("--memory", metavar="SIZE", help="memory to fill, as 8GB (default: what this machine has)")
    parser.add_argument("--card", metavar="NAME", help='a graphics card, as "RTX 4090"; it need not be here')
    parser.add_argument("--measure", action="store_true", help="run three real steps and show them beside the plan")
    parser.add_argument("--json", action="store_true", help="print it as one JSON object")
    knobs(parser)


def bench(options: argparse.Namespace) -> None:
    """Measure this machine: a training step next to our dense twin and Hugging Face's, and the parts of the road.

    Parts: step, moe, decode, tokenizer, data; without one named, all of them (some minutes). Everything that was
    measured is written as JSON, with the machine and the versions.
    """
    from khanhllm.lab import bench

    steps = resolve(short("train", "steps", options.steps), where="bench").train.steps
    out = Path(options.out) if options.out else None
    bench.run(options.parts, resolve(given(options)).machine, steps, out, options.json)


def bench_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parts", nargs="*", metavar="PART", help="what to measure (default all)")
    parser.add_argument("--steps", metavar="N", default="20", help="turns that each candidate takes (20)")
    parser.add_argument("--out", metavar="FILE", help="where the JSON goes (default bench/DATE-DEVICE.json)")
    parser.add_argument("--json", action="store_true", help="print it too")
    knobs(parser, ["machine"])


def demo(options: argparse.Namespace) -> None:
    """The whole story in a few minutes, offline: text, tokenizer, shards, a hybrid model that learns and writes."""
    from khanhllm import demo

    demo.tell(Path(options.run), given(options))


def demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="DIR", default="runs/demo", help="the run folder (runs/demo)")
    knobs(parser)


def chaos(options: argparse.Namespace) -> int:
    """Throw faults at a tiny run: kills, signals, full disks, damaged files, NaN, a failing network; count what it
    survives.

    Everything is compared with an undisturbed run, bit for bit. The same seed throws the same faults. --faults 2590
    throws all that the promises name, in about an hour on two cores; saves are cut short where strace is installed.
    """
    from khanhllm.chaos.run import checked

    return checked(options.seed, options.faults, options.minutes)


def chaos_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="decides all faults (0)")
    parser.add_argument("--faults", metavar="N", type=int, default=150, help="how many to throw, about (150)")
    parser.add_argument(
        "--minutes", metavar="M", type=float, default=0, help="begin none after so many; 0: no limit (0)"
    )
