"""How many tokens do known pre-tokenizing patterns need, in 18 languages and in Python's own library?

    pip download django --no-deps && unzip -d django django-*.whl
    python benchmarks/pretokenizers.py django

Each pattern learns 2,000 tokens from four lines in five of Django's translations into a language, and encodes every
fifth line. Of the standard library it learns 2,048 tokens from 4 MB and encodes the 4 MB after them; that also gives
the speed, in CPU seconds of one thread. Results go to benchmarks/results/.
"""

import argparse
import ast
import json
import re
import sysconfig
import time
from pathlib import Path
from typing import Any

import tiktoken
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from khanhllm.data.tokenizer import _BYTE_OF, SPECIALS

RESULTS = Path(__file__).parent / "results" / "pretokenizers.json"
LANGUAGES = [
    "hi",
    "bn",
    "ta",
    "te",
    "th",
    "my",
    "km",
    "ar",
    "he",
    "hy",
    "ka",
    "el",
    "ru",
    "ko",
    "ja",
    "zh_Hans",
    "vi",
    "fr",
]
# the names that llama.cpp gives them; its own gpt-4o differs from the original in just what matters here, marks
PATTERNS = {
    "gpt-2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen35": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-2 with marks": r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("django", type=Path, help="folder with Django's package")
    django = parser.parse_args().django
    found: dict[str, Any] = {}
    lines_of = translations(django)
    for language in LANGUAGES:
        lines = lines_of[language]
        held, learned = "\n".join(lines[::5]), "\n".join(line for nth, line in enumerate(lines) if nth % 5)
        found[language] = {"bytes": len(held.encode())}
        for name, pattern in PATTERNS.items():
            tokenizer = trained(learned, pattern, 2000)
            found[language][name] = {"tokens": len(tokenizer.encode(held).ids), "vocab": tokenizer.get_vocab_size()}
        print(language, json.dumps(found[language]), flush=True)
    found["stdlib"] = python()
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def translations(folder: Path) -> dict[str, list[str]]:
    """The translated lines of each language, without their placeholders and tags."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("LC_MESSAGES/django.po")):
        for entry in re.finditer(r'msgstr(?:\[\d\])? ((?:"(?:[^"\\]|\\.)*"\s*)+)', path.read_text("utf-8")):
            text = "".join(ast.literal_eval(part) for part in re.findall(r'"(?:[^"\\]|\\.)*"', entry[1]))
            if text and "Project-Id" not in text and (not text.isascii() or path.parts[-3] == "fr"):
                bare = re.sub(r"%\(\w+\)[sd]|<[^>]*>", "", text)
                found.setdefault(path.parts[-3], []).extend(bare.split("\n"))
    return found


def trained(text: str, pattern: str, vocab_size: int) -> Tokenizer:
    learner = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    learner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator([text[at : at + 10_000] for at in range(0, len(text), 10_000)], trainer)
    return learner


def python() -> dict[str, Any]:
    """Tokens and speed on the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    text = "".join(path.read_text("utf-8", "ignore") for path in sorted(root.glob("*.py")))
    learned, held = text[: 4 * 10**6], text[4 * 10**6 : 8 * 10**6]
    found: dict[str, Any] = {"bytes": len(held.encode())}
    for name, pattern in PATTERNS.items():
        start = time.process_time()
        tokenizer = trained(learned, pattern, 2048)
        taken = time.process_time() - start
        found[name] = {"tokens": len(tokenizer.encode(held).ids), "training_seconds": round(taken, 1)}
        found[name]["encoding_mb_per_second"] = round(speed(tokenizer, pattern, held), 2)
        print("stdlib", name, found[name], flush=True)
    return found


def speed(tokenizer: Tokenizer, pattern: str, text: str) -> float:
    """MB of text that tiktoken encodes in a second; the best of five."""
    ranks = {
        bytes(_BYTE_OF[char] for char in piece): rank
        for piece, rank in tokenizer.get_vocab().items()
        if piece not in SPECIALS
    }
    engine = tiktoken.Encoding("measured", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    times = []
    for _ in range(5):
        start = time.process_time()
        engine.encode_ordinary(text)
        times.append(time.process_time() - start)
    return len(text.encode()) / 1e6 / min(times)


if __name__ == "__main__":
    main()
