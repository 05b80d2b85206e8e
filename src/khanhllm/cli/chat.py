"""Verbs that teach a run to talk, and talk with it."""

import argparse
import sys
from pathlib import Path

from khanhllm.cli.arguments import (
    WHICH,
    forward_knobs,
    given,
    knobs,
    name,
    number,
    sampling_knobs,
    sampling_of,
    stop,
    utf8,
    which,
)
from khanhllm.files import quoted
from khanhllm.schema import Config
from khanhllm.settings import beside, read_config, resolve

REPLAY = 0.3
"""share of a tuning's rows that is text of its base"""


def tune(options: argparse.Namespace) -> int:
    """Teach a trained run to answer: train it on conversations, in a run folder of its own.

    The conversations are JSON lines, .json or parquet files: messages, conversations, instruction and output, prompt
    and completion, or question and answer (docs/chat.md). Only the answers count. A share of the rows is text of RUN,
    so that the model does not forget it; the log shows both. `khanhllm chat OUT` talks with the result, and
    `khanhllm train --resume --run OUT` continues after an interruption.
    """
    run, settings = Path(options.run), given(options)
    out = Path(options.out) if options.out else beside(run, "-chat")
    read_config(run)  # what is no run is refused before torch is loaded
    from khanhllm.machine.signals import exit_code
    from khanhllm.runs.tune import tune
    from khanhllm.training import run as training

    config = tune(
        run,
        out,
        options.data,
        epochs=options.epochs,
        replay=REPLAY if options.replay is None else options.replay,
        rate=options.rate,
        settings=settings,
    )
    stopped = training.train(config, out, resume=True)
    if not stopped:
        talks = config.train.targets == "answers"
        way = "to talk with it: khanhllm chat" if talks else "to see what it writes: khanhllm generate"
        print(f"{way} {quoted(out)}", file=sys.stderr)
    return exit_code(stopped)


def tune_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=name, help="the folder of a trained run")
    parser.add_argument("--data", metavar="SRC", required=True, help="where the conversations come from")
    parser.add_argument("--out", "--run", metavar="DIR", type=name, help="the run folder to write (RUN-chat)")
    parser.add_argument(
        "--epochs", metavar="N", type=number, default=3.0, help="how often it reads the conversations (3)"
    )
    parser.add_argument(
        "--replay", metavar="SHARE", type=number, help=f"share of the rows that is text of RUN ({REPLAY})"
    )
    parser.add_argument(
        "--rate",
        metavar="FACTOR",
        type=number,
        default=0.2,
        help="peaks of the learning rates, as a share of those that RUN was trained with (0.2)",
    )
    knobs(parser, [section for section in Config.model_fields if section != "model"])


def chat(options: argparse.Namespace) -> int:
    """Talk with a run that `khanhllm tune` taught to.

    /help lists what else can be typed. Ctrl-C ends an answer, Ctrl-D the conversation. On a pipe, each line but
    those and blank ones is a question; an empty line stands for an answer that cannot be given, and the exit code
    is then 2.
    """
    sampling = sampling_of(options, "chat")
    machine = resolve(given(options), where="chat").machine
    read_config(Path(options.run))
    from khanhllm.runs.run import open_run
    from khanhllm.runs.talk import Talk

    opened = open_run(Path(options.run), machine, options.step)
    opened.check_talks()
    opened.machine.take_process()
    return Talk(opened, sampling, options.system, options.stop).run()


def chat_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=name, help="a run folder that khanhllm tune wrote")
    parser.add_argument("--step", metavar="N|best", type=which, help=WHICH)
    parser.add_argument("--system", metavar="TEXT", type=utf8, default="", help="a system message (none)")
    parser.add_argument(
        "--stop",
        metavar="TEXT",
        type=stop,
        action="append",
        default=[],
        help="end answers before this text; repeatable",
    )
    sampling_knobs(parser)
    forward_knobs(parser)
