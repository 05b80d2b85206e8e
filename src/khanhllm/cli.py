"""The front door: `khanhllm VERB ...`. Each verb imports what it needs only when it runs, so help is instant.

Wrong input of any kind is one line on stderr and exit code 2.
"""

import argparse
import inspect
import io
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from khanhllm.arguments import Parser, Raw, given, knobs, short
from khanhllm.config import Config, Sampling, UserError
from khanhllm.settings import amount, checked, preset, preset_names, read_toml, resolve, seconds

EXAMPLES = """examples:
  khanhllm demo                              the whole story in a few minutes, offline
  khanhllm train nano --data my-texts/       your own text, a small model
  khanhllm train mini --data stdlib --optim.lr 1e-3 --run runs/first
  khanhllm generate runs/first --prompt "def main("
"""


def main(arguments: list[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    options, unknown = _parser().parse_known_args(arguments)
    if unknown:
        options.parser.refuse(unknown[0])
    try:
        return int(options.verb(options) or 0)
    except UserError as error:
        return _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        sys.stderr.close()
        return 0
    except Exception as error:
        return _complain(_unforeseen(error), 1)


def _complain(text: str, code: int) -> int:
    print(f"khanhllm: {' '.join(text.split())}", file=sys.stderr)
    return code


def _unforeseen(error: Exception) -> str:
    """One line even for what we did not foresee; the details go to a file."""
    with tempfile.NamedTemporaryFile("w", prefix="khanhllm-", suffix=".txt", delete=False) as report:
        traceback.print_exc(file=report)
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first} (unforeseen; the details are in {report.name})"


def _parser() -> argparse.ArgumentParser:
    top = Parser(prog="khanhllm", description=__doc__.partition("\n")[0], epilog=EXAMPLES, formatter_class=Raw)
    verbs = top.add_subparsers(metavar="VERB", required=True, parser_class=Parser)
    for verb, add_options in VERBS.items():
        text = inspect.cleandoc(verb.__doc__ or "")
        name = verb.__name__.strip("_")
        parser = verbs.add_parser(
            name, help=text.splitlines()[0], description=text, formatter_class=Raw, allow_abbrev=False
        )
        parser.set_defaults(verb=verb, parser=parser)
        add_options(parser)
    return top


def _train(options: argparse.Namespace) -> None:
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
    from khanhllm import train

    train.run(_twin(options, config), folder, resume=options.resume)


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
    from khanhllm.twin import dense_twin

    if options.resume:
        raise UserError("--twin begins a run of its own; to go on with one, leave it out")
    return config.model_copy(update={"model": dense_twin(config.model, options.twin)})


def _train_options(parser: argparse.ArgumentParser) -> None:
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


def _tokenizer(options: argparse.Namespace) -> None:
    """Train a byte-level BPE tokenizer on text and write it, with a readable vocab.txt beside it."""
    from khanhllm.data.prepare import train_on

    out = Path(options.out)
    config = resolve({"model": {"vocab_size": options.vocab_size}, "data": {"tokenizer_sample": options.sample}})
    tokenizer = train_on(options.data, config.model.vocab_size, config.data.tokenizer_sample, clean=options.clean)
    tokenizer.save(out)
    print(f"{out}: {tokenizer.vocab_size:,} tokens; readable in {out.with_name('vocab.txt')}")


def _tokenizer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="SRC", required=True, help="where the text comes from")
    parser.add_argument("--vocab-size", metavar="N", default="50000", help="tokens, special ones included (50000)")
    parser.add_argument("--out", metavar="FILE", default="tokenizer.json", help="the file to write (tokenizer.json)")
    parser.add_argument("--clean", metavar="STEPS", default="", help="as in `khanhllm prepare` (none)")
    parser.add_argument("--sample", metavar="BYTES", default="1000000000", help="most text to read (bytes, 1 GB)")


def _prepare(options: argparse.Namespace) -> None:
    """Turn text into token shards, once, for any number of runs: khanhllm train PRESET --data DIR.

    The shards are the same wherever they are made. What was interrupted goes on when the same command is typed again.
    """
    from khanhllm.data.executors import Place
    from khanhllm.data.prepare import prepare
    from khanhllm.tokenizer import Tokenizer

    data = {"validation": options.validation, "workers": options.workers, "tokens": options.tokens}
    config = resolve({"data": data}, where="prepare").data
    tokenizer = Tokenizer.load(Path(options.tokenizer))
    prepare(
        options.data,
        tokenizer,
        Path(options.out),
        validation=config.validation,
        tokens=config.tokens,
        clean=options.clean,
        place=Place(
            options.executor,
            options.tasks,
            config.workers,
            options.partition,
            options.time,
            options.cpus,
            options.mem_per_cpu,
        ),
    )


