"""The floors of the house: a file imports only from files above it in this list, so the list is the reading order."""

import ast
from pathlib import Path

import khanhllm

ROOT = Path(khanhllm.__file__).parent
FLOORS = """
    config files settings twin
    tokenizer data.names data.sources data.fetch data.warc data.documents data.shards data.clean data.writer
    data.duplicates data.executors data.pulse data.maker data.laying data.belt data.prepare data.batches
    objectives schedule guard
    model.rope model.cache model.attention model.feedforward model.router model.experts model.moe model.block
    model.embedding model.head model.transformer model model.counts
    machine.cards machine.triton_grouped machine.roads machine.runtime machine.signals machine.weights machine.fit
    rounding adamw adamw8bit muon muon8bit optim checkpoint draw alarms terminal log saved evaluate generate
    step rehearsal budget
    train
    compare upcycle doctor look demo measure plan contenders bench
    chaos.server chaos.arena chaos.trainers chaos.saves chaos.numbers chaos.belt chaos.run
    arguments data_verbs verbs cli __main__
""".split()
FREE = {"", "chaos", "data", "machine"}  # packages that only hold others


def modules() -> dict[str, Path]:
    named = {path: path.relative_to(ROOT).with_suffix("").parts for path in ROOT.rglob("*.py")}
    return {".".join(p for p in parts if p != "__init__"): path for path, parts in named.items()}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "khanhllm":
            base = node.module.removeprefix("khanhllm").removeprefix(".")
            for alias in node.names:
                deeper = f"{base}.{alias.name}".removeprefix(".")
                found.add(deeper if deeper in modules() else base)
    return found


def test_every_file_has_its_place():
    assert set(modules()) - FREE == set(FLOORS)


def test_no_file_imports_from_below():
    # model/__init__ gives the folder its public names, so it may stand before or after its own parts
    for name, path in modules().items():
        if name in FREE:
            continue
        for other in imported(path) - FREE - {"model"}:
            assert FLOORS.index(other) < FLOORS.index(name), f"{name} imports {other}"


def test_the_model_knows_no_machine():
    for name, path in modules().items():
        if name.startswith("model"):
            assert not any(other.startswith(("machine", "optim", "train")) for other in imported(path)), name


def test_files_stay_short_enough_to_read():
    for name, path in modules().items():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, name


def test_no_decision_hangs_on_the_wall_clock():
    """Somebody may move it, or a time server does. It is shown to people, and a server may name a date."""
    shown = {"log", "plan"}
    for name, path in modules().items():
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
        wall = calls & {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "time.localtime"}
        assert not wall or name in shown or (name, wall) == ("data.fetch", {"time.time"}), (name, wall)
