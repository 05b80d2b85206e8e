"""No road of the package leads from data to code, by its syntax trees; and importing it asks nobody, as is tried."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import khanhllm

FILES = sorted(Path(khanhllm.__file__).parent.rglob("*.py"))
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "code", "yaml"}
CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.save", "torch.jit.load", "torch.hub.load",
    "torch.package", "os.system", "os.popen", "runpy.run_path", "np.fromregex",
}  # fmt: skip
SWITCHES = {"trust_remote_code", "allow_pickle", "shell"}


def forbidden(tree: ast.AST) -> list[str]:
    """What in a syntax tree could run what was read."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if MODULES & set(name.split("."))]
        elif isinstance(node, ast.Attribute) and node.attr in MODULES - {"code"}:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in CALLS else []
            found += [f"{name}({word.arg}=...)" for word in node.keywords if on(word)]
        elif isinstance(node, ast.Constant) and node.value in SWITCHES - {"shell"}:
            found.append(node.value)  # a switch hidden in a dict
    return found


def on(word: ast.keyword) -> bool:
    return word.arg in SWITCHES and not (isinstance(word.value, ast.Constant) and word.value.value is False)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(FILES[0].parent).as_posix())
def test_no_file_can_run_what_it_reads(path):
    assert forbidden(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import marshal as m", "from torch.package import pickle",
        "torch.load(path)", "eval(text)", "exec(text)", "__import__(name)", "os.system(line)",
        "torch.serialization.pickle",
        "np.load(path, allow_pickle=True)", "np.load(path, allow_pickle=flag)", "subprocess.run(line, shell=True)",
        "load(name, trust_remote_code=True)", "load(name, **{'trust_remote_code': True})", "import yaml",
    ],
)  # fmt: skip
def test_the_eye_is_sharp(line):
    assert forbidden(ast.parse(line)) or ("yaml" in line and forbidden(ast.parse("import yaml")))
    assert not forbidden(ast.parse("np.load(path, allow_pickle=False); re.compile(text); model.eval()"))


OFFLINE = """
import socket, sys

def refuse(*_, **__):
    raise SystemExit("it asked the network")

socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
import importlib, pkgutil, khanhllm
from khanhllm import cli
for module in pkgutil.walk_packages(khanhllm.__path__, "khanhllm."):
    if not module.name.endswith(("__main__", "triton_grouped")):
        importlib.import_module(module.name)
for verb in ["", *(verb for verbs in cli.VERBS.values() for verb in verbs)]:
    try:
        cli.main([*verb.split(), "--help"])
    except SystemExit as end:
        assert end.code == 0, end.code
print("quiet")
"""


@pytest.mark.slow
def test_imports_and_help_ask_nobody():
    done = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr
    assert done.stdout.endswith("quiet\n")