def _prepare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="SRC", required=True, help="where the text comes from")
    parser.add_argument("--tokenizer", metavar="FILE", required=True, help="tokenizer.json of `khanhllm tokenizer`")
    parser.add_argument("--out", metavar="DIR", required=True, help="the folder to write")
    parser.add_argument("--workers", metavar="N", default="0", help="processes; 0 means one for each core (0)")
    parser.add_argument(
        "--tokens", metavar="N", default="0", help="stop after this many training tokens; 0 means all (0)"
    )
    parser.add_argument("--validation", metavar="SHARE", default="0.01", help="share of documents held out (0.01)")
    parser.add_argument(
        "--clean", metavar="STEPS", default="", help='in order, as in "c4, language:en, gopher, minhash" (none)'
    )
    parser.add_argument("--executor", metavar="local|slurm|ray", default="local", help="where the tasks run (local)")
    parser.add_argument("--tasks", metavar="N", type=int, default=0, help="0 means one for each group of files (0)")
    parser.add_argument("--partition", metavar="NAME", default="", help="of slurm")
    parser.add_argument("--time", metavar="LIMIT", default="24:00:00", help="of a task of slurm (24:00:00)")
    parser.add_argument("--cpus", metavar="N", type=int, default=1, help="of a task of slurm (1)")
    parser.add_argument("--mem-per-cpu", metavar="GIB", type=int, default=2, help="of a task of slurm (GiB, 2)")


def _data(options: argparse.Namespace) -> None:
    """Look at text before it is learned from, or verify prepared shards.

    show SRC: a few documents with the boundaries of their tokens, how long documents are, how many bytes a token
    holds, what the source is made of, and what cannot be read. SRC is any source of text or a folder of shards.
    verify DIR: every file of a folder of shards against the hashes in its manifest.
    """
    from khanhllm import look

    if options.action == "show":
        look.show(options.source, options.tokenizer, options.documents, options.sample)
    elif options.tokenizer:
        raise UserError("verify takes no --tokenizer: a folder of shards holds its own")
    else:
        look.verify(Path(options.source))


def _data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["show", "verify"], metavar="show|verify", help="what to do")
    parser.add_argument("source", metavar="SRC", help="where the text comes from, or a folder of prepared shards")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json, to see tokens in a source of text")
    parser.add_argument("--documents", metavar="N", type=int, default=3, help="documents to print (3)")
    parser.add_argument("--sample", metavar="N", type=int, default=1000, help="documents to measure (1000)")


def _compare(options: argparse.Namespace) -> None:
    """Hold runs against each other: loss against steps, tokens, arithmetic and time, in one picture and a table."""
    from khanhllm import compare

    compare.show([Path(run) for run in options.runs], Path(options.out))


def _compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--out", metavar="PNG", default="compare.png", help="the picture to write (compare.png)")


def _generate(options: argparse.Namespace) -> None:
    """Let a trained model continue a prompt; the text streams as it is made."""
    sampling = checked(Sampling, {key: getattr(options, key) for key in Sampling.model_fields}, "generate")
    machine = resolve(given(options)).machine
    from khanhllm.draw import visible
    from khanhllm.generate import write
    from khanhllm.saved import open_run

    saved = open_run(Path(options.run), machine)
    shown = visible if sys.stdout.isatty() else str
    print(options.prompt, end="", flush=True)
    for piece in write(saved.model, saved.tokenizer, saved.machine, options.prompt, sampling):
        print(shown(piece), end="", flush=True)
    print()


def _generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--prompt", metavar="TEXT", default="", help="text to continue; empty begins a fresh document")
    for key, field in Sampling.model_fields.items():
        text = f"{field.description} (default {field.default})"
        parser.add_argument(f"--{key.replace('_', '-')}", metavar="N", default=field.default, help=text)
    knobs(parser, ["machine"])


