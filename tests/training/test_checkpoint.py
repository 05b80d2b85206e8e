import errno
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from conftest import build, in_parts, save, tiny
from khanhllm import limits, optim
from khanhllm.errors import UserError
from khanhllm.schema import OptimConfig
from khanhllm.training import checkpoint, tensor_files
from khanhllm.training.saver import Saver

MAPS = Path("/proc/self/maps")
"""the files that this process has mapped"""


@pytest.fixture(params=["adamw", "adamw8bit", "muon", "muon8bit"])
def trained(request):
    """A model and its optimizer after one step, so that there are moments to save."""
    return one_step(build(tiny()), request.param)


def one_step(model, name="adamw"):
    optimizer = optim.build(model, OptimConfig(name=name))
    ids = torch.arange(64).view(2, 32)
    model(ids, ids)[0].mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def test_what_comes_back_is_what_was_saved(trained, tmp_path):
    model, optimizer = trained
    path = save(tmp_path, 7, model, optimizer, {"cursor": 14})
    state = checkpoint.read_state(path)
    assert (state["step"], state["cursor"]) == (7, 14)
    other = build(tiny(), seed=1)
    checkpoint.load_model(path, other)
    other_optimizer = optim.build(other, OptimConfig(name=type(optimizer).__name__.lower()))
    checkpoint.load_optimizer(path, other, other_optimizer, state["optimizer"])
    for m, o in ((model, optimizer), (other, other_optimizer)):
        ids = torch.arange(64).flip(0).view(2, 32)
        m(ids, ids)[0].mean().backward()
        o.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux says which files are mapped")
def test_nothing_that_comes_back_holds_on_to_the_files(trained, tmp_path):
    """Or a checkpoint that is deleted fills the disk for as long as the run lasts."""
    model, optimizer = trained
    path = save(tmp_path, 7, model, optimizer, {})
    checkpoint.load_model(path, model)
    checkpoint.load_optimizer(path, model, optimizer, checkpoint.read_state(path)["optimizer"])
    assert str(path) not in MAPS.read_text()


@pytest.mark.parametrize("of", [1, 3])
def test_any_changed_byte_is_found(of, tmp_path):
    path = in_parts(tmp_path, checkpoint.snapshot(1, *one_step(build(tiny())), {}), of)
    assert len([*path.iterdir()]) == 2 * of + 2
    assert checkpoint.verify(path) is None
    chance = random.Random(0)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for place in [0, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(20))]:
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert checkpoint.verify(path), (file.name, place)
        for length in (0, 1, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:length])
            assert checkpoint.verify(path), (file.name, length)
        file.unlink()
        assert checkpoint.verify(path), file.name
        file.write_bytes(whole)
    assert checkpoint.verify(path) is None


def test_no_file_of_several_may_be_missing_from_the_manifest(tmp_path):
    path = in_parts(tmp_path, checkpoint.snapshot(1, *one_step(build(tiny())), {}), 3)
    whole = json.loads((path / "manifest.json").read_text())
    for name in whole:
        (path / "manifest.json").write_text(json.dumps({key: value for key, value in whole.items() if key != name}))
        assert checkpoint.verify(path) == f"the manifest lacks {name}"


def test_a_tensor_lies_in_one_file_alone(tmp_path):
    """Else which of the two is read would be chance."""
    twice = {"one": torch.zeros(1)}
    state = checkpoint.snapshot(1, *one_step(build(tiny())), {}).state
    part = checkpoint.Snapshot(1, twice, {}, state)
    checkpoint.prepare(tmp_path, 1, 0)
    first, second = (checkpoint.write_part(tmp_path, part, nth, 2) for nth in range(2))
    path = checkpoint.publish(tmp_path, part, first | second)
    assert "model-00002-of-00002.safetensors: another file of the checkpoint holds one too" in checkpoint.verify(path)


def test_many_files_claim_no_more_than_one_may(tmp_path):
    """Each is short enough by itself."""
    model, optimizer = one_step(build(tiny()))
    path = in_parts(tmp_path, checkpoint.snapshot(1, model, optimizer, {}), 2)
    manifest = json.loads((path / "manifest.json").read_text())
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        os.truncate(path / name, 10**7)
        manifest[name]["bytes"] = 10**7
    (path / "manifest.json").write_text(json.dumps(manifest))
    said = "model-00002-of-00002.safetensors has 10,000,000 bytes, more than there is to keep"
    assert checkpoint.verify(path, model) == said


def test_what_another_process_wrote_must_be_there(tmp_path):
    whole = checkpoint.snapshot(1, *one_step(build(tiny())), {})
    checkpoint.prepare(tmp_path, 1, 0)
    files = checkpoint.write_part(tmp_path, whole) | {"model-00002-of-00002.safetensors": {}}
    with pytest.raises(OSError, match=r"model-00002-of-00002\.safetensors was written, but is not there"):
        checkpoint.publish(tmp_path, whole, files)


