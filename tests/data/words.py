"""Small texts of few words and a tokenizer for them, for tests of what happens to documents."""

import json

import numpy as np

from khanhllm.data.tokenizer import train_tokenizer

WORDS = "the quick brown fox jumps over the lazy dog and then some more words follow it".split()
TOKENIZER = train_tokenizer([" ".join(WORDS)] * 3, 300)


def text(number, length=40):
    """Text `number`, which it begins with: no two are alike."""
    chosen = np.random.default_rng(number).choice(WORDS, length)
    return f"{number} {' '.join(chosen)}"


def lines(texts):
    """Texts as the content of a .jsonl file."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)
