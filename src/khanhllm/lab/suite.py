"""What a run knows, in about a minute and offline: bits per byte, questions from files, questions made by rule.

Each measure is one comparison of log p(continuation | context), with its standard error and what chance would give. A
short sample of each set is enough for that error; it is the same sample for every run, so that runs compare.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from khanhllm.errors import UserError
from khanhllm.lab import closing, core, sets, synthetic, talks
from khanhllm.lab.answers import Question, ask, mean, ratio
from khanhllm.lab.sample import take
from khanhllm.lab.sets import Set
from khanhllm.runs.run import Run

VERSION = 1
TOKENS = 100_000
"""of text for bits per byte"""
PARADIGMS = 5
"""of each BLiMP paradigm, one question for so many of another set; there are 67"""
ANSWERS = 200
"""of held-out conversations, at most: a run writes each of them"""
LAMBADA = "lambada_openai"
CHOICES = {
    "copa": ("COPA", " "),
    "piqa": ("PIQA", "\nAnswer: "),
    "arc_easy": ("ARC-easy", "\nAnswer: "),
    "winogrande": ("Winogrande", " "),
}
"""sets of multiple choice: the title, and what lies between question and answer"""
RULES = {"recall": "who has what", "arithmetic": "sums below 100", "brackets": "closing brackets"}

Measure = dict[str, Any]
"""title, unit, value, error, chance, items, of (how many its files hold), cut; and what else is known"""


def choices(opened: Run, title: str, questions: Iterable[Question], of: int | None) -> Measure:
    """How often the likeliest choice is the right one. Where the answers to one question differ, also how often the
    likeliest per byte is: a long answer is unlikely because it is long. of: how many questions there are; None: any."""
    answers = ask(opened, questions)
    credits, asked = answers.credits(), answers.questions
    chance = float(np.mean([1 / len(question.choices) for question in asked]))
    measure = {"title": title, "unit": "accuracy", **mean(credits), "chance": chance, "of": of, "cut": answers.cut}
    if of and all(question.choices[0][0] == question.choices[-1][0] != "" for question in asked):
        measure["by_bytes"] = mean(answers.credits(per="byte"))
    if fields := sorted({question.field for question in asked} - {""}):
        of_field = {name: [c for c, q in zip(credits, asked, strict=True) if q.field == name] for name in fields}
        measure["fields"] = {name: mean(own) for name, own in of_field.items()}
    return measure


def last_word(opened: Run, questions: Iterable[Question], of: int) -> tuple[Measure, Measure]:
    """LAMBADA (Paperno et al. 2016): how often the last word is the likeliest one, and how many nats it takes."""
    answers = ask(opened, questions)
    shared = {"of": of, "cut": answers.cut}
    hits = {"title": "LAMBADA", "unit": "accuracy", **mean(answers.credits()), "chance": 0.0}
    nats = {"title": "LAMBADA, last word", "unit": "nats", **mean([-found[0].log for found in answers.found])}
    return hits | shared, nats | {"chance": None} | shared


def induction(opened: Run, count: int) -> Measure:
    """How many nats per token a list of random words saves when it is said again, compared list by list."""
    made = synthetic.lists(count)
    first, second = (ask(opened, [pair[turn] for pair in made]) for turn in (0, 1))
    saved = [
        (again[0].log - once[0].log) / max(1, once[0].tokens)
        for once, again in zip(first.found, second.found, strict=True)
    ]
    measure = {"title": "list said again", "unit": "nats saved", **mean(saved)}
    return measure | {"chance": 0.0, "of": None, "cut": second.cut}


def bits_per_byte(opened: Run, source: str | None) -> Measure:
    """Of text that the run held out, or of any other; the standard error is that of a ratio over windows."""
    sample = take(opened, source, TOKENS)
    bits_W = closing.losses(opened.model, sample.ids, opened.machine, sample.reading).numpy() / math.log(2)
    bytes_W = sample.bytes_W(opened.tokenizer.token_bytes)
    held_out = "held-out answers" if opened.talks else "held-out text"
    measure = {"title": held_out if source is None else "text", "unit": "bits per byte"}
    measure |= ratio(bits_W, bytes_W)
    return measure | {"chance": None, "of": None, "cut": 0, "text": sample.source}


def conversations(opened: Run, most: int) -> Iterator[tuple[str, Measure]]:
    """What a run that was taught to talk makes of the conversations that it held out."""
    nats, tokens, ends, rights = talks.answers(opened, most)
    known = {"of": None, "cut": 0}
    yield "answer_nats", {"title": "held-out answers", "unit": "nats", **ratio(nats, tokens), "chance": None} | known
    yield "answers_end", {"title": "answers that end", "unit": "accuracy", **mean(ends), "chance": 0.0} | known
    yield "answers_right", {"title": "answers word for word", "unit": "accuracy", **mean(rights), "chance": 0.0} | known


def _talked(opened: Run, most: int, notes: list[str]) -> Iterator[tuple[str, Measure]]:
    """`conversations` of a run that talks; if it held out none, or they are gone, `notes` hears why."""
    try:
        yield from conversations(opened, most) if opened.talks else ()
    except UserError as error:
        notes.append(f"no held-out answers: {error}")


def _asked(loaded: dict[str, Set], most: int) -> dict[str, list[Question]]:
    """The questions of each set that is there. Raises UserError."""
    each = dict.fromkeys(sets.blimp(), ("", max(1, most // PARADIGMS))) | {LAMBADA: (" ", most)}
    each |= {name: (delimiter, most) for name, (_, delimiter) in CHOICES.items()}
    return {name: list(sets.questions(loaded[name], *how)) for name, how in each.items() if name in loaded}


def _from_files(opened: Run, loaded: dict[str, Set], asked: dict[str, list[Question]]) -> Iterator[tuple[str, Measure]]:
    if paradigms := [name for name in sets.blimp() if name in asked]:
        questions = [question for name in paradigms for question in asked[name]]
        measure = choices(opened, "BLiMP", questions, sum(len(loaded[name].rows) for name in paradigms))
        yield "blimp", measure | {"paradigms": len(paradigms)}
    if LAMBADA in asked:
        accuracy, nats = last_word(opened, asked[LAMBADA], len(loaded[LAMBADA].rows))
        yield "lambada", accuracy
        yield "lambada_nats", nats
    for name, (title, _) in CHOICES.items():
        if name in asked:
            yield name, choices(opened, title, asked[name], len(loaded[name].rows))


def _by_rule(opened: Run, most: int) -> Iterator[tuple[str, Measure]]:
    yield "induction", induction(opened, min(most, 100))
    for name, title in RULES.items():
        yield name, choices(opened, title, synthetic.questions(name, most), None)


def wanted(with_core: bool) -> list[str]:
    """The names of all files that a suite reads."""
    return [*sets.blimp(), LAMBADA, *CHOICES, *(core.files() if with_core else [])]


def examine(
    opened: Run,
    folder: Path,
    most: int,
    source: str | None = None,
    with_core: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Everything that the suite measures, as it goes to evaluation.json. say: hears what has been measured. Raises
    UserError."""
    have, names = sets.found(folder), list(dict.fromkeys(wanted(with_core)))
    loaded = {name: sets.load(have[name]) for name in names if name in have}
    asked, of_core = _asked(loaded, most), core.asked(loaded, most) if with_core else {}  # faults are told now
    measures: dict[str, Measure] = {}
    notes: list[str] = []
    try:
        measures["text"] = bits_per_byte(opened, source)
    except UserError as error:
        if source is not None:
            raise
        notes.append(f"no bits per byte: {error}")
    talked = _talked(opened, min(most, ANSWERS), notes)
    for name, measure in chain(_from_files(opened, loaded, asked), _by_rule(opened, most), talked):
        measures[name] = measure
        say(f"measured: {measure['title']}")
    known = sets.published()
    other = [str(one.path) for name, one in loaded.items() if name in known and known[name][1] != one.sha256]
    notes += [f"{path} is not the published file" for path in other]
    return {
        "version": VERSION,
        "step": opened.step,
        "checkpoint": opened.identity,
        "most": most,
        "measures": measures,
        "core": core.measure(opened, of_core) if with_core else None,
        "files": {name: one.sha256 for name, one in loaded.items()},
        "missing": [name for name in names if name not in have],
        "notes": notes,
    }