def test_a_broken_one_is_passed_over_aloud(tmp_path):
    model, optimizer = one_step(build(tiny()))
    older, newer = (save(tmp_path, step, model, optimizer, {}) for step in (1, 2))
    assert checkpoint.newest(tmp_path) == newer
    (newer / "model.safetensors").write_bytes(b"")
    heard = []
    assert checkpoint.newest(tmp_path, heard.append) == older
    assert "step-0000002" in heard[0]
    assert "model.safetensors" in heard[0]
    (older / "state.json").unlink()
    with pytest.raises(UserError, match="none of the 2"):
        checkpoint.newest(tmp_path, heard.append)
    checkpoint.reject_after(tmp_path, 1)  # the way a resumed run begins
    assert save(tmp_path, 2, model, optimizer, {}) == newer  # the same step again, in its place
    assert checkpoint.newest(tmp_path) == newer


def test_a_manifest_cannot_point_elsewhere(tmp_path):
    path = save(tmp_path, 1, *one_step(build(tiny())), {})
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"../../etc/passwd": {"bytes": 1, "sha256": ""}}))
    assert "elsewhere" in checkpoint.verify(path)


def test_the_newest_are_kept(tmp_path):
    model, optimizer = one_step(build(tiny()))
    (tmp_path / "checkpoints" / "step-0000012.tmp").mkdir(parents=True)  # left by a save that was killed
    for step in (1, 9, 10, 11):
        save(tmp_path, step, model, optimizer, {})
    checkpoint.prune(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-0000010", "step-0000011"]


def test_a_checkpoint_that_goes_while_it_is_read_is_not_called_damaged(tmp_path, monkeypatch):
    """A training removes the old one as soon as there is a new one."""
    model, optimizer = one_step(build(tiny()))
    old, honest, told = save(tmp_path, 1, model, optimizer, {}), checkpoint.verify, []

    def slow(path, paper=None):
        if path == old:
            save(tmp_path, 2, model, optimizer, {})
            checkpoint.prune(tmp_path, 1)
        return honest(path, paper)

    monkeypatch.setattr(checkpoint, "verify", slow)
    assert checkpoint.newest(tmp_path, told.append).name == "step-0000002" and not told


def test_a_disk_that_fills_up_at_any_moment_leaves_the_last_one_whole(tmp_path, monkeypatch):
    model, optimizer = one_step(build(tiny()))
    good = save(tmp_path, 1, model, optimizer, {})
    honest, calls, failing = os.fsync, 0, 0

    def full(handle):
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(handle)

    monkeypatch.setattr(os, "fsync", full)
    for failing in range(1, 6):  # noqa: B007  read by `full`: two tensors files, two JSON files, the directory
        calls = 0
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, 2, model, optimizer, {})
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [good.name]
        assert checkpoint.newest(tmp_path) == good


def test_too_little_room_is_said_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="a checkpoint takes"):
        save(tmp_path, 2, *one_step(build(tiny())), {})


def test_another_model_is_refused_by_name(tmp_path):
    path = save(tmp_path, 1, *one_step(build(tiny())), {})
    with pytest.raises(UserError, match="check model"):
        checkpoint.load_model(path, build(tiny(dim=64)))


