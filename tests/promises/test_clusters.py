"""A cluster runs one command line again and again, on machines that may not all see the same at once."""

import json
import shutil
import sys

from test_resume import config, outcome

from khanhllm import cli
from khanhllm.machine import launch
from khanhllm.settings import to_toml
from khanhllm.training.run import train

WORKER = """
import json, os, sys
from pathlib import Path
from khanhllm.schema import Config
from khanhllm.training.run import train
settings, folder = json.loads(sys.argv[1])
train(Config.model_validate(settings), Path(folder), resume=os.environ["RANK"] == "0")
"""


def test_one_command_line_begins_goes_on_and_leaves_a_finished_run_in_peace(corpus, tmp_path, capsys):
    own, run = tmp_path / "own.toml", tmp_path / "run"
    own.write_text(to_toml(config(corpus, tmp_path / "shards")))
    words = ["train", "--config", str(own), "--run", str(run), "--resume-or-new"]
    for steps, says in (("10", "model:"), ("20", "resumed after step 10"), ("20", "20 steps already")):
        assert cli.main([*words, "--steps", steps]) == 0
        assert says in capsys.readouterr().out
    (run / "checkpoints" / "step-0000020" / "model.safetensors").write_bytes(b"")
    assert cli.main([*words, "--steps", "20"]) == 0
    assert "resumed after step 1" in capsys.readouterr().out  # a broken checkpoint finishes nothing
    assert cli.main([*words[:-1], "--resume", "--steps", "20"]) == 2


def test_the_first_process_says_whether_there_is_a_run(corpus, tmp_path):
    """A disk of the network may show the others what was there before."""
    whole = config(corpus, tmp_path / "shards", train={"steps": 4, "save_every": 2, "micro_batch": 1})
    train(whole, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-0000004")
    worker = [sys.executable, "-c", WORKER, json.dumps([whole.model_dump(), str(tmp_path / "run")])]
    assert launch.Hands(worker, 2, tmp_path).run() == ""
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
