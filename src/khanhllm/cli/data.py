"""Verbs that look at text and make tokens of it."""

import argparse
from pathlib import Path

from khanhllm.cli.arguments import name, whole
from khanhllm.errors import UserError
from khanhllm.files import check_writable
from khanhllm.settings import resolve

DOCUMENTS, SAMPLE = 3, 1000
"""to print, and to measure"""


def tokenizer(options: argparse.Namespace) -> None:
    """Train a byte-level BPE tokenizer on text and write it, with a readable vocab.txt beside it."""
    from khanhllm.data.prepare import train_on

    out = Path(options.out)
    if out.name.lower() == "vocab.txt":
        raise UserError(f"--out {out}: the readable list beside the tokenizer has this name; choose another")
    asked = {
        "model": {"vocab_size": options.vocab_size},
        "data": {"tokenizer_sample": options.sample, "bad": options.bad},
    }
    names = {"model.vocab_size": "--vocab-size", "data.tokenizer_sample": "--sample", "data.bad": "--bad"}
    config = resolve(asked, where="tokenizer", names=names)
    check_writable(out)
    tokenizer = train_on(
        options.data, config.model.vocab_size, config.data.tokenizer_sample, clean=options.clean, bad=config.data.bad
    )
    tokenizer.save(out)
    print(f"{out}: {tokenizer.vocab_size:,} tokens; readable in {out.with_name('vocab.txt')}")


def tokenizer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="SRC", required=True, help="where the text comes from")
    parser.add_argument("--vocab-size", metavar="N", default="50000", help="tokens, special ones included (50000)")
    parser.add_argument(
        "--out", metavar="FILE", type=name, default="tokenizer.json", help="the file to write (tokenizer.json)"
    )
    parser.add_argument("--clean", metavar="STEPS", default="", help="as in `khanhllm prepare` (none)")
    parser.add_argument("--bad", metavar="refuse|skip", default="refuse", help="as in `khanhllm prepare` (refuse)")
    parser.add_argument("--sample", metavar="BYTES", default="1000000000", help="most text to read (bytes, 1 GB)")


def prepare(options: argparse.Namespace) -> None:
    """Turn text into token shards once, for any number of runs (khanhllm train PRESET --data DIR).

    The shards are the same wherever they are made. After an interruption, the same command continues.
    """
    from khanhllm.data.executors import Execution
    from khanhllm.data.prepare import prepare
    from khanhllm.data.tokenizer import Tokenizer

    data = {"validation": options.validation, "workers": options.workers, "tokens": options.tokens, "bad": options.bad}
    config = resolve({"data": data}, where="prepare", names={f"data.{key}": f"--{key}" for key in data}).data
    tokenizer = Tokenizer.load(Path(options.tokenizer))
    prepare(
        options.data,
        tokenizer,
        Path(options.out),
        validation=config.validation,
        tokens=config.tokens,
        clean=options.clean,
        bad=config.bad,
        execution=Execution(
            options.executor,
            options.tasks,
            config.workers,
            options.partition,
            options.time,
            options.cpus,
            options.mem_per_cpu,
        ),
    )


def prepare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="SRC", required=True, help="where the text comes from")
    parser.add_argument(
        "--tokenizer", metavar="FILE", type=name, required=True, help="tokenizer.json of `khanhllm tokenizer`"
    )
    parser.add_argument("--out", metavar="DIR", type=name, required=True, help="the folder to write")
    parser.add_argument("--workers", metavar="N", default="0", help="processes; 0 means one for each core (0)")
    parser.add_argument(
        "--tokens", metavar="N", default="0", help="stop after this many training tokens; 0 means all (0)"
    )
    parser.add_argument("--validation", metavar="SHARE", default="0.01", help="share of documents held out (0.01)")
    parser.add_argument(
        "--clean", metavar="STEPS", default="", help='in order, as in "c4, spans, language:en, gopher, minhash" (none)'
    )
    parser.add_argument(
        "--bad", metavar="refuse|skip", default="refuse", help="files that cannot be read: end, or skip them (refuse)"
    )
    parser.add_argument("--executor", metavar="local|slurm|ray", default="local", help="where the tasks run (local)")
    parser.add_argument("--tasks", metavar="N", type=whole, default=0, help="0 means one for each group of files (0)")
    parser.add_argument("--partition", metavar="NAME", default="", help="of slurm")
    parser.add_argument("--time", metavar="LIMIT", default="24:00:00", help="of a task of slurm (24:00:00)")
    parser.add_argument("--cpus", metavar="N", type=whole, default=1, help="of a task of slurm (1)")
    parser.add_argument("--mem-per-cpu", metavar="GIB", type=whole, default=2, help="of a task of slurm (GiB, 2)")


def data(options: argparse.Namespace) -> None:
    """Show what a source of text holds, or verify prepared shards.

    show SRC prints a few documents with the boundaries of their tokens, the lengths of documents, the bytes that a
    token holds, what the source is made of, and what cannot be read. SRC is any source of text or a folder of shards.
    verify DIR compares every file of a folder of shards with the hashes in its manifest.
    """
    from khanhllm.data import inspect

    if options.action == "show":
        inspect.show(options.source, options.tokenizer, options.documents, options.sample)
    elif options.tokenizer:
        raise UserError("verify takes no --tokenizer: a folder of shards holds its own")
    elif (options.documents, options.sample) != (DOCUMENTS, SAMPLE):
        raise UserError("verify takes no --documents and no --sample: it reads every file")
    else:
        inspect.verify(Path(options.source))


def data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["show", "verify"], metavar="show|verify", help="what to do")
    parser.add_argument(
        "source", metavar="SRC", type=name, help="where the text comes from, or a folder of prepared shards"
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", type=name, help="tokenizer.json, to see tokens in a source of text"
    )
    parser.add_argument("--documents", metavar="N", type=whole, default=DOCUMENTS, help="documents to print (3)")
    parser.add_argument("--sample", metavar="N", type=whole, default=SAMPLE, help="documents to measure (1000)")
