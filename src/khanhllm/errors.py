"""The errors that a user can correct, and what a command says of any other."""

import os
import sys
import tempfile
import traceback
from contextlib import suppress

EXTRAS = {
    **dict.fromkeys(
        (
            "datatrove",
            "fsspec",
            "huggingface_hub",
            "orjson",
            "pyarrow",
            "requests",
            "tokenizers",
            "urllib3",
            "zstandard",
        ),
        "data",
    ),
    "matplotlib": "plot",
    "bitsandbytes": "8bit",
    "gguf": "export",
    "lm_eval": "eval",
    "starlette": "serve",
    "uvicorn": "serve",
    "transformers": "dev",
}
"""the extra of this package that installs each module"""


class UserError(Exception):
    """Something that the user can correct; its text is one line that says how."""

    exit_code = 2

    def __init__(self, text: str, exit_code: int | None = None) -> None:
        # escape control characters, which the name of a file may hold, so that the text is one line
        super().__init__("".join(char if char.isprintable() else ascii(char)[1:-1] for char in text))
        self.exit_code = exit_code or self.exit_code


def missing_extra(error: ModuleNotFoundError) -> UserError | None:
    """The error that names the extra to install for a missing module; None if the module belongs to no extra."""
    module = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(module)
    return UserError(f"this needs {module}, which is not installed: pip install 'khanhllm[{extra}]'") if extra else None


def first_line(error: Exception) -> str:
    """The first line of what an error says; its type, if that is nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def drain() -> None:
    """Let go of what cannot be printed, since its reader has gone or the disk is full: at its end Python would try once
    more, and fail."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # there is none, or it is closed
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def in_a_line(error: Exception) -> tuple[str, int]:
    """What a command says of an error, in one line, and the code that it ends with."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError) and (missing := missing_extra(error)):
        return str(missing), missing.exit_code
    if isinstance(error, OSError):  # the system's own refusal; where we know more, we say more
        return f"{error.filename or 'cannot write the output'}: {error.strerror or error}", 2
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", prefix="khanhllm-", suffix=".txt", delete=False) as report:
        traceback.print_exception(error, file=report)
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first} (unforeseen; the details are in {report.name})", 1
