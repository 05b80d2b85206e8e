"""Does the guard tell a new kind of text from weights that have gone wrong? Real losses of tiny runs, on one core.

    python benchmarks/guard.py [--only WORD] [--out FILE]

Borders: a belt reads one kind of text and then another (prose, code, markup, numbers, other alphabets, noise), with a
tokenizer of the first; also two that change to and fro. No such run may end early or go back. Blow-ups: in the middle
of a run on one text, the learning rate is multiplied, for one step or for good, or weights are spoiled. Each runs
without the guard too, to see what it does. Caught means that the run recovers (its last losses are within a nat of an
undisturbed run's) or ends with exit code 76; a rate times ten, or Muon's times a hundred, does no harm here. Texts come
from the Python that runs this.
"""

import argparse
import ast
import base64
import dis
import io
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from khanhllm.data import prepare
from khanhllm.log.pictures import read_log, with_loss
from khanhllm.log.run_log import FILE, MESSAGES
from khanhllm.schema import Config
from khanhllm.settings import resolve
from khanhllm.training import run as training
from khanhllm.training.guard import Diverged
from khanhllm.training.step import Learner

SIZE = 150_000
"""of each kind of text (bytes)"""
AT = 175
"""step at which something is broken"""
SHAPE = {"style": "modern", "pattern": "DM", "dim": 32, "heads": 2, "hidden": 64, "expert_hidden": 32, "experts": 4}
BORDERS = """prose-code prose-html code-cyrillic prose-chinese prose-cyrillic numbers-prose numbers-code numbers-html
    numbers-tree numbers-chinese numbers-cyrillic chinese-prose chinese-code chinese-html chinese-numbers base64-prose
    base64-chinese base64-cyrillic cyrillic-chinese bytecode-chinese prose/chinese numbers/cyrillic"""
"""first-then; a slash: by turns, a fifth of a shard each"""
Break = Callable[[Learner], None]


def stdlib() -> Iterator[str]:
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        yield path.read_text(encoding="utf-8")


