"""Breaks one line of the core at a time and runs the tests that should notice: `make mutants`.

A mutant is the source with one small change (`<` to `<=`, `+` to `-`, 1 to 2, a condition negated, a call left out).
Its tests run on a copy of the package; if they fail or hang, they have killed it. A mutant that lives is a line that no
test holds to its word.

    python scripts/mutants.py --each 20 --seed 1             # a sample: 20 mutants of every file
    python scripts/mutants.py model/router.py --each 1000    # every mutant of one file
"""

import argparse
import ast
import copy
import difflib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from threading import local

ROOT = Path(__file__).parents[1]
MODEL = ["model", "export/test_hf.py", "promises/test_laws.py", "inference", "promises/test_golden.py"]
OPTIM = ["optim", "planning/test_simulation.py", "promises/test_golden.py"]
TRAINING = [
    "training",
    "promises/test_guard_rails.py",
    "promises/test_resume.py",
    "promises/test_accumulation.py",
    "log",
]
# The file, and the tests that should notice, those that notice most first.
CORE = {
    **{
        f"model/{name}.py": MODEL
        for name in ["attention", "block", "embedding", "feedforward", "head", "losses", "moe", "rope", "router"]
    },
    "model/experts.py": [*MODEL, "machine/test_backends.py"],
    "model/transformer.py": MODEL,
    "model/cache.py": ["inference", *MODEL],
    "model/counts.py": ["model/test_counts.py", "planning"],
    **{f"optim/{name}.py": OPTIM for name in ["__init__", "adamw", "muon", "rounding", "schedule", "eight_bit"]},
    "training/step.py": [*TRAINING, "model"],
    "training/guard.py": TRAINING,
    **{
        f"training/{name}.py": [*TRAINING, "promises/test_broken_files.py", "promises/test_hostile_files.py"]
        for name in ["checkpoint", "tensor_files"]
    },
    "runs/evaluate.py": ["runs", "test_api.py", "inference", "promises/test_golden.py"],
    **{
        f"machine/{name}.py": [f"machine/test_{name}.py"]
        for name in ["adapt", "backends", "cards", "devices", "launch", "probe", "signals"]
    },
    "machine/group.py": ["machine/test_group_store.py", "machine/test_owners.py", "training/test_shares.py"],
    "machine/owners.py": ["machine/test_owners.py", "planning/test_many.py"],
    **{f"planning/{name}.py": ["planning"] for name in ["assumed", "budget", "many", "plan", "simulation", "ways"]},
    "inference/generate.py": ["inference", "test_api.py"],
    "inference/score.py": ["inference", "test_api.py", "runs"],
    "inference/likelihood.py": ["inference/test_likelihood.py", "lab/test_harness.py"],
    **{
        f"lab/{name}.py": ["lab/test_core.py", "lab/test_suite.py"]
        for name in ["answers", "core", "suite", "synthetic"]
    },
}
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult, ast.Mod: ast.FloorDiv,
}  # fmt: skip


def code(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that do something: no docstring, annotation, decorator or message of an error."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in {"annotation", "returns", "decorator_list"} or isinstance(node, ast.Raise | ast.JoinedStr):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from code(child)


def changes(node: ast.AST) -> Iterator[dict[str, object]]:
    """The fields of `node` that a mutant has otherwise."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield {"ops": [SWAPS[type(node.ops[0])](), *node.ops[1:]]}
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
        yield {"op": SWAPS[type(node.op)]()}
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield {"op": ast.UAdd()} if isinstance(node.op, ast.USub) else {"operand": ast.UnaryOp(ast.Not(), node.operand)}
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        yield {"test": ast.UnaryOp(ast.Not(), node.test)}
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        yield {"value": not node.value if isinstance(node.value, bool) else node.value + 1}
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield {"value": ast.Constant(None)}


def mutants(source: str) -> list[str]:
    """Every mutant of a module, as source."""
    tree = ast.parse(source)
    found = []
    for place, node in enumerate(code(tree)):
        for change in changes(node):
            mutant = copy.deepcopy(tree)
            twin = next(other for here, other in enumerate(code(mutant)) if here == place)
            vars(twin).update(change)
            found.append(ast.unparse(ast.fix_missing_locations(mutant)))
    return found


def difference(source: str, mutant: str) -> str:
    lines = difflib.unified_diff(ast.unparse(ast.parse(source)).splitlines(), mutant.splitlines(), n=0, lineterm="")
    return " => ".join(line[1:].strip() for line in list(lines)[3:])


def lives(package: Path, tests: list[str]) -> bool:
    """Whether the tests pass with the package in the folder `package`."""
    environment = os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "HYPOTHESIS_DATABASE_FILE": ""}
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *(f"tests/{name}" for name in tests)]
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=600).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="files below src/khanhllm; all of the core without")
    parser.add_argument("--each", type=int, default=10, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()

    drawn = []
    for file in options.files or CORE:
        source = (ROOT / "src/khanhllm" / file).read_text("utf-8")
        every = mutants(source)
        drawn += [
            (file, source, mutant)
            for mutant in random.Random(options.seed).sample(every, min(options.each, len(every)))
        ]
    place, number = local(), count()
    with tempfile.TemporaryDirectory() as folder:

        def judge(task: tuple[str, str, str]) -> str | None:
            file, source, mutant = task
            if not hasattr(place, "package"):
                place.package = Path(folder, str(next(number)))
                shutil.copytree(ROOT / "src", place.package)
            changed = place.package / "khanhllm" / file
            changed.write_text(mutant, "utf-8")
            alive = lives(place.package, CORE[file])
            changed.write_text(source, "utf-8")
            line = f"{file}: {difference(source, mutant)}"
            print("ALIVE " if alive else "killed", line, flush=True)
            return line if alive else None

        with ThreadPoolExecutor(options.workers) as pool:
            alive = [line for line in pool.map(judge, drawn) if line]
    print(f"\n{len(alive)} of {len(drawn)} mutants live ({len(alive) / len(drawn):.1%})", *alive, sep="\n")


if __name__ == "__main__":
    main()
