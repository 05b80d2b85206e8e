"""The errors that a user can put right."""

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
    "transformers": "dev",
}
"""the extra of this package that brings a module"""


class UserError(Exception):
    """Something the user can put right; its text is the one line that says how."""

    exit_code = 2

    def __init__(self, text: str) -> None:
        # one line that steers no terminal, whatever the name of a file holds
        super().__init__("".join(char if char.isprintable() else ascii(char)[1:-1] for char in text))


def missing_extra(error: ModuleNotFoundError) -> UserError | None:
    """What to install where a module of an extra is missing; None if it is a module of no extra."""
    module = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(module)
    return UserError(f"this needs {module}, which is not installed: pip install 'khanhllm[{extra}]'") if extra else None
