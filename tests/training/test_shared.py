"""A checkpoint of which each process writes its part. The processes are threads here; tests/promises has real ones."""

import errno
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import count
from threading import Barrier, Event, local
from types import SimpleNamespace

import pytest
import torch
from test_checkpoint import one_step

from conftest import build, save, tiny
from khanhllm import limits, optim
from khanhllm.errors import UserError
from khanhllm.machine.group import ALONE, Group
from khanhllm.machine.owners import Owners
from khanhllm.model.counts import on_paper
from khanhllm.training import checkpoint, saver, tensor_files
from khanhllm.training.saver import Saver


def processes(size, work):
    """What `work` returns on each process of a group, or the error that it ends with."""
    barrier, said = Barrier(size, timeout=20), [None] * size

    class Process(Group):
        def heard(self, value):
            said[self.rank] = value
            barrier.wait()
            found = [*said]
            barrier.wait()
            return found

        def exchange(self, *numbers):
            return self.heard(numbers)

        def told(self, make):
            return self.heard(make() if self.leads else None)[0]

    def run(rank):
        try:
            return work(Process(rank, size, local_size=size))
        except (OSError, UserError) as error:
            return f"{type(error).__name__}: {error}"

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def part(group, step, model, optimizer, **state):
    """What a process of the training writes."""
    owners, shapes = Owners(model.parameters(), group), optim.state_shapes(optimizer)
    takers = owners.takers()
    moments = owners.gathered(optimizer.state, shapes, None, takers)
    return checkpoint.snapshot(step, model, optimizer, state, moments, owners.weights(model, takers))


def shared_save(run, size, step, model, optimizer, must=True):
    """What each process hears of a save."""

    def work(group):
        heard = []
        with Saver(run, 2, heard.append, group=group) as one:
            one.save(part(group, step, model, optimizer), must)
            one.report(patient=True)
        return heard

    return processes(size, work)


@pytest.fixture
def trained():
    return one_step(build(tiny()))


def full_on(rank, monkeypatch):
    """The disk of one process is full."""
    honest = checkpoint.write_part

    def write_part(run, own, nth, of):
        if nth == rank:
            raise OSError(errno.ENOSPC, "No space left on device")
        return honest(run, own, nth, of)

    monkeypatch.setattr(checkpoint, "write_part", write_part)


@pytest.mark.parametrize("size", [2, 40])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon", "muon8bit"])
def test_what_several_have_written_is_what_one_writes(name, size, tmp_path):
    """Also where there are more of them than tensors."""
    model, optimizer = one_step(build(tiny(dim=64, hidden=128)), name)
    for folder in ("one", "many"):
        (tmp_path / folder).mkdir()
    one = save(tmp_path / "one", 7, model, optimizer, {})
    assert set(map(str, shared_save(tmp_path / "many", size, 7, model, optimizer))) == {
        str([f"saved {tmp_path / 'many' / 'checkpoints' / 'step-0000007'}"])
    }
    path = checkpoint.newest(tmp_path / "many", paper=on_paper(tiny(dim=64, hidden=128).model))
    assert len([*path.iterdir()]) == 2 * size + 2
    assert (path / "state.json").read_bytes() == (one / "state.json").read_bytes()
    for kind in tensor_files.KINDS:
        ours, theirs = (tensor_files.load(place, kind) for place in (path, one))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    assert tensor_files.identity(path) != tensor_files.identity(one)


def test_a_step_that_is_saved_is_not_saved_again(tmp_path, trained):
    assert len(shared_save(tmp_path, 2, 3, *trained)[0]) == 1
    assert shared_save(tmp_path, 2, 3, *trained) == [[], []]


def test_nobody_writes_or_holds_more_than_its_part(tmp_path, monkeypatch, trained):
    """Bytes that come to the writer, and what is kept for it."""
    honest, written = tensor_files.save_file, {}

    def counting(tensors, path):
        written[path.name] = sum(tensor.nbytes for tensor in tensors.values())
        honest(tensors, path)

    monkeypatch.setattr(tensor_files, "save_file", counting)
    whole = checkpoint.snapshot(1, *trained, {})
    largest = max(tensor.nbytes for tensor in whole.model.values())

    def work(group):
        own = part(group, 1, *trained)
        with Saver(tmp_path, 2, group=group) as one:
            kept = one.begin(own)
            assert one.outcome(patient=True)
        return kept.bytes, own.bytes

    found = processes(4, work)
    assert sum(kept for kept, _ in found) == sum(written.values()) == whole.bytes
    assert max(kept for kept, _ in found) <= whole.bytes / 4 + 3 * largest
    assert {left for _, left in found} == {0}
    assert (
        max(size for name, size in written.items() if "model" in name)
        <= sum(tensor.nbytes for tensor in whole.model.values()) / 4 + largest
    )


def test_the_training_goes_on_while_files_are_written(tmp_path, monkeypatch, trained):
    """All hear that it is saved at the same step, once the last of them has written its part."""
    honest, go_on, before = checkpoint.write_part, Event(), trained[0].state_dict()["head.weight"].clone()

    def slow(run, own, nth, of):
        if nth == 1:
            go_on.wait(10)
        return honest(run, own, nth, of)

    monkeypatch.setattr(checkpoint, "write_part", slow)

    def work(group):
        with Saver(tmp_path, 2, group=group) as one:
            one.begin(part(group, 5, *trained))
            group.told(lambda: wait([one._writing]) and None)  # the first has written its part
            heard = [one.outcome(), one.outcome()]
            group.told(lambda: trained[0].head.weight.data.zero_())  # the next step
            group.told(go_on.set)
            return [*heard, one.outcome(patient=True), one.outcome()]

    path = tmp_path / "checkpoints" / "step-0000005"
    assert processes(2, work) == [[None, None, path, None]] * 2
    assert checkpoint.verify(path) is None
    assert torch.equal(tensor_files.load(path, "model")["head.weight"], before)


