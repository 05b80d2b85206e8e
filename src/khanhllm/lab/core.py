"""DCLM's CORE (Li et al. 2024, arXiv 2406.11794): 22 tasks, each centred so that chance is 0 and all right is 1.

Prompts are built as llm-foundry builds them, with the same examples: drawn by one generator, question after question.
A choice is taken by its likelihood per token. Jeopardy is a mean over its questions, not over its five categories.
"""

import random
from typing import Any, NamedTuple

import numpy as np

from khanhllm.errors import UserError
from khanhllm.lab import sets
from khanhllm.lab.answers import Question, ask, mean
from khanhllm.lab.sets import Set
from khanhllm.runs.run import Run

CONTEXT = 1024
"""tokens that a model must see at once; most prompts of ten examples fit into them"""
SEED = 1234
ANSWER = "\nAnswer: "


class Task(NamedTuple):
    file: str
    shots: int
    chance: float
    """DCLM's table of random baselines, version 1; the files of three tasks have four choices, the table says fewer"""
    delimiter: str = " "


TASKS = {
    "hellaswag_zeroshot": Task("hellaswag", 0, 0.25),
    "jeopardy": Task("jeopardy_all", 10, 0, ANSWER),
    "bigbench_qa_wikidata": Task("bigbench_qa_wikidata", 10, 0),
    "arc_easy": Task("arc_easy", 10, 0.25, ANSWER),
    "arc_challenge": Task("arc_challenge", 10, 0.25, ANSWER),
    "copa": Task("copa", 0, 0.5),
    "commonsense_qa": Task("commonsense_qa", 10, 0.2),
    "piqa": Task("piqa", 10, 0.5, ANSWER),
    "openbook_qa": Task("openbook_qa", 0, 0.25),
    "lambada_openai": Task("lambada_openai", 0, 0),
    "hellaswag": Task("hellaswag", 10, 0.25),
    "winograd": Task("winograd_wsc", 0, 0.5),
    "winogrande": Task("winogrande", 0, 0.5),
    "bigbench_dyck_languages": Task("bigbench_dyck_languages", 10, 0),
    "agi_eval_lsat_ar": Task("agi_eval_lsat_ar", 3, 0.2),
    "bigbench_cs_algorithms": Task("bigbench_cs_algorithms", 10, 0),
    "bigbench_operators": Task("bigbench_operators", 10, 0),
    "bigbench_repeat_copy_logic": Task("bigbench_repeat_copy_logic", 10, 0),
    "squad": Task("squad", 10, 0),
    "coqa": Task("coqa", 0, 0),
    "boolq": Task("boolq", 10, 0.62, ANSWER),
    "bigbench_language_identification": Task("bigbench_language_identification", 10, 0.091),
}


def files() -> list[str]:
    return list(dict.fromkeys(task.file for task in TASKS.values()))


def check(opened: Run) -> None:
    """Raise UserError if the model sees too little at once."""
    if (context := opened.config.model.context) < CONTEXT:
        raise UserError(
            f"CORE puts up to ten solved examples before each question; this model sees {context:,} tokens at once "
            f"(model.context), and most prompts need up to {CONTEXT:,}; leave out --core"
        )


def prompts(source: Set, task: Task, most: int) -> list[Question]:
    """At most so many questions behind their solved examples. Raises UserError."""
    chance, kept, asked = random.Random(SEED), set(sets.spread(len(source.rows), most)), []
    for number in range(len(source.rows)):
        shown = _examples(len(source.rows), task.shots, number, chance)
        if number in kept:
            solved = [sets.question(source, example, task.delimiter) for example in shown]
            before = "".join("".join(one.choices[one.right]) + "\n" for one in solved)
            last = sets.question(source, number, task.delimiter)
            asked.append(last._replace(choices=[(before + context, text) for context, text in last.choices]))
    return asked


def _examples(count: int, shots: int, number: int, chance: random.Random) -> list[int]:
    """Which rows are shown before a question: never the question itself."""
    if not shots:
        return []
    drawn = set(chance.sample(range(count), min(count - 1, shots)))
    if number in drawn:
        drawn.remove(number)
        if len(drawn) < count - 1:
            other = number
            while other == number or other in drawn:
                other = chance.choice(range(count))
            drawn.add(other)
    return list(drawn)


def asked(loaded: dict[str, Set], most: int) -> dict[str, list[Question]]:
    """The `prompts` of each task whose file is there. Raises UserError."""
    return {name: prompts(loaded[task.file], task, most) for name, task in TASKS.items() if task.file in loaded}


def measure(opened: Run, questions: dict[str, list[Question]]) -> dict[str, Any]:
    """The mean of the centred accuracies of the tasks that `asked` found, and each of them."""
    tasks = {}
    for name, own in questions.items():
        answers = ask(opened, own)
        tasks[name] = mean(answers.credits(per="token")) | {"chance": TASKS[name].chance, "cut": answers.cut}
    centred = [(one["value"] - one["chance"]) / (1 - one["chance"]) for one in tasks.values()]
    errors = [(one["error"] or 0) / (1 - one["chance"]) for one in tasks.values()]
    return {
        "value": float(np.mean(centred)) if centred else None,
        "error": float(np.sqrt(np.square(errors).sum()) / len(errors)) if errors else None,
        "of": len(TASKS),
        "tasks": tasks,
    }
