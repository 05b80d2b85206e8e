"""What the package stands on: each direct dependency has its reason in docs/dependencies.md, and a hash in the lock."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import khanhllm
from khanhllm.export.remote import FILES

ROOT = Path(khanhllm.__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in requirements}


def table() -> str:
    return (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8").lower().replace("_", "-")


def pinned(file: str) -> dict[str, str]:
    found = re.findall(r"^([\w-]+)==([^\s;]+)", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in found}


EXTRAS = PROJECT["optional-dependencies"]
DIRECT = names(PROJECT["dependencies"]) | names(EXTRAS["data"] + EXTRAS["plot"] + EXTRAS["8bit"] + EXTRAS["serve"])


def test_each_direct_dependency_has_its_reason():
    missing = {name for name in DIRECT | EXTRAS.keys() if not re.search(rf"(?<![\w-]){name}(?![\w-])", table())}
    assert not missing


def test_nothing_is_imported_that_is_not_declared():
    declared = DIRECT | {
        "triton",
        "lm-eval",
        "urllib3",
    }  # two extras, for a file of their own each; what requests raises
    for path in Path(khanhllm.__file__).parent.rglob("*.py"):
        own = {"transformers"} if path in FILES else set()  # which imports them out of an exported folder
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            tops = {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"khanhllm"}
            assert {top.replace("_", "-") for top in tops} <= declared | own, path


def test_the_lock_has_a_hash_for_every_file_and_the_versions_of_the_tests():
    lock, constraints = pinned("requirements.lock"), pinned("constraints.txt")
    assert DIRECT - {"torch"} <= lock.keys()
    assert {name: version for name, version in lock.items() if constraints.get(name, version) != version} == {}
    blocks = re.split(r"^(?=[a-z0-9])", (ROOT / "requirements.lock").read_text(encoding="utf-8"), flags=re.MULTILINE)[
        1:
    ]
    assert len(blocks) >= len(lock) > 50
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks)


def test_the_lock_brings_no_gigabytes():
    assert not [name for name in pinned("requirements.lock") if re.match(r"(torch|triton|nvidia|cuda)", name)]


def lower_bounds() -> dict[str, str]:
    """Of each dependency, and of what the extra `all` brings."""
    extras = PROJECT["optional-dependencies"]
    brought = re.search(r"\[(.+)\]", extras["all"][0])[1].split(",")
    lines = [*PROJECT["dependencies"], *(line for extra in brought for line in extras[extra])]
    found = [re.fullmatch(r"([\w-]+)(?:\[.+\])?>=([\d.]+)", line) for line in lines if not line.startswith("khanhllm[")]
    return {bound[1].lower().replace("_", "-"): bound[2] for bound in found}


def test_the_lowest_versions_are_the_bounds_of_the_project():
    assert pinned("constraints-lowest.txt") == lower_bounds()
