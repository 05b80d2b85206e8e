"""Questions made by rule. No model has read them, and no file is needed."""

import random
from collections.abc import Callable, Iterator

from khanhllm.lab.answers import Question

SEED = 1
NOUNS = """
apple bag ball bell bird boat book box cake car cat chair clock coat cup desk dog door egg fish flag fork glass hat
horse key king lamp leaf letter map milk moon mouse nail pen pie plate ring road rope salt ship shoe snow song spoon
star stone table tent toy train tree wall wheel window wolf wood
"""
NAMES = """
Adam Alice Anna Ben Carl Clara David Emma Eva Frank Fred George Hanna Henry Ida Jack Jane John Laura Leo Lisa Lucy
Mark Mary Max Nina Oscar Paul Peter Rosa Ruth Sam Sara Simon Sofia Tom Vera Victor Will Zoe
"""
CLOSES = {"(": ")", "[": "]", "{": "}"}
LIST, PAIRS, DEEP = 12, 4, 4
"""words of a list; who has what; brackets that are open at once"""


def lists(count: int) -> list[tuple[Question, Question]]:
    """Lists of random words: said a first time, and said again. A model that can copy knows the second (Olsson et al.
    2022, arXiv 2209.11895). Both begin with a line break, so that they are the same tokens."""
    chance = random.Random(SEED)
    made = []
    for _ in range(count):
        text = "\n" + " ".join(chance.sample(NOUNS.split(), LIST))
        made.append((Question([("", text)], 0), Question([(text, text)], 0)))
    return made


def recall(chance: random.Random) -> Question:
    """Who has what? Each answer stands in the text; only one belongs to the name."""
    names, nouns = chance.sample(NAMES.split(), PAIRS), chance.sample(NOUNS.split(), PAIRS)
    told = " ".join(f"{name} has the {noun}." for name, noun in zip(names, nouns, strict=True))
    right = chance.randrange(PAIRS)
    return Question([(f"{told} {names[right]} has the", f" {noun}") for noun in nouns], right)


def arithmetic(chance: random.Random) -> Question:
    """A sum of numbers below 50 behind three that are solved. The wrong answers have as many digits as the right one,
    so that they are about as long."""

    def pair() -> tuple[int, int]:
        return chance.randrange(1, 50), chance.randrange(1, 50)

    solved = "".join(f"{a} + {b} = {a + b}\n" for a, b in (pair() for _ in range(3)))
    a, b = pair()
    low, high = (1, 9) if a + b < 10 else (10, 99)
    wrong = [sum_ for sum_ in range(max(low, a + b - 10), min(high, a + b + 10) + 1) if sum_ != a + b]
    answers = [a + b, *chance.sample(wrong, 3)]
    return Question([(f"{solved}{a} + {b} =", f" {answer}") for answer in answers], 0)


def brackets(chance: random.Random) -> Question:
    """Which bracket closes next? All three kinds are open, so it is not enough to know which ones stand there."""
    opened = list(CLOSES) + chance.choices(list(CLOSES), k=DEEP - len(CLOSES))
    chance.shuffle(opened)
    written: list[str] = []
    for bracket in opened:
        inner = chance.choice(list(CLOSES))
        written += [bracket, *([inner, CLOSES[inner]] if chance.random() < 0.5 else [])]
    closing = list(CLOSES.values())
    text = " ".join(written)
    return Question([(text, f" {bracket}") for bracket in closing], closing.index(CLOSES[opened[-1]]))


CHOICES: dict[str, Callable[[random.Random], Question]] = {
    "recall": recall,
    "arithmetic": arithmetic,
    "brackets": brackets,
}


def questions(kind: str, count: int) -> Iterator[Question]:
    """So many questions of a kind, always the same."""
    chance = random.Random(f"{SEED} {kind}")
    return (CHOICES[kind](chance) for _ in range(count))