@pytest.mark.parametrize("enough", ["for one", "for each, but not for all"])
def test_without_memory_for_copies_they_wait_until_all_is_written(enough, tmp_path, monkeypatch, trained):
    """Also those that have the memory: in a step they would only wait for the others."""
    size = checkpoint.snapshot(1, *trained, {}).bytes
    free = iter([2**40])
    monkeypatch.setattr(
        limits, "memory", lambda: limits.Memory(next(free, 0) if enough == "for one" else int(1.2 * size), 2**40)
    )

    def work(group):
        own = part(group, 1, *trained)
        with Saver(tmp_path, 2, group=group) as one:
            assert one.begin(own) is own
            assert one._writing.done()
            return one.outcome()

    assert processes(2, work) == [tmp_path / "checkpoints" / "step-0000001"] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_full_for_one_is_told_to_all(rank, tmp_path, monkeypatch, trained):
    good = save(tmp_path, 1, *trained, {})
    full_on(rank, monkeypatch)
    said = f"a checkpoint could not be saved: process {rank}: [Errno 28] No space left on device"
    left = "the last one saved is step-0000001, for --resume"
    assert shared_save(tmp_path, 2, 2, *trained, must=False) == [[f"{said}; training continues; {left}"]] * 2
    assert [*good.parent.iterdir()] == [good] and checkpoint.newest(tmp_path) == good
    assert shared_save(tmp_path, 2, 2, *trained) == [f"UserError: {said}; {left}"] * 2
    monkeypatch.undo()
    shared_save(tmp_path, 2, 2, *trained)
    assert checkpoint.newest(tmp_path).name == "step-0000002"


def test_they_wait_together_for_room(tmp_path, monkeypatch, trained):
    free = iter([10, 10, 10])
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=next(free, 10**9)))
    (first, *others) = shared_save(tmp_path, 3, 2, *trained)
    assert others == [first] * 2
    assert "has 10 bytes free" in first[0] and "make room there: this waits" in first[0]
    assert first[1] == f"saved {tmp_path / 'checkpoints' / 'step-0000002'}"


def test_what_cannot_be_published_is_a_failed_save_for_all(tmp_path, monkeypatch, trained):
    good, honest = save(tmp_path, 1, *trained, {}), os.fsync
    shared_save(tmp_path, 2, 2, *trained)

    def fsync(handle):
        if next(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")
        honest(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    for failing in range(1, 8):  # noqa: B007  read by `fsync`: four files of tensors, two of JSON, the folder
        calls = count(1)
        first, second = shared_save(tmp_path, 2, 3, *trained, must=False)
        assert first == second and "Input/output error; training continues" in first[0]
        assert {path.name for path in good.parent.iterdir()} == {good.name, "step-0000002"}


def test_who_is_killed_before_the_rename_leaves_the_last_checkpoint(tmp_path, trained):
    """The next save, of whatever form, removes the parts."""
    good = save(tmp_path, 1, *trained, {})

    def killed(group):
        with Saver(tmp_path, 2, group=group) as one:
            one.begin(part(group, 2, *trained))

    processes(2, killed)
    left = good.with_name("step-0000002.tmp")
    assert len([*left.iterdir()]) == 4 and checkpoint.newest(tmp_path) == good
    save(tmp_path, 3, *trained, {})
    assert not left.exists()


def test_small_checkpoints_are_written_by_the_first_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "SHARED_FROM", 100)
    assert saver.writers(tmp_path, 100, Group(0, 2)) == (tmp_path, ALONE)
    assert saver.writers(tmp_path, 101, ALONE) == (tmp_path, ALONE)
    found = processes(2, lambda group: saver.writers(tmp_path / f"{group.rank}", 100, group))
    assert found == [(tmp_path / "0", ALONE), (tmp_path / "1", ALONE)]


def test_all_must_see_the_folder_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "SHARED_FROM", 0)
    (tmp_path / "run").mkdir()
    (tmp_path / "other").mkdir()

    def work(group):
        path, by = saver.writers(tmp_path / "run" if group.leads else tmp_path / "scratch", 10**9, group)
        return path, by.size

    assert processes(3, work) == [(tmp_path / "run", 3)] * 3
    honest, here = tempfile.mkstemp, local()

    def mkstemp(dir, prefix):
        return honest(dir=elsewhere if here.rank == 2 else dir, prefix=prefix)

    def blind(group):
        here.rank = group.rank
        return work(group)

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    for elsewhere in (tmp_path / "none", tmp_path / "other"):  # noqa: B007  read by `mkstemp`: of another machine
        (said,) = set(processes(3, blind))
        assert said.startswith(f"UserError: process 2 cannot write into {tmp_path / 'run'} of process 0")
        assert "a checkpoint takes 1.0 GB" in said and "(--run)" in said
    assert not [*(tmp_path / "run").iterdir()] and not [*(tmp_path / "other").iterdir()]
