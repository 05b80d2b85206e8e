"""Laws of executors: neither they nor the number of tasks show in the shards, and nothing finished is done again."""

import gzip
import os
import re
import subprocess

import pytest
from datatrove.executor import LocalPipelineExecutor
from words import TOKENIZER, lines, text

from khanhllm.cli import main
from khanhllm.data import executors
from khanhllm.data.executors import Execution
from khanhllm.data.prepare import prepare
from khanhllm.data.readers import Reader
from khanhllm.data.shards import Manifest, Shards
from khanhllm.data.sources import Source
from khanhllm.errors import UserError


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Each file a group of its own."""
    whole = Source.groups
    monkeypatch.setattr(Source, "groups", lambda self: whole(self, least=1))


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for part in range(5):
        content = lines(text(part * 60 + line, 30) for line in range(60))
        (folder / f"{part}.json.gz").write_bytes(gzip.compress(content.encode()))
    return folder


@pytest.fixture
def expected(corpus, tmp_path):
    return prepare(str(corpus), TOKENIZER, tmp_path / "expected", validation=0.1, workers=1)


@pytest.mark.parametrize(("tasks", "workers"), [(1, 1), (2, 2), (3, 1), (50, 1)])
def test_the_number_of_tasks_does_not_show(corpus, tmp_path, expected, tasks, workers):
    place = Execution(tasks=tasks, workers=workers)
    assert prepare(str(corpus), TOKENIZER, tmp_path / "out", validation=0.1, execution=place) == expected
    Shards.open(tmp_path / "out", "train", 8).verify()
    assert {path.name for path in (tmp_path / "out").glob("*.bin*")} == {shard.file for shard in expected.shards}


def test_a_system_without_a_fork_server_makes_the_same_shards(corpus, tmp_path, expected, monkeypatch):
    """As Windows is one."""
    made = []
    monkeypatch.setattr(executors, "get_all_start_methods", lambda: ["spawn"])
    monkeypatch.setattr(
        executors, "LocalPipelineExecutor", lambda **given: made.append(LocalPipelineExecutor(**given)) or made[-1]
    )
    assert prepare(str(corpus), TOKENIZER, tmp_path / "out", validation=0.1, workers=2) == expected
    assert made[-1].start_method == "spawn"


@pytest.mark.parametrize("tokens", [0, 9000])
def test_what_was_interrupted_goes_on_and_finished_groups_are_skipped(corpus, tmp_path, monkeypatch, tokens):
    settings = {"validation": 0.1, "tokens": tokens}
    expected = prepare(str(corpus), TOKENIZER, tmp_path / "expected", workers=1, **settings)
    read, opened = Reader.read_file, []

    def stop(self, name):
        opened.append(name)
        for nth, document in enumerate(read(self, name)):
            if len(opened) == 3 and nth == 10:
                raise KeyboardInterrupt
            yield document

    monkeypatch.setattr(Reader, "read_file", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(corpus), TOKENIZER, tmp_path / "out", workers=1, **settings)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial").is_dir()
    first = opened[:2]
    opened[:] = ["", "", ""]
    assert prepare(str(corpus), TOKENIZER, tmp_path / "out", workers=1, **settings) == expected
    assert not set(first) & set(opened)
    assert not (tmp_path / ".out.partial").exists()
    Shards.open(tmp_path / "out", "train", 8).verify()


def test_another_recipe_begins_anew(corpus, tmp_path, expected, monkeypatch):
    whole = Reader.read_file
    monkeypatch.setattr(Reader, "read_file", lambda self, name: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        prepare(str(corpus), TOKENIZER, tmp_path / "out", validation=0.5, workers=1)
    monkeypatch.setattr(Reader, "read_file", whole)
    assert prepare(str(corpus), TOKENIZER, tmp_path / "out", validation=0.1, workers=1) == expected


def script(path, text):
    path.write_text("#!/bin/bash\n" + text, encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A cluster that queues a job until it is told to run."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    script(folder / "sbatch", f'cp "${{@: -1}}" {folder}/job; echo Submitted batch job 77\n')
    script(folder / "srun", 'shift 3; exec "$@"\n')
    script(folder / "scontrol", "echo here\n")
    script(folder / "squeue", f"[ -e {folder}/gone ] || echo 77\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def run_tasks(slurm, ranks):
    for rank in ranks:
        more = {"SLURM_ARRAY_TASK_ID": str(rank), "RUN_OFFSET": "0", "SLURM_NODELIST": "here"}
        subprocess.run(["bash", slurm / "job"], env=os.environ | more, check=True, capture_output=True)


def test_slurm_gets_an_array_and_the_same_command_publishes(corpus, tmp_path, expected, slurm, capfd):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    command = ["prepare", "--data", str(corpus), "--tokenizer", str(tmp_path / "tokenizer.json"), "--validation", "0.1"]
    command += ["--out", str(tmp_path / "out"), "--executor", "slurm", "--tasks", "2", "--partition", "cpu"]
    command += ["--time", "1:00:00", "--cpus", "3", "--mem-per-cpu", "5"]
    assert main(command) == 0
    submitted = (slurm / "job").read_text(encoding="utf-8")
    for line in ("--array=0-1", "--partition=cpu", "--time=1:00:00", "--cpus-per-task=3", "--mem-per-cpu=5G"):
        assert re.search(f"^#SBATCH {line}$", submitted, re.M), submitted
    assert "0 of 5 groups are done" in capfd.readouterr().err
    run_tasks(slurm, [1])
    (slurm / "job").rename(slurm / "first")
    assert main(command) == 0 and not (slurm / "job").exists()
    assert "2 of 5 groups are done by Slurm job 77" in capfd.readouterr().err
    (slurm / "gone").touch()  # the other task was lost: it is handed in again
    assert main(command) == 0 and (slurm / "job").exists() and not (tmp_path / "out").exists()
    run_tasks(slurm, [0, 1])
    assert main(command) == 0
    assert Manifest.read(tmp_path / "out") == expected
    Shards.open(tmp_path / "out", "train", 8).verify()


def test_what_cannot_work_is_said_at_once(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    for place, tokens, said in (
        (Execution("slurm", partition="cpu"), 9, "--tokens needs --executor local"),
        (Execution("slurm"), 0, "needs a --partition"),
        (Execution("slurm", partition="cpu"), 0, "needs the command sbatch"),
        (Execution("cloud"), 0, "must be local, slurm or ray"),
        (Execution(tasks=-1), 0, "tasks must be 0 or more"),
        (Execution(cpus=0), 0, "cpus and mem-per-cpu must be 1 or more"),
    ):
        with pytest.raises(UserError, match=said):
            prepare(str(corpus), TOKENIZER, tmp_path / "out", validation=0.1, tokens=tokens, execution=place)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'khanhllm\[ray\]'"):
        prepare(str(corpus), TOKENIZER, tmp_path / "out", validation=0.1, execution=Execution("ray"))
    assert not (tmp_path / ".out.partial").exists()


def test_ray_makes_the_same_shards(corpus, tmp_path, expected):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, log_to_driver=False)
    try:
        place = Execution("ray", tasks=2, workers=2)
        assert prepare(str(corpus), TOKENIZER, tmp_path / "out", validation=0.1, execution=place) == expected
    finally:
        ray.shutdown()
