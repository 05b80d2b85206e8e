"""How a command line is read: errors of one line, and an option for every key of the config."""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from khanhllm import units
from khanhllm.errors import UserError
from khanhllm.explain import did_you_mean
from khanhllm.schema import Config, MachineConfig, Sampling
from khanhllm.settings import checked, nested

ELSEWHERE = {
    "batch_size": "micro_batch",
    "epochs": "steps",
    "gradient_accumulation_steps": "accumulation",
    "learning_rate": "lr",
    "max_new_tokens": "tokens",
    "max_steps": "steps",
    "max_tokens": "tokens",
    "n_embd": "dim",
    "n_head": "heads",
    "num_samples": "samples",
    "output": "out",
    "output_dir": "out",
    "wd": "weight_decay",
}
"""what other programs call our options"""


LENGTH = ("train.steps", "train.seconds")
SHORT = {
    "data": ("--data", ("data.source",)),
    "replay": ("--replay", ("data.replay",)),
    "steps": ("--steps", LENGTH),
    "time": ("--for", LENGTH),
    "tokens": ("--tokens", LENGTH),
}
"""options that decide keys of the config, which have options too"""


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line that says what to do."""

    def error(self, message: str) -> NoReturn:
        if "expected one argument" in message:
            option = message.removeprefix("argument ").partition(":")[0]
            choices = [action.choices for action in self._actions if option in action.option_strings and action.choices]
            message = f"{option} needs a value; write one that begins with a dash as {option}=-value"
            if choices:
                message = f"{option} needs a value: {' or '.join(map(str, choices[0]))}"
        message = re.sub(r"\S{100,}", lambda word: f"{word[0][:60]}...", message)  # such a word as nobody reads
        print(UserError(f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help"), file=sys.stderr)
        sys.exit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file)  # argparse's own says nothing of a reader that has gone, or of a full disk

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if sys.stdout:
            sys.stdout.flush()
        super().exit(status, message)

    def refuse(self, word: str) -> NoReturn:
        """Say of a word that it has no place here, and which option it may stand for."""
        if not word.startswith("-"):
            self.error(f"one word too many: {word[:60]!r}")
        option = word.partition("=")[0][:60]
        self.error(f"unknown option {option}{self._like(option)}")

    def _like(self, option: str) -> str:
        """The option that may be meant, in parentheses: --lr is --optim.lr, --batch-size is --train.micro_batch."""
        known = sorted(self._option_string_actions)
        key = option.strip("-").lower().replace("-", "_")
        key = ELSEWHERE.get(key, key)
        same = [name for name in known if name.strip("-").rpartition(".")[2].replace("-", "_") == key]
        return f" (did you mean {same[0]}?)" if same else did_you_mean(option, known)


class Raw(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)


def name(text: str) -> str:
    """The name of a file, folder or thing. An empty one is a shell variable that was not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    if "\0" in text:
        raise argparse.ArgumentTypeError("a name cannot hold a NUL character")
    return text


def whole(text: str) -> int:
    """A whole number from 0, such as 1000 or 10k."""
    if (number := units.whole(text)) is None:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0, such as 1000 or 10k (got {text[:60]!r})")
    return number


def _between(least: int, most: int, words: str) -> Callable[[str], int]:
    def read(text: str) -> int:
        if (number := units.whole(text)) is None or not least <= number <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from {words} (got {text[:60]!r})")
        return number

    return read


some = _between(1, 10**6, "1 to a million")
several = _between(2, 10_000, "2 to 10,000")


def utf8(typed: str) -> str:
    """A text for a model. Bytes of a command line that are not UTF-8 arrive as surrogates."""
    try:
        typed.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("is not UTF-8 text") from None
    return typed


def stop(typed: str) -> str:
    """A text that ends what a model writes."""
    if not typed:
        raise argparse.ArgumentTypeError("the text is empty")
    return utf8(typed)


WHICH = "the checkpoint to take: of a step, or the one with the best validation (the newest)"


def which(text: str) -> int | str:
    """The step of a checkpoint, or best."""
    return text if text == "best" else whole(text)


def number(text: str) -> float:
    try:
        return float(text[:100])
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number (got {text[:60]!r})") from None


def knobs(parser: argparse.ArgumentParser, sections: Iterable[str] = tuple(Config.model_fields)) -> None:
    """One option for each key of the config, with the config's own explanation."""
    for section in sections:
        kind: Any = Config.model_fields[section].annotation
        _options(parser, section, kind.model_fields)


def forward_knobs(parser: argparse.ArgumentParser) -> None:
    """One option for each key of [machine] that matters to a model that only computes, without training."""
    keys = ("device", "precision", "weights", "experts", "threads")
    _options(parser, "machine", {key: MachineConfig.model_fields[key] for key in keys})


def _options(parser: argparse.ArgumentParser, section: str, fields: Mapping[str, FieldInfo]) -> None:
    group = parser.add_argument_group(f"[{section}]")
    for key, field in fields.items():
        text = " ".join(f"{field.description} (default {field.default!r})".split()).replace("%", "%%")
        metavar = placeholder(field.annotation)
        group.add_argument(f"--{section}.{key}", metavar=metavar, help=text, default=argparse.SUPPRESS)


def sampling_knobs(parser: argparse.ArgumentParser) -> None:
    """One option for each key of `Sampling`."""
    for key, field in Sampling.model_fields.items():
        text = f"{field.description} (default {field.default})"
        parser.add_argument(f"--{key.replace('_', '-')}", metavar="N", default=field.default, help=text)


def sampling_of(options: argparse.Namespace, verb: str) -> Sampling:
    """What was typed for `sampling_knobs`. UserError if it cannot be."""
    names = {key: f"--{key.replace('_', '-')}" for key in Sampling.model_fields}
    return checked(Sampling, {key: getattr(options, key) for key in names}, verb, names)


def placeholder(kind: Any) -> str:
    """What may be typed for a value of this type: fp32|bf16, true|false|normed, VALUE|auto."""
    if get_origin(kind) in (Literal, Union):
        return "|".join(map(placeholder, get_args(kind)))
    return kind if isinstance(kind, str) else "true|false" if kind is bool else "VALUE"


def given(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The dotted options that were typed, as config settings. UserError for one typed in its short form too."""
    typed = {name: value for name, value in vars(options).items() if value is not None}
    for dest, (option, keys) in SHORT.items():
        for key in keys:
            if dest in typed and key in typed:
                raise UserError(f"give one of {option} and --{key}")
    return nested({name: value for name, value in typed.items() if "." in name})


def short(section: str, key: str, value: Any) -> dict[str, dict[str, Any]]:
    return {} if value is None else {section: {key: value}}
