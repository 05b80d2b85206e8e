"""The list of runs: what is there is told, what is damaged has a word."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import tiny
from khanhllm import cli
from khanhllm.settings import to_toml


@pytest.fixture
def folder(tmp_path):
    for name, log in (("good", "step,loss,tokens,val_bpb\n1,5.5,64,\n2,5.0,128,1.75\n"), ("new", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text(to_toml(tiny()), "utf-8")
        if log:
            (tmp_path / name / "training_log.csv").write_text(log)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.toml").write_text("[model")
    (tmp_path / "no run").mkdir()
    return tmp_path


def test_each_run_is_told_and_a_damaged_one_has_a_word(folder, capsys):
    assert cli.main(["runs", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "step 2/1,000, loss 5.000, best 1.750 bits per byte" in text
    assert "damaged:" in text and "no run" not in text
    assert cli.main(["runs", str(folder), "--json"]) == 0
    rows = {row["run"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["good"]["best_bpb"] == 1.75 and rows["new"]["step"] == 0 and "TOML" in rows["bad"]["fault"]


@pytest.mark.parametrize(
    "left", ["{}", '{"model.safetensors": {"bytes": 9}}', '{"x"', "[]", '{"model.safetensors": 9}']
)
def test_a_checkpoint_that_is_cut_is_told(left, folder, capsys):
    made = folder / "good" / "checkpoints" / "step-0000002"
    made.mkdir(parents=True)
    (made / "model.safetensors").write_bytes(b"12345678")
    (made / "manifest.json").write_text(left)
    assert cli.main(["runs", str(folder / "good")]) == 0
    assert ("damaged: step-0000002/" in capsys.readouterr().out) == (left != "{}")


def test_a_copy_of_a_checkpoint_is_no_checkpoint(folder, capsys):
    (folder / "good" / "checkpoints" / "step-0000002-old1").mkdir(parents=True)
    assert cli.main(["runs", str(folder / "good")]) == 0
    assert "step 2/1,000" in capsys.readouterr().out


def test_where_there_is_none(tmp_path, capsys):
    assert cli.main(["runs", str(tmp_path)]) == 2
    assert cli.main(["runs", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("khanhllm:") == 2


def test_it_needs_no_torch(folder):
    code = (
        f"import sys; from khanhllm import cli; cli.main(['runs', {str(folder)!r}]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_file_that_a_training_removes_meanwhile_hides_no_run(folder, monkeypatch, capsys):
    (folder / "good" / "state.tmp").write_text("x")
    lstat = Path.lstat

    def late(path):
        if path.suffix == ".tmp":
            path.unlink(missing_ok=True)
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", late)
    assert cli.main(["runs", str(folder)]) == 0
    assert "step 2/1,000, loss 5.000" in capsys.readouterr().out
