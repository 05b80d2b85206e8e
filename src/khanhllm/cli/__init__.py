"""The front door: `khanhllm VERB ...`. Each verb imports what it needs only when it runs, so help is instant.

Wrong input of any kind is one line on stderr and exit code 2.
"""

import argparse
import inspect
import io
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable

from khanhllm.cli import data_verbs, verbs
from khanhllm.cli.arguments import Parser, Raw
from khanhllm.errors import UserError

EXAMPLES = """examples:
  khanhllm demo                              the whole story in a few minutes, offline
  khanhllm train nano --data my-texts/       your own text, a small model
  khanhllm train mini --data stdlib --optim.lr 1e-3 --run runs/first
  khanhllm generate runs/first --prompt "def main("
"""


def main(arguments: list[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    # torch's hint that it takes the plain form of a norm; it helps nobody who only trains
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
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
    choices = top.add_subparsers(metavar="VERB", required=True, parser_class=Parser)
    for verb, add_options in VERBS.items():
        text = inspect.cleandoc(verb.__doc__ or "")
        parser = choices.add_parser(
            verb.__name__, help=text.splitlines()[0], description=text, formatter_class=Raw, allow_abbrev=False
        )
        parser.set_defaults(verb=verb, parser=parser)
        add_options(parser)
    return top


VERBS: dict[Callable[[argparse.Namespace], int | None], Callable[[argparse.ArgumentParser], None]] = {
    verbs.demo: verbs.demo_options,
    verbs.train: verbs.train_options,
    verbs.compare: verbs.compare_options,
    verbs.upcycle: verbs.upcycle_options,
    verbs.generate: verbs.generate_options,
    verbs.evaluate: verbs.evaluate_options,
    verbs.doctor: verbs.doctor_options,
    verbs.plan: verbs.plan_options,
    verbs.bench: verbs.bench_options,
    data_verbs.tokenizer: data_verbs.tokenizer_options,
    data_verbs.prepare: data_verbs.prepare_options,
    data_verbs.data: data_verbs.data_options,
    verbs.chaos: verbs.chaos_options,
}
