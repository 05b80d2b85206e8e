"""How a command line is read: errors of one line, and an option for every key of the config."""

import argparse
import sys
from collections.abc import Iterable
from typing import Any, NoReturn, get_args

from khanhllm.errors import UserError
from khanhllm.schema import Config
from khanhllm.settings import did_you_mean, nested


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        print(UserError(f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help"), file=sys.stderr)
        sys.exit(2)

    def refuse(self, word: str) -> NoReturn:
        option = word.partition("=")[0]
        known = did_you_mean(option, sorted(self._option_string_actions)) if option.startswith("-") else ""
        self.error(f"unknown option {option}{known}")


class Raw(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)


def knobs(parser: argparse.ArgumentParser, sections: Iterable[str] = tuple(Config.model_fields)) -> None:
    """One option for each key of the config, with the config's own explanation."""
    for section in sections:
        group = parser.add_argument_group(f"[{section}]")
        kind: Any = Config.model_fields[section].annotation
        for key, field in kind.model_fields.items():
            choices = [str(choice) for choice in get_args(field.annotation) if isinstance(choice, str)]
            metavar = "|".join(choices) if choices else "VALUE"
            text = " ".join(f"{field.description} (default {field.default!r})".split()).replace("%", "%%")
            group.add_argument(f"--{section}.{key}", metavar=metavar, help=text, default=argparse.SUPPRESS)


def given(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The dotted options that were typed, as config settings."""
    return nested({name: value for name, value in vars(options).items() if "." in name})


def short(section: str, key: str, value: Any) -> dict[str, dict[str, Any]]:
    return {} if value is None else {section: {key: value}}
