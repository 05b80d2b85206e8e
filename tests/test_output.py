"""What is printed reaches its reader without harm, or the exit code says that it did not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import tiny
from khanhllm import cli
from khanhllm.settings import to_toml

GOLDEN = Path(__file__).parent / "golden" / "modern"
PRINTED = {
    "plainly": ["runs", str(GOLDEN.parent)],
    "by rich": ["compare", str(GOLDEN)],
    "as help": ["help", "train"],
    "in a line": ["--version"],
}


def printing(words, out, folder):
    """Exit code and errors of a command that prints into `out`, with the buffer that Python has by itself."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "khanhllm", *words]
    done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, cwd=folder, env=own)
    return done.returncode, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("printed", PRINTED)
def test_what_is_printed_onto_a_full_disk_is_not_called_done(tmp_path, printed):
    with Path("/dev/full").open("w") as full:
        found = printing(PRINTED[printed], full, tmp_path)
    assert found == (2, "khanhllm: cannot write the output: No space left on device\n")


@pytest.fixture
def unread():
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.skipif(os.name == "nt", reason="Windows has another error for it")
@pytest.mark.parametrize("printed", PRINTED)
def test_a_reader_that_goes_early_ends_every_command_in_the_same_silence(tmp_path, printed, unread):
    assert printing(PRINTED[printed], unread, tmp_path) == (141, "")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has another error for it")
def test_a_training_needs_no_reader(corpus, tmp_path, unread):
    (tmp_path / "tiny.toml").write_text(to_toml(tiny(vocab_size=600)))
    words = ["train", "--config", "tiny.toml", "--data", str(corpus), "--data.cache", "shards", "--log.every", "1"]
    code, _said = printing([*words, "--data.validation", "0.2", "--run", "run", "--steps", "3"], unread, tmp_path)
    assert code == 0 and (tmp_path / "run" / "checkpoints" / "step-0000003").exists()


def test_a_prompt_cannot_steer_the_terminal(tmp_path, monkeypatch, capsys):
    (tmp_path / "prompt.txt").write_text("a\x1b[2J\nb")
    words = ["generate", str(GOLDEN), "--prompt-file", str(tmp_path / "prompt.txt"), "--tokens", "1"]
    assert cli.main([*words, "--machine.device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("a\x1b[2J\nb")  # a file or a pipe gets every byte
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main([*words, "--machine.device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("a\\x1b[2J\nb")
