"""A run as a model of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), the extra `eval`.

A class of our own serves every model, also those that no other library can express. This module is imported only when
the harness is asked for.
"""

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from khanhllm.errors import UserError, first_line
from khanhllm.explain import did_you_mean
from khanhllm.inference.likelihood import Pair, log_likelihoods
from khanhllm.lab import ending, scores
from khanhllm.runs.run import Run

FILE = "evaluation-tasks.json"
NEW_TOKENS = 256
"""written for a task that names no other number, as the harness's own classes do"""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """What the harness asks of a model. A text begins after an end-of-text, as in training."""

    def __init__(self, opened: Run) -> None:
        super().__init__()
        self.opened, self.tokens = opened, opened.tokenizer
        self.cut: dict[str, set[int]] = {}
        """for each task, the items of which the model could not see all"""
        self._cuts: list[int] = []

    @property
    def eot_token_id(self) -> int:
        return self.tokens.end_of_text

    @property
    def max_length(self) -> int:
        return self.opened.config.model.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.tokens.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        end = [self.eot_token_id]
        pairs: list[Pair] = [(before if before[:1] == end else end + before, after) for _, before, after in requests]
        found = log_likelihoods(self.opened.model, pairs, self.opened.machine)
        self._cuts = [one.cut for one in found]
        return [(one.log, one.greedy) for one in found]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        for request, cut in zip(requests, self._cuts, strict=True):
            if cut:
                self.cut.setdefault(request.task_name, set()).add(request.doc_id)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(self.tokens.encode(text), self.eot_token_id, self.max_length, 1)
            pairs: list[Pair] = [make_disjoint_window(window) for window in windows]
            totals.append(sum(one.log for one in log_likelihoods(self.opened.model, pairs, self.opened.machine)))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        written = []
        for request in requests:
            prompt, asked = request.args
            until = asked.get("until") or []
            stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
            heat = float(asked.get("temperature") or 0) if asked.get("do_sample") else 0.0
            tokens = int(asked.get("max_gen_toks") or NEW_TOKENS)
            if self.opened.forgotten(prompt):
                self.cut.setdefault(request.task_name, set()).add(request.doc_id)
            written += self.opened.generate(prompt, stop=stops, tokens=tokens, temperature=heat)
        return written


def tasks(names: list[str], include: Path | None) -> Any:
    """A task manager that knows these tasks, and the tasks. The harness's own list takes half a minute to read, so it
    is read only for a task that is not in the folder named. Raises UserError."""
    manager = TaskManager(include_path=str(include), include_defaults=False) if include else None
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=str(include) if include else None)
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(f"--tasks: unknown task {name[:60]!r}{did_you_mean(name, manager.all_tasks)}")
    try:
        loaded = manager.load(names)
    except Exception as error:  # of any library that reads data
        hint = "without a network, describe tasks with local files (--include-path)"
        raise UserError(f"cannot load {', '.join(names)}: {first_line(error)[:300]}; {hint}") from None
    manager.load = lambda _names: loaded
    return manager


def evaluate(opened: Run, names: list[str], include: Path | None = None, limit: int | None = None) -> dict[str, Any]:
    """What the harness finds, and our own count of items that were cut. Raises UserError for a task that is unknown."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager, model = tasks(names, include), HarnessModel(opened)
    found: dict[str, Any] = simple_evaluate(model, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=1000)
    found["cut"] = {task: len(items) for task, items in model.cut.items()}
    return found


def measures(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The harness's results in the form of the suite's."""
    listed = {}
    for task, results in found["results"].items():
        samples = found["samples"].get(task, [])
        for key, value in results.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            error = results.get(f"{metric}_stderr,{filtered}")
            accuracy = metric in ("acc", "acc_norm", "acc_bytes", "exact_match")
            listed[f"{task} {key}"] = {
                "title": f"{task} {metric}" + f" ({filtered})" * (filtered != "none"),
                "unit": "accuracy" if accuracy else metric,
                "value": float(value),
                "error": float(error) if isinstance(error, float | int) else None,
                "items": len({sample["doc_id"] for sample in samples}),
                "chance": _chance(samples) if metric.startswith("acc") else None,
                "of": found["n-samples"].get(task, {}).get("original"),
                "cut": found["cut"].get(task, 0),
            }
    return listed


def _chance(samples: list[dict[str, Any]]) -> float | None:
    """One of so many choices; None for a task without choices."""
    counts = [len(sample["resps"]) for sample in samples]
    return sum(1 / count for count in counts) / len(counts) if counts and min(counts) > 1 else None


def show(
    opened: Run, names: list[str], include: Path | None, limit: int | None, as_json: bool, out: Path | None
) -> None:
    """Evaluate a run on tasks of the harness, write the JSON file and the picture, and print the table."""
    path = scores.writable(opened, FILE, out)
    results = evaluate(opened, names, include, limit)
    found = {"step": opened.step, "measures": measures(results), "results": results["results"]}
    found |= {"versions": results["versions"], "n-shot": results["n-shot"], "lm_eval": version("lm_eval")}
    name = opened.checkpoint.parents[1].resolve().name
    drawn = scores.write(path, found, name)
    parts = [scores.table(found["measures"], f"{name} after {found['step']:,} steps")]
    ending.show(found, parts, [scores.LEGEND, f"written: {path}, {drawn}"], as_json)
