"""The floors of the house: a room imports only from rooms on lower floors, and inside a room there are no circles.

A room is a folder of the package, or a file that lies loose in it.
"""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import khanhllm

ROOT = Path(khanhllm.__file__).parent
FLOORS = """
    errors units schema explain settings files limits draw
    data model
    optim machine
    log inference planning
    training
    export
    runs
    lab chaos serve
    api demo
    cli
    __main__
"""
FLOOR = {room: floor for floor, line in enumerate(FLOORS.strip().splitlines()) for room in line.split()}
GROUND = {"errors", "units", "schema", "explain", "settings", "files", "limits", "draw"}
"""rooms of one file, which may lean on each other as files of one room do"""


def modules() -> dict[str, Path]:
    named = {path: path.relative_to(ROOT).with_suffix("").parts for path in ROOT.rglob("*.py")}
    return {".".join(p for p in parts if p != "__init__"): path for path, parts in named.items()}


def room(module: str) -> str:
    return module.partition(".")[0]


def imported(path: Path) -> set[str]:
    """The modules of this package that a file names in an import, at its top or inside a function."""
    found, known = set(), modules()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "khanhllm":
            base = node.module.removeprefix("khanhllm").removeprefix(".")
            for alias in node.names:
                deeper = f"{base}.{alias.name}".removeprefix(".")
                found.add(deeper if deeper in known else base)
    return found - {""}


def test_a_room_imports_only_from_lower_floors():
    for name, path in modules().items():
        for other in imported(path) if name else ():
            here, there = room(name), room(other)
            allowed = here == there or {here, there} <= GROUND or FLOOR[there] < FLOOR[here]
            assert allowed, f"{name} imports {other}, which is not on a lower floor"


def test_no_circles_inside_a_room():
    # a folder's __init__ gives it its public names, so only what others than its own files import counts
    graph = {name: imported(path) - {name} for name, path in modules().items() if name}
    inside = {name: {o for o in others if not name.startswith(f"{o}.")} for name, others in graph.items()}
    TopologicalSorter(inside).prepare()  # raises CycleError


def test_the_model_knows_no_machine():
    for name, path in modules().items():
        if room(name) == "model":
            assert not any(room(other) in ("machine", "optim", "training") for other in imported(path)), name


def test_files_and_functions_stay_short_enough_to_read():
    for name, path in modules().items():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{name}.{node.name}"


def test_no_room_bears_the_name_of_a_public_function():
    """Its import would put the module where the function is expected."""
    assert not {room(name) for name in modules()} & set(khanhllm.__all__)


def test_no_decision_hangs_on_the_wall_clock():
    """Somebody may move it, or a time server does. It is shown to people, and a server may name a date."""
    shown = {"log.run_log", "planning.plan", "runs.listing", "serve.guard", "serve.server"}
    for name, path in modules().items():
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
        wall = calls & {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "time.localtime"}
        assert not wall or name in shown or (name, wall) == ("data.fetch", {"time.time"}), (name, wall)


def test_only_one_file_knows_how_the_files_of_tensors_are_called():
    """A checkpoint may have one of each kind, or many. What other tools call theirs is another matter."""
    for name, path in modules().items():
        named = re.search(r"(model|optimizer)\.safetensors", path.read_text(encoding="utf-8"))
        assert not named or name == "export.hf", name


def test_only_one_file_speaks_to_other_processes_and_never_in_objects():
    """Collectives of objects unpickle what the others send, and torch's distributed checkpoints hold a pickle. What
    shards a model (sharded.py) needs torch's types for that."""
    for name, path in modules().items():
        text = path.read_text(encoding="utf-8")
        speaks = re.search(r"torch\.distributed|torch import .*\bdistributed\b|\bdist\.", text)
        assert not speaks or name in ("machine.group", "machine.sharded"), name
        assert not re.search(r"(gather|broadcast|scatter|send|recv)_object|distributed\.checkpoint|\bdcp\b", text), name
