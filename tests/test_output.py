"""What is printed reaches its reader without harm, or the exit code says that it did not."""

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import tiny
from khanhllm import cli
from khanhllm.settings import to_toml

GOLDEN = Path(__file__).parent / "golden" / "modern"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_what_is_printed_onto_a_full_disk_is_not_called_done(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(to_toml(tiny()))
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "khanhllm", "runs", str(tmp_path)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "khanhllm: cannot write the output: No space left on device\n")


def test_a_prompt_cannot_steer_the_terminal(tmp_path, monkeypatch, capsys):
    (tmp_path / "prompt.txt").write_text("a\x1b[2J\nb")
    words = ["generate", str(GOLDEN), "--prompt-file", str(tmp_path / "prompt.txt"), "--tokens", "1"]
    assert cli.main([*words, "--machine.device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("a\x1b[2J\nb")  # a file or a pipe gets every byte
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main([*words, "--machine.device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("a\\x1b[2J\nb")
