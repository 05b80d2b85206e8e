"""Verbs that use a trained model."""

import argparse
import json
import sys
from pathlib import Path

from khanhllm.cli.arguments import given, knobs
from khanhllm.schema import Sampling
from khanhllm.settings import checked, resolve


def generate(options: argparse.Namespace) -> None:
    """Continue a prompt with a trained model; the text streams as it is made."""
    sampling = checked(Sampling, {key: getattr(options, key) for key in Sampling.model_fields}, "generate")
    machine = resolve(given(options)).machine
    from khanhllm.draw import visible
    from khanhllm.runs.run import open_run

    opened = open_run(Path(options.run), machine)
    opened.machine.take_process()
    shown = visible if sys.stdout.isatty() else str
    print(options.prompt, end="", flush=True)
    for piece in opened.stream(options.prompt, **sampling.model_dump()):
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
    """Measure the cross entropy (nats per token) and the bits per byte of a run on text that it held out."""
    machine = resolve(given(options)).machine
    from khanhllm.runs.evaluate import score_opened
    from khanhllm.runs.run import open_run

    opened = open_run(Path(options.run), machine)
    opened.machine.take_process()
    score = score_opened(opened, options.data)
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


def compare(options: argparse.Namespace) -> None:
    """Compare runs in a table and a picture: loss against steps, tokens, arithmetic and time."""
    from khanhllm.log import compare

    compare.show([Path(run) for run in options.runs], Path(options.out))


def compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--out", metavar="PNG", default="compare.png", help="the picture to write (compare.png)")


def upcycle(options: argparse.Namespace) -> None:
    """Turn a dense run into a mixture whose experts begin as copies of its layers, in a run folder of its own.

    `khanhllm train --resume --run OUT --steps N` continues from there, with rows that the dense run had not reached.
    """
    from khanhllm.runs.upcycle import upcycle

    upcycle(Path(options.run), Path(options.out), options.pattern, options.experts, options.experts_per_token)
    print(f"{options.out} computes what {options.run} did; to continue: khanhllm train --resume --run {options.out}")


def upcycle_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a dense run, such as --twin trains")
    parser.add_argument("--out", metavar="DIR", required=True, help="the run folder to write")
    parser.add_argument("--pattern", default="", help="D or M for each layer (every other one becomes a mixture)")
    parser.add_argument("--experts", metavar="N", type=int, default=8, help="experts in each mixture layer (8)")
    parser.add_argument("--experts-per-token", metavar="K", type=int, default=2, help="experts for each token (2)")
