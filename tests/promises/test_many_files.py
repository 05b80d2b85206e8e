"""A checkpoint that several processes have written is read by all that read one of one process."""

import shutil

import pytest
from test_resume import config, outcome

from conftest import in_parts
from khanhllm.export.exporting import export
from khanhllm.model.counts import on_paper
from khanhllm.runs.listing import runs_in
from khanhllm.runs.run import open_run
from khanhllm.training import checkpoint, tensor_files
from khanhllm.training.run import train

LENGTH = {"steps": 8, "save_every": 4}


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """A run, and the same in many files."""
    folder = tmp_path_factory.mktemp("runs")
    whole = config(corpus, folder / "shards", train=LENGTH, optim={"name": "muon"})
    train(whole, folder / "one")
    shutil.copytree(folder / "one", folder / "many")
    for path in checkpoint.steps(folder / "many"):
        held = [tensor_files.load(path, kind) for kind in tensor_files.KINDS]
        kept = checkpoint.Snapshot(checkpoint.step_of(path), *held, checkpoint.read_state(path))
        path.rename(folder / path.name)
        in_parts(folder / "many", kept, 3)
    assert checkpoint.verify(checkpoint.newest(folder / "many"), on_paper(whole.model)) is None
    return folder / "one", folder / "many"


def test_it_writes_and_answers_the_same(runs):
    for step in (None, 4, "best"):
        one, many = (open_run(run, step=step) for run in runs)
        assert many.generate("The", tokens=8) == one.generate("The", tokens=8)


def test_it_is_exported_to_the_same_bytes(runs, tmp_path):
    for run, name in zip(runs, ("one", "many"), strict=True):
        export(checkpoint.newest(run), "hf", tmp_path / name, compared=False)
    assert_same(tmp_path / "one" / "model.safetensors", tmp_path / "many" / "model.safetensors")


def test_it_is_saved_as_one_file_again(runs, tmp_path):
    saved = checkpoint.newest(open_run(runs[1]).save(tmp_path / "again"))
    for kind in tensor_files.KINDS:
        assert_same(saved / tensor_files.name(kind), checkpoint.newest(runs[0]) / tensor_files.name(kind))


def assert_same(path, other):
    assert path.read_bytes() == other.read_bytes()


def test_it_is_listed_and_has_a_name_of_its_own(runs):
    assert "fault" not in runs_in(runs[1])[0]
    names = {tensor_files.identity(path) for path in checkpoint.steps(runs[1])}
    assert len(names) == 2 and all(len(name) == 64 for name in names)


def test_one_process_goes_on_from_it(runs, corpus, tmp_path):
    longer = config(corpus, runs[0].parent / "shards", train=LENGTH | {"steps": 12}, optim={"name": "muon"})
    for run, name in zip(runs, ("one", "many"), strict=True):
        train(longer, shutil.copytree(run, tmp_path / name), resume=True)
    assert outcome(tmp_path / "many") == outcome(tmp_path / "one")
