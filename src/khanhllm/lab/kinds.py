"""Kinds of tokens, and tokens as people read them."""

import re

import numpy as np

from khanhllm.data.tokenizer import Tokenizer
from khanhllm.draw import visible

KINDS = [
    "end of line",
    "blanks",
    "number",
    "new word",
    "piece of a word",
    "punctuation",
    "part of a character",
    "special",
]
SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def kinds(tokenizer: Tokenizer) -> np.ndarray:
    """The kind of each token, as a place in KINDS: (V,)."""
    return np.array([KINDS.index(_kind(tokenizer, token)) for token in range(tokenizer.vocab_size)])


def _kind(tokenizer: Tokenizer, token: int) -> str:
    if not tokenizer.token_bytes[token]:
        return "special"
    try:
        text = tokenizer.decode_bytes([token]).decode()
    except UnicodeDecodeError:
        return "part of a character"
    if "\n" in text or "\r" in text:
        return "end of line"
    inner = text.strip()
    if not inner:
        return "blanks"
    if any(char.isalpha() for char in inner):
        return "new word" if text[0].isspace() else "piece of a word"
    return "number" if any(char.isdigit() for char in inner) else "punctuation"


def shown(tokenizer: Tokenizer, token: int) -> str:
    """A token in a few visible characters: blanks and line ends as signs, a run of blanks as its length."""
    text = tokenizer.decode_bytes([token]).decode("utf-8", "backslashreplace")
    text = re.sub(" {3,}", lambda run: f"{len(run[0])}×␣", text)
    return visible("".join(SIGNS.get(char, char) for char in text))
