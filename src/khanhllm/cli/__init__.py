"""Train, run and examine small language models."""

import argparse
import importlib
import inspect
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from keyword import iskeyword

import shtab

from khanhllm import __version__
from khanhllm.cli.arguments import Parser, Raw
from khanhllm.errors import drain, in_a_line
from khanhllm.explain import did_you_mean

# Each verb imports what it needs only when it runs, so that help is instant.
VERBS = {
    "training": ("train", "demo"),
    "runs": ("runs", "generate", "evaluate", "compare", "upcycle"),
    "chat": ("tune", "chat"),
    "export": ("export", "import"),
    "serve": ("serve",),
    "planning": ("plan",),
    "data": ("tokenizer", "prepare", "data"),
    "lab": ("doctor", "experts", "lab", "bench", "chaos"),
}
"""the module of this folder that has each verb as a function, and NAME_options beside it"""

EXAMPLES = """examples:
  khanhllm demo                              the whole way in a few minutes, offline
  khanhllm train nano --data my-texts/       your own text, a small model
  khanhllm train hour --data my-texts/ --for 30m --run runs/first
  khanhllm generate runs/first --prompt "Once upon a time"
  khanhllm help train                        every option of a verb
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; its exit code. Wrong input of any kind is one line on stderr and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    # torch's hint that it takes the plain form of a norm; it helps nobody who only trains
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    words = sys.argv[1:] if arguments is None else arguments
    try:
        options = _parsed(words)
        code = int(options.verb(options) or 0)
        if sys.stdout:
            sys.stdout.flush()  # now, where a full disk can still be told in one line
        return code
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:
        return _unheard()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # what rich makes of it
            return _unheard()
        raise
    except Exception as error:
        drain()
        text, code = in_a_line(error)
        verb = f"{words[0]}: " if isinstance(error, ModuleNotFoundError) and code == 2 else ""
        return _complain(verb + text, code) if text else code  # else it is said elsewhere


def _unheard() -> int:
    """The reader of our output has gone, as `head` does: the code of a program that SIGPIPE ends."""
    drain()
    return 141


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = _parser()
    words = _help_words(arguments, parser)
    verbs = [verb for verbs in VERBS.values() for verb in verbs]
    if not words[0].startswith("-") and words[0] not in verbs:
        known = f"{did_you_mean(words[0], verbs)}; verbs: {', '.join(verbs)}"
        parser.error(f"unknown verb {words[0][:60]!r}{known}")
    options, unknown = parser.parse_known_args(words)
    if unknown:
        options.parser.refuse(unknown[0])
    return options


def _help_words(words: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Nothing typed, `help` and `help VERB` as what argparse knows."""
    if not words or words == ["help"]:
        return ["--help"]
    if words[0] == "help" and len(words) > 2:
        parser.error(f"help takes one verb, and {words[2][:60]!r} is one word too many")
    return [words[1], "--help"] if words[0] == "help" else words


def _complain(text: str, code: int) -> int:
    print(f"khanhllm: {' '.join(text.split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    top = Parser(prog="khanhllm", description=__doc__, epilog=EXAMPLES, formatter_class=Raw)
    top.add_argument("--version", action="version", version=f"khanhllm {__version__}")
    shtab.add_argument_to(top, help="print a script that makes this shell complete the commands of khanhllm")
    choices = top.add_subparsers(metavar="VERB", required=True, parser_class=Parser)
    for name, verb, add_options in _verbs():
        text = inspect.cleandoc(verb.__doc__ or "")
        parser = choices.add_parser(
            name, help=text.splitlines()[0], description=text, formatter_class=Raw, allow_abbrev=False
        )
        parser.set_defaults(verb=verb, parser=parser)
        add_options(parser)
    return top


def _verbs() -> Iterator[
    tuple[str, Callable[[argparse.Namespace], int | None], Callable[[argparse.ArgumentParser], None]]
]:
    for module, verbs in VERBS.items():
        found = importlib.import_module(f"khanhllm.cli.{module}")
        for verb in verbs:
            yield verb, getattr(found, verb + "_" * iskeyword(verb)), getattr(found, f"{verb}_options")
