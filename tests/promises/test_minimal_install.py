"""Without the extras a run can be loaded, can write and be scored, and can be trained on shards. What needs an extra
says which one, in one line."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden"
WITHOUT = """
import sys

EXTRAS = "datatrove tokenizers fsspec orjson pyarrow requests zstandard matplotlib bitsandbytes py3langid".split()
EXTRAS += ["starlette", "uvicorn", "lm_eval"]

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import tiktoken  # whose own dependencies are no extras of ours
sys.meta_path.insert(0, Missing())
from khanhllm.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def khanhllm(tmp_path):
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)

    def call(*words: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-c", WITHOUT, *words], cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return call


def test_a_run_is_resumed_scored_and_writes(khanhllm):
    for words in (
        ("train", "--resume", "--run", "modern"),
        ("evaluate", "modern"),
        ("evaluate", "modern", "--suite", "--items", "10"),
        ("generate", "modern", "--tokens", "3"),
        ("plan", "nano"),
        ("doctor", "nano"),
        ("experts", "modern", "--tokens", "100"),
    ):
        code, said = khanhllm(*words)
        assert code == 0, said
    assert "no picture: this needs matplotlib" in said


@pytest.mark.parametrize(
    ("words", "module", "extra"),
    [
        (("train", "nano", "--data", "stdlib"), "datatrove", "data"),
        (("evaluate", "modern", "--data", "stdlib"), "datatrove", "data"),
        (("evaluate", "modern", "--tasks", "piqa"), "lm_eval", "eval"),
        (("tokenizer", "--data", "stdlib"), "datatrove", "data"),
        (("compare", "modern"), "matplotlib", "plot"),
        (("serve", "modern"), "uvicorn", "serve"),
        (("train", "nano", "--data", "shards", "--optim.name", "adamw8bit", "--run", "x"), "bitsandbytes", "8bit"),
    ],
)
def test_what_is_missing_is_named_in_one_line(khanhllm, words, module, extra):
    code, said = khanhllm(*words)
    last = said.splitlines()[-1]
    assert code == 2, said
    assert last.startswith("khanhllm: ") and module in last and f"pip install 'khanhllm[{extra}]'" in last
    assert "Traceback" not in said