def _evaluate(options: argparse.Namespace) -> None:
    """Validation cross entropy (nats per token) and bits per byte of a run, over every byte of the text."""
    from khanhllm.evaluate import score_run

    score = score_run(Path(options.run), options.data, resolve(given(options)).machine)
    if options.json:
        print(json.dumps(score))
    else:
        print(f"cross entropy  {score['val_ce']:.4f} nats per token   ({score['val_tokens']:,} tokens)")
        print(f"bits per byte  {score['val_bpb']:.4f}                   ({score['val_bytes']:,} bytes)")


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--data", metavar="SRC", help="text to score, all of it (default: what the run held out)")
    parser.add_argument("--json", action="store_true", help="one JSON object: val_ce, val_bpb, val_bytes, val_tokens")
    knobs(parser, ["machine"])


def _doctor(options: argparse.Namespace) -> int:
    """Examine a preset or a run: no leak from the future, a sane start, equal roads, devices and libraries."""
    from khanhllm import doctor

    return doctor.examine(options.patient, resolve(given(options)).machine, as_json=options.json)


def _doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "patient", metavar="PRESET_OR_RUN", help=f"a run folder, or one of: {', '.join(preset_names())}"
    )
    parser.add_argument("--json", action="store_true", help="verdicts as one JSON object")
    knobs(parser, ["machine"])


def _plan(options: argparse.Namespace) -> None:
    """Will it fit, and how long will it take: memory, micro-batch, speed and date, before anything is trained.

    The step is rehearsed without memory, so the plan also works for a card that is not here.
    """
    config = resolve(preset(options.preset), given(options), where="plan")
    if options.card and options.measure:
        raise UserError("--measure runs on this machine, so it cannot go with --card")
    from khanhllm import plan

    plan.show(config, options.memory, options.card, options.measure, options.json)


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preset", metavar="PRESET", help=f"one of: {', '.join(preset_names())}")
    parser.add_argument("--memory", metavar="SIZE", help="memory to fill, as 8GB (default: what this machine has)")
    parser.add_argument("--card", metavar="NAME", help='a graphics card, as "RTX 4090"; it need not be here')
    parser.add_argument("--measure", action="store_true", help="run three real steps and show them beside the plan")
    parser.add_argument("--json", action="store_true", help="print it as one JSON object")
    knobs(parser)


def _bench(options: argparse.Namespace) -> None:
    """Measure this machine: a training step next to our dense twin and Hugging Face's, and the parts of the road.

    Parts: step, moe, decode, tokenizer, data; without one named, all of them (some minutes). Everything that was
    measured is written as JSON, with the machine and the versions.
    """
    from khanhllm import bench

    steps = resolve(short("train", "steps", options.steps), where="bench").train.steps
    out = Path(options.out) if options.out else None
    bench.run(options.parts, resolve(given(options)).machine, steps, out, options.json)


def _bench_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parts", nargs="*", metavar="PART", help="what to measure (default all)")
    parser.add_argument("--steps", metavar="N", default="20", help="turns that each contender takes (20)")
    parser.add_argument("--out", metavar="FILE", help="where the JSON goes (default bench/DATE-DEVICE.json)")
    parser.add_argument("--json", action="store_true", help="print it too")
    knobs(parser, ["machine"])


def _demo(options: argparse.Namespace) -> None:
    """The whole story in a few minutes, offline: text, tokenizer, shards, a hybrid model that learns and writes."""
    from khanhllm import demo

    demo.tell(Path(options.run), given(options))


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="DIR", default="runs/demo", help="the run folder (runs/demo)")
    knobs(parser)


def _chaos(options: argparse.Namespace) -> int:
    """Throw faults at a tiny run: kills, signals, full disks, damaged files, NaN, a failing network; count what it
    survives.

    Everything is compared with an undisturbed run, bit for bit. The same seed throws the same faults. --faults 2590
    throws all that the promises name, in about an hour on two cores; saves are cut short where strace is installed.
    """
    from khanhllm.chaos.run import checked

    return checked(options.seed, options.faults, options.minutes)


def _chaos_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="decides all faults (0)")
    parser.add_argument("--faults", metavar="N", type=int, default=150, help="how many to throw, about (150)")
    parser.add_argument(
        "--minutes", metavar="M", type=float, default=0, help="begin none after so many; 0: no limit (0)"
    )


VERBS: dict[Callable[[argparse.Namespace], int | None], Callable[[argparse.ArgumentParser], None]] = {
    _demo: _demo_options,
    _train: _train_options,
    _compare: _compare_options,
    _generate: _generate_options,
    _evaluate: _evaluate_options,
    _doctor: _doctor_options,
    _plan: _plan_options,
    _bench: _bench_options,
    _tokenizer: _tokenizer_options,
    _prepare: _prepare_options,
    _data: _data_options,
    _chaos: _chaos_options,
}
