"""Verbs that use a trained model."""

import argparse
import json
import sys
import warnings
from pathlib import Path

from khanhllm.cli.arguments import (
    WHICH,
    forward_knobs,
    given,
    name,
    sampling_knobs,
    sampling_of,
    some,
    stop,
    utf8,
    which,
    whole,
)
from khanhllm.errors import UserError
from khanhllm.files import quoted, read
from khanhllm.settings import read_config, resolve

SETS = "eval-data"
"""the folder of the suite's sets"""
ITEMS = 500
"""most items of each set: the standard error of an accuracy is then about 2 %"""


def generate(options: argparse.Namespace) -> None:
    """Continue a prompt with a trained model; the text streams as it is made.

    A prompt on the command line holds its letters as they are: \\n is a backslash and an n. A file (--prompt-file) or
    the standard input (--prompt -) may hold any text, line breaks included, and is taken to the last byte. Several
    samples (--samples N) have the seeds S, S + 1, ... of --seed S.
    """
    sampling = sampling_of(options, "generate")
    machine = resolve(given(options), where="generate").machine
    read_config(Path(options.run))  # what is no run is refused before torch is loaded
    prompt = _prompt(options)
    from khanhllm.draw import on_terminal, visible
    from khanhllm.inference.sample import reseeded
    from khanhllm.runs.run import Forgotten, open_run

    opened = open_run(Path(options.run), machine, options.step)
    opened.machine.take_process()
    if lost := opened.forgotten(prompt):
        print(f"khanhllm: {lost}", file=sys.stderr)
    warnings.simplefilter("ignore", Forgotten)
    shown = visible if on_terminal() else str
    for nth in range(options.samples):
        own = reseeded(sampling, nth)
        pieces = opened.stream(prompt, options.stop, **own.model_dump())
        if options.json:
            print(json.dumps({"seed": own.seed, "text": "".join(pieces)}), flush=True)
            continue
        if options.samples > 1:
            print(f"--- seed {own.seed}")
        print(shown(prompt), end="", flush=True)
        for piece in pieces:
            print(shown(piece), end="", flush=True)
        print()


def _prompt(options: argparse.Namespace) -> str:
    """The text to continue: typed, from a file, or from the standard input. UserError if it is not UTF-8."""
    if options.prompt != "-" and not options.prompt_file:
        return str(options.prompt)
    place = options.prompt_file or "the standard input"
    try:
        if not options.prompt_file and sys.stdin is None:
            raise UserError("--prompt - reads standard input, which is closed")
        raw = read(Path(options.prompt_file)) if options.prompt_file else sys.stdin.buffer.read()
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the prompt from {place}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the prompt in {place} is not UTF-8 text") from None


def generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=name, help="a run folder")
    parser.add_argument("--step", metavar="N|best", type=which, help=WHICH)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt",
        metavar="TEXT",
        type=utf8,
        default="",
        help="text to continue; empty: a fresh document; -: the standard input",
    )
    prompt.add_argument("--prompt-file", metavar="FILE", type=name, help="a file with the text to continue (UTF-8)")
    parser.add_argument("--samples", metavar="N", type=some, default=1, help="continuations to write (1)")
    parser.add_argument(
        "--stop", metavar="TEXT", type=stop, action="append", default=[], help="end before this text; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="a JSON object for each sample, on a line: seed, text")
    sampling_knobs(parser)
    forward_knobs(parser)


def runs(options: argparse.Namespace) -> None:
    """List the runs of a folder, the newest first: steps, loss, best validation, size on disk."""
    from khanhllm.runs import listing

    found = listing.runs_in(Path(options.folder))
    print(json.dumps(found) if options.json else "\n".join(listing.lines(found)))


def runs_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", nargs="?", metavar="FOLDER", type=name, default="runs", help="where the run folders lie (runs)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON list, an object for each run")


def evaluate(options: argparse.Namespace) -> None:
    """Measure a run: bits per byte of text that it held out, the suite (--suite), or tasks of lm-eval (--tasks).

    The suite takes about a minute for a small model: bits per byte, BLiMP, LAMBADA, COPA, PIQA, ARC-easy, Winogrande as
    far as their files are there, and questions made by rule, with standard errors and what chance gives. It writes
    evaluation.json and a picture into the run. --tasks asks lm-evaluation-harness (the extra `eval`), and writes
    evaluation-tasks.json.
    """
    machine = resolve(given(options), where="evaluate").machine
    _check_together(options)
    read_config(Path(options.run))
    from khanhllm.runs.evaluate import score_opened
    from khanhllm.runs.run import open_run

    opened = open_run(Path(options.run), machine, options.step)
    opened.machine.take_process()
    out = Path(options.out) if options.out else None
    if options.suite:
        from khanhllm.lab import scores

        files, items = Path(options.files or SETS), options.items or ITEMS
        scores.show(opened, files, options.download, items, options.data, options.core, options.json, out)
        return
    if options.tasks:
        from khanhllm.lab import harness

        include = Path(options.include_path) if options.include_path else None
        harness.show(opened, options.tasks, include, options.items, options.json, out)
        return
    score = score_opened(opened, options.data)
    if options.json:
        print(json.dumps(score))
    else:
        print(f"cross entropy  {score['val_ce']:.4f} nats per token   ({score['val_tokens']:,} tokens)")
        print(f"bits per byte  {score['val_bpb']:.4f}                   ({score['val_bytes']:,} bytes)")


def _check_together(options: argparse.Namespace) -> None:
    """Raise UserError for an option without the one that it belongs to."""
    suite, tasks = bool(options.suite), bool(options.tasks)
    belongs = {
        "--files": (options.files, suite, "--suite"),
        "--download": (options.download, suite, "--suite"),
        "--core": (options.core, suite, "--suite"),
        "--include-path": (options.include_path, tasks, "--tasks"),
        "--items": (options.items, suite or tasks, "--suite or --tasks"),
        "--out": (options.out, suite or tasks, "--suite or --tasks"),
    }
    for option, (value, there, owner) in belongs.items():
        if value and not there:
            raise UserError(f"evaluate: {option} belongs to {owner}")
    if options.include_path and not Path(options.include_path).is_dir():
        raise UserError(f"evaluate: --include-path {options.include_path} is no folder")
    if tasks and options.data:
        raise UserError("evaluate: --tasks name their own data; leave out --data")


def _names(text: str) -> list[str]:
    """Names parted by commas."""
    if not (found := [part.strip() for part in text.split(",") if part.strip()]):
        raise argparse.ArgumentTypeError("names no task")
    return found


def evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=name, help="a run folder")
    parser.add_argument("--step", metavar="N|best", type=which, help=WHICH)
    text = "text to score (default: what the run held out): all of it, with --suite the first of each source"
    parser.add_argument("--data", metavar="SRC", type=name, help=text)
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--suite", action="store_true", help="the suite: sets of questions from files, and made by rule")
    way.add_argument("--tasks", metavar="NAMES", type=_names, help="tasks of lm-evaluation-harness, parted by commas")
    text = f"where the sets of the suite lie, as .jsonl or .jsonl.gz, also in folders below ({SETS})"
    parser.add_argument("--files", metavar="DIR", type=name, help=text)
    parser.add_argument("--download", action="store_true", help="fetch the sets that --files lacks, checked by sha256")
    parser.add_argument("--core", action="store_true", help="with --suite: DCLM's CORE too, from a context of 1,024 on")
    parser.add_argument(
        "--include-path", metavar="DIR", type=name, help="with --tasks: a folder with tasks of your own"
    )
    text = f"most items of each set (suite: {ITEMS}, of each of BLiMP's 67 paradigms a fifth of that; tasks: all)"
    parser.add_argument("--items", metavar="N", type=some, help=text)
    text = "where the scores go, with a picture beside it (RUN/evaluation.json, RUN/evaluation-tasks.json)"
    parser.add_argument("--out", metavar="JSON", type=name, help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    forward_knobs(parser)


def compare(options: argparse.Namespace) -> None:
    """Compare runs in a table and a picture: loss against steps, tokens, arithmetic and time."""
    from khanhllm.log import compare

    compare.show([Path(run) for run in options.runs], Path(options.out))


def compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", type=name, help="run folders")
    parser.add_argument(
        "--out", metavar="PNG", type=name, default="compare.png", help="the picture to write (compare.png)"
    )


def upcycle(options: argparse.Namespace) -> None:
    """Turn a dense run into a mixture whose experts begin as copies of its layers, in a run folder of its own.

    `khanhllm train --resume --run OUT --steps N` continues from there, with rows that the dense run had not reached.
    """
    from khanhllm.runs.upcycle import upcycle

    upcycle(Path(options.run), Path(options.out), options.pattern, options.experts, options.experts_per_token)
    way = f"khanhllm train --resume --run {quoted(options.out)}"
    print(f"{options.out} computes what {options.run} did; to continue: {way}")


def upcycle_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=name, help="the folder of a dense run, such as --twin trains")
    parser.add_argument("--out", metavar="DIR", type=name, required=True, help="the run folder to write")
    parser.add_argument("--pattern", default="", help="D or M for each layer (every other one becomes a mixture)")
    parser.add_argument("--experts", metavar="N", type=whole, default=8, help="experts in each mixture layer (8)")
    parser.add_argument("--experts-per-token", metavar="K", type=whole, default=2, help="experts for each token (2)")