def texts() -> dict[str, str]:
    """Each kind of text, SIZE bytes of it."""
    from pydoc_data.topics import topics

    chance, code = random.Random(0), "".join(stdlib())[: 4 * SIZE]
    prose = "\n".join(topics.values())
    modules = [ast.parse(source) for source in stdlib()]
    said = io.StringIO()
    with redirect_stdout(said):
        for module in modules[:40]:
            dis.dis(compile(module, "module", "exec"), depth=1)
    signs = [chr(chance.randint(0x4E00, 0x4FFF)) for _ in range(400)]
    letters = {ord(a): chr(0x430 + i) for i, a in enumerate("abcdefghijklmnopqrstuvwxyz")}
    kinds = {
        "prose": prose,
        "code": code,
        "html": "".join(f'<p class="x{len(p) % 7}"><b>{p[:9]}</b><i>{p[9:60]}</i></p>\n' for p in prose.split("\n")),
        "tree": "\n".join(ast.dump(module) for module in modules[:40]),
        "bytecode": said.getvalue(),
        "numbers": "\n".join(f"{chance.random():.6f},{chance.randint(0, 9999)}" for _ in range(SIZE // 12)),
        "base64": base64.b64encode(chance.randbytes(SIZE)).decode(),
        "cyrillic": prose.lower().translate(letters),
        "chinese": "".join(chance.choice(signs) for _ in range(SIZE // 3)),
    }
    return {kind: text.encode()[:SIZE].decode(errors="ignore") for kind, text in kinds.items()}


def write_source(folder: Path, documents: list[str], more: list[str]) -> Path:
    """A folder of two files, which a belt reads in this order."""
    names = sorted((f"part{nth}.jsonl" for nth in range(20)), key=lambda name: blake2b(name.encode()).digest())
    folder.mkdir()
    for name, part in ((names[0], documents), (names[-1], more)):
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in part), "utf-8")
    return folder


def pieces(text: str, length: int = 1000) -> list[str]:
    return [text[start : start + length] for start in range(0, len(text), length)]


def config(source: Path, tokenizer: Path, cache: Path, **settings: Any) -> Config:
    given = {
        "model": SHAPE | {"context": 64, "vocab_size": 512},
        "data": {"source": str(source), "tokenizer": str(tokenizer), "cache": str(cache), "shard_tokens": 8192},
        "train": {"steps": 400, "micro_batch": 4, "eval_every": 0, "save_every": 100, "sample_tokens": 0},
        "optim": {"lr": 3e-3},
        "machine": {"threads": 1, "device": "cpu"},
        "log": {"every": 10_000},
    }
    return resolve(given, settings)


def outcome(wanted: Config, broken: Break | None = None) -> dict[str, Any]:
    """Train, with something broken once before step AT, and sum up what became of it."""
    honest, pending = training.train_step, [broken] if broken else []

    def step(learner: Learner, state: Any, rows: Any) -> Any:
        if pending and state.step >= AT:
            pending.pop()(learner)
        return honest(learner, state, rows)

    training.train_step = step  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        run, code = Path(folder, "run"), 0
        try:
            with redirect_stdout(io.StringIO()):
                training.train(wanted, run)
        except Diverged as error:
            code = error.exit_code
        finally:
            training.train_step = honest
        losses = with_loss(read_log(run / FILE, ("loss",)))["loss"]
        said = (run / MESSAGES).read_text("utf-8")
    last = float(np.mean(losses[-20:]))
    return {
        "exit code": code,
        "steps": len(losses),
        "highest": round(float(np.nanmax(losses)), 3),
        "last": round(last, 3) if math.isfinite(last) else None,
        "rejected": said.count("is rejected"),
        "text changed": said.count("text has changed"),
        "returns": said.count("; back to"),
    }


def rate(factor: float, steps: int = 0) -> Break:
    """Multiply the learning rate, for good, or for a number of steps."""

    def change(learner: Learner) -> None:
        for group in learner.optimizer.param_groups:
            group["peak_lr"] *= factor
        if steps:
            update, left = learner.optimizer.step, [steps]

            def once(*inputs: Any) -> Any:
                done = update(*inputs)
                left[0] -= 1
                if not left[0]:
                    for group in learner.optimizer.param_groups:
                        group["peak_lr"] /= factor
                return done

            learner.optimizer.step = once  # type: ignore[method-assign]

    return change


@torch.no_grad()
def spoil(learner: Learner) -> None:
    next(iter(learner.model.blocks.parameters())).view(-1)[5] = torch.nan


def redraw(seed: int) -> Break:
    """Weights of a bad initialisation: five times too large."""

    @torch.no_grad()
    def change(learner: Learner) -> None:
        learner.model.initialise(torch.Generator().manual_seed(seed))
        for parameter in learner.model.parameters():
            parameter.mul_(5)

    return change


def blow_ups() -> dict[tuple[str, str], Break]:
    found: dict[tuple[str, str], Break] = {}
    for optimizer in ("adamw", "adamw8bit", "muon"):
        for factor in (10, 100, 1000):
            found[optimizer, f"rate x{factor}"] = rate(factor)
        found[optimizer, "rate x1000 for one step"] = rate(1000, 1)
        found[optimizer, "NaN in a weight"] = spoil
    return found | {("adamw", f"bad weights, seed {seed}"): redraw(seed) for seed in range(5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name has this word")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "guard.json")
    options = parser.parse_args()
    prepare.WHOLE = 0  # a source of any size gets a belt, whose shards follow the files
    torch.set_num_threads(1)
    started, told, undisturbed = time.perf_counter(), {}, {}
    with tempfile.TemporaryDirectory() as name:
        here, kinds = Path(name), texts()
        for kind, text in kinds.items():
            (here / f"{kind}.txt").write_text(text, "utf-8")
            prepare.train_on(str(here / f"{kind}.txt"), 512, SIZE, 0.01).save(here / f"{kind}.json")
        for case in BORDERS.split():
            first, then = case.replace("/", "-").split("-")
            left, right = pieces(kinds[first]), pieces(kinds[then])
            turns = [piece for nth in range(0, len(left), 5) for piece in (*left[nth : nth + 5], *right[nth : nth + 5])]
            source = write_source(here / case.replace("/", "~"), *((left, turns) if "/" in case else (left, right)))
            if options.only in case:
                told[case] = outcome(config(source, here / f"{first}.json", here / "shards"))
                print(case, json.dumps(told[case]), flush=True)
        for (optimizer, what), broken in blow_ups().items():
            case = f"{optimizer}: {what}"
            if options.only not in case:
                continue
            base = config(here / "code.txt", here / "code.json", here / "shards", optim={"name": optimizer})
            bare = resolve(base.model_dump(), {"guard": {"spike": 0, "patience": 10_000}})
            told[case] = outcome(base, broken) | {"highest without guard": outcome(bare, broken)["highest"]}
            if optimizer not in undisturbed:
                undisturbed[optimizer] = outcome(base)["last"]
            told[case]["undisturbed"] = undisturbed[optimizer]
            print(case, json.dumps(told[case]), flush=True)
    result = {"cases": told, "seconds": round(time.perf_counter() - started)}
    options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