def test_nothing_that_is_loaded_can_run_code():
    """No pickle on any road: neither the module nor torch's own use of it."""
    import ast
    from pathlib import Path

    import khanhllm

    for path in Path(khanhllm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "pickle" not in ast.dump(node), path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in {"torch.load", "torch.save", "eval", "exec"}, path


def slowly(monkeypatch):
    """Writing waits until it is told to go on."""
    honest, go_on = checkpoint.write, threading.Event()

    def slow(run, whole):
        go_on.wait(10)
        return honest(run, whole)

    monkeypatch.setattr(checkpoint, "write", slow)
    return go_on


@pytest.mark.parametrize("room", [True, False], ids=["copied", "no-memory-for-a-copy"])
def test_what_is_saved_is_the_moment_of_the_call(room, tmp_path, monkeypatch):
    model, optimizer = one_step(build(tiny()))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    go_on = slowly(monkeypatch)
    if not room:
        monkeypatch.setattr(limits, "memory", lambda: limits.Memory(0, 0))
        go_on.set()
    with Saver(tmp_path, keep=2) as saver:
        saver.begin(checkpoint.snapshot(1, model, optimizer, {}))
        assert (saver.outcome() is None) == room
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        go_on.set()
        path = saver.outcome(patient=True) if room else checkpoint.newest(tmp_path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(path / "model.safetensors").items())


def test_a_failure_in_the_background_is_told_once(tmp_path, monkeypatch):
    def full(run, whole):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    with Saver(tmp_path, keep=2) as saver:
        for failures in (1, 2):
            saver.begin(checkpoint.snapshot(1, *one_step(build(tiny())), {}))
            with pytest.raises(OSError, match="No space"):
                saver.outcome(patient=True)
            assert saver.outcome(patient=True) is None
            assert saver.failures == failures
        monkeypatch.undo()
        saver.begin(checkpoint.snapshot(1, *one_step(build(tiny())), {}))
        assert saver.outcome(patient=True)
        assert saver.failures == 0


def test_a_disk_that_lies_is_found_before_the_checkpoint_is_published(tmp_path, monkeypatch):
    model, optimizer = one_step(build(tiny()))
    good = save(tmp_path, 1, model, optimizer, {})
    honest = tensor_files.save_file

    def lying(tensors, path):
        honest(tensors, path)
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))

    monkeypatch.setattr(tensor_files, "save_file", lying)
    with pytest.raises(OSError, match="reads back differently"):
        save(tmp_path, 2, model, optimizer, {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [good.name]


def test_one_put_aside_keeps_its_reason(tmp_path):
    model, optimizer = one_step(build(tiny()))
    for step in (1, 2, 3):
        save(tmp_path, step, model, optimizer, {})
    (tmp_path / "checkpoints" / "step-0000003" / "state.json").write_text("{}")
    checkpoint.reject_after(tmp_path, 1)
    reasons = {path.parent.name: path.read_text() for path in (tmp_path / "checkpoints").glob("*/reason.txt")}
    assert list(reasons) == ["step-0000003.rejected"]  # and no other: each takes as much room as a checkpoint
    assert "state.json" in reasons["step-0000003.rejected"]
    checkpoint.prune(tmp_path, 1)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    save(tmp_path, 2, model, optimizer, {})
    checkpoint.reject_after(tmp_path, 1)
    (left,) = (tmp_path / "checkpoints").glob("*.rejected")
    assert (left / "reason.txt").read_text() == "the run went back to step 1\n"
    checkpoint.reject_after(tmp_path, 1)  # nothing to put aside: the reason of the last time stays
    assert left.exists()


def test_saving_in_bad_times_deletes_nothing(tmp_path):
    model, optimizer = one_step(build(tiny()))
    with Saver(tmp_path, keep=1) as saver:
        for step, rejected in ((1, 0), (2, 0), (3, 1)):
            saver.begin(checkpoint.snapshot(step, model, optimizer, {"guard": {"rejected": rejected}}))
            saver.outcome(patient=True)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-0000002", "step-0000003"]


def test_a_file_that_cannot_be_opened_again_is_a_failed_save(tmp_path, monkeypatch):
    def no_handle_left(*_, **__):
        raise RuntimeError("unable to open file: Too many open files")

    monkeypatch.setattr(tensor_files, "safe_open", no_handle_left)
    with pytest.raises(OSError, match="Too many open files"):
        save(tmp_path, 1, *one_step(build(tiny())), {})
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.slow
def test_saving_starts_no_second_team_of_threads(tmp_path):
    """More OpenMP threads than cores would make every later operation of the training sleep and wake."""
    code = f"""
import psutil, torch
from pathlib import Path
from khanhllm.training import checkpoint
from khanhllm.training.saver import Saver
torch.set_num_threads(2)
model = torch.nn.Linear(512, 512)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(512, 512)).sum().backward(); optimizer.step()  # the training's own team is there
threads = psutil.Process().num_threads()
with Saver(Path({str(tmp_path)!r}), keep=1) as saver:
    saver.begin(checkpoint.snapshot(1, model, optimizer, {{}}))
    assert saver.outcome(patient=True)
    print(psutil.Process().num_threads() - threads)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 1  # the saver's own


def test_its_size_is_known_before_the_first_step(trained):
    model, optimizer = trained
    fresh = optim.build(model, OptimConfig(name=type(optimizer).__name__.lower()))
    assert checkpoint.size(model, fresh) == checkpoint.snapshot(1, model, optimizer, {}).bytes


def test_the_sign_of_a_zero_is_a_byte_too(tmp_path, monkeypatch):
    """What was written is compared as bytes: as numbers, 0 equals -0, and NaN not even itself."""
    honest = tensor_files.save_file
    checkpoint.write(tmp_path, checkpoint.Snapshot(1, {"one": torch.tensor([torch.nan])}, {}, {}))

    def lying(tensors, path):
        honest(tensors, path)
        path.write_bytes(path.read_bytes()[:-1] + b"\x80")

    monkeypatch.setattr(tensor_files, "save_file", lying)
    with pytest.raises(OSError, match="reads back differently"):
        checkpoint.write(tmp_path, checkpoint.Snapshot(2, {"one": torch.zeros(1)}, {}, {}))
