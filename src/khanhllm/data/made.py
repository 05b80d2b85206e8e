"""Conversations made by rule, from which a small model learns to talk within minutes, and whose answers can be checked.

Few words, but many cases and more than one way to ask, so that the conversations held out are new ones: sums, copying,
capitals, and a name that was said two turns ago.
"""

import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from khanhllm.data.chat import Message, to_json
from khanhllm.data.writer import HASHES, text_hash

NAMES = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Kim", "Lena"]
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Vietnam": "Hanoi",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Peru": "Lima",
}
WORDS = ["red", "green", "blue", "big", "small", "old", "new", "cat", "dog", "tree", "house", "sun", "moon", "sea"]


def _sum(dice: random.Random) -> list[str]:
    one, two = dice.randint(0, 9), dice.randint(0, 9)
    return [dice.choice([f"{one} + {two}?", f"What is {one} + {two}?"]), str(one + two)]


def _copy(dice: random.Random) -> list[str]:
    words = " ".join(dice.choices(WORDS, k=dice.randint(1, 3)))
    return [dice.choice([f"Say: {words}", f"Repeat: {words}"]), words]


def _capital(dice: random.Random) -> list[str]:
    land = dice.choice(list(CAPITALS))
    asked = [f"Capital of {land}?", f"What is the capital of {land}?", f"Tell me the capital of {land}."]
    return [dice.choice(asked), CAPITALS[land]]


def _name(dice: random.Random) -> list[str]:
    name = dice.choice(NAMES)
    return [f"I am {name}.", f"Hello {name}!", *_turn(dice), "Who am I?", name]


KINDS = {"sums": _sum, "copying": _copy, "capitals": _capital, "names": _name}


def _turn(dice: random.Random) -> list[str]:
    return dice.choice([_sum, _copy, _capital])(dice)


def made(number: int, seed: int = 0) -> Iterator[tuple[str, list[Message]]]:
    """So many conversations, each with its kind; the same for the same seed."""
    dice = random.Random(seed)
    for nth in range(number):
        kind = list(KINDS)[nth % len(KINDS)]
        said = KINDS[kind](dice)
        yield kind, [Message(("user", "assistant")[turn % 2], text) for turn, text in enumerate(said)]


def held_out(number: int, share: float) -> Iterator[tuple[str, list[Message]]]:
    """So many of those that a split by their hash, with this share for validation, keeps from training."""
    rest = made(10**6, seed=1)
    below = int(share * HASHES)
    return islice(((kind, said) for kind, said in rest if text_hash(to_json(said).encode()) < below), number)


def write_made(path: Path, number: int) -> None:
    """Write them as JSON lines of messages."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for _, messages in made(number):
            turns = [{"role": role, "content": text} for role, text in messages]
            file.write(json.dumps({"messages": turns}) + "\n")
