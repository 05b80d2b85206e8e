"""What holds for any number of processes: the gradient, the rows, what is known of all of them, what others may hear.

One start of four processes runs the trainings of most of these tests, one after the other; see hands.py.
"""

import os
import shutil
from contextlib import closing, contextmanager, suppress
from ipaddress import ip_address
from itertools import islice
from threading import Event, Thread

import psutil
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from test_processes import short, together
from test_resume import outcome

import khanhllm
from khanhllm import cli
from khanhllm.data.batches import batches
from khanhllm.data.belt import Belt
from khanhllm.data.ensure import ensure
from khanhllm.data.shards import Shards
from khanhllm.machine.group import Group
from khanhllm.machine.launch import Failed
from khanhllm.planning import budget
from khanhllm.schema import DataConfig
from khanhllm.settings import read_config, to_toml
from khanhllm.training import checkpoint, tensor_files
from khanhllm.training.run import train

CUTS = {"alone": (1, ""), "uneven": (2, "3,1"), "three": (3, ""), "four": (4, "")}
"""processes, and their shares, of a step of six micro-batches"""
ROOM = {"second": [3, 2], "first": [1, 3]}
"""rows in a micro-batch for which each of two processes has memory"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def done(corpus, talks, cache, tmp_path_factory):
    """The folder of all runs, after their trainings; one folder for all workers of pytest-xdist."""
    place = tmp_path_factory.getbasetemp()
    folder = (place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "laws"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            train_all(corpus, talks, cache, folder)
            (folder / "done").touch()
    return folder


def train_all(corpus, talks, cache, folder):
    """Let four processes do all trainings, one after the other. The last of them loses a process."""
    folder.mkdir()
    jobs = []

    def job(name, settings, size, fault=None, **more):
        """One process alone is the last of the four, so that the others can go on beside it."""
        more = {"size": size, "first": 3 if size == 1 else 0} | more
        jobs.append((settings, folder / name, more.pop("resume", False), fault, more))

    two = short(corpus, cache, 2)
    for name, sizes, nth in (("2-1", (2, 1), 4), ("1-2", (1, 2), 7)):  # the two each write their part of a checkpoint
        job(name, two, sizes[0], [sizes[0] - 1, nth, "SIGTERM"], first=0, shared=sizes[0] == 2)
        job(name, two, sizes[1], resume=True, first=0, shared=sizes[1] == 2)
    job("shared", two, 2, shared=True, full=[1, [5]])
    job("full", two, 2, shared=True, full=[1, [10]], fails=True)
    wide, long = (short(corpus, cache, 2, train=it) for it in ({"micro_batch": 2}, {"steps": 40, "eval_every": 20}))
    answers = {"targets": "answers", "document_mask": True, "steps": 16}
    faults = {
        "whole": (two, [], ""),
        "talks": (short(corpus, cache, 2, data={"source": str(talks)}, train=answers), [], ""),
        "nan": (two, [3], "nan"),
        "back": (two, [6, 7, 8], "nan"),
        "text": (long, [36, 37, 38], "spike"),
        "memory": (wide, [3], "memory"),
    }
    for name, (settings, nths, kind) in faults.items():
        job(name, settings, 2, [1, nths, kind])
        job(f"{name}-alone", settings, 1, [0, [2 * nth for nth in nths], kind])
    job("time", short(corpus, cache, 2, train={"seconds": 1.0}), 2)
    for name, rows in ROOM.items():
        auto = short(corpus, cache, 12, train={"micro_batch": "auto", "steps": 1})
        job(name, auto, 2, room=[needed(auto, number) for number in rows])
    job("apart", short(corpus, cache, 2, model={"router_bias": True}), 2, [1, 7, "flip"], fails=True)
    for nth, size in enumerate((2, 4, 2)):  # the same four rows in each step, one micro-batch on each process
        length = {"steps": 4 * (nth + 1), "micro_batch": 4 // size}
        settings = short(corpus, cache, size, optim={"name": "muon"}, train=length)
        job("pieces", settings, size, resume=nth > 0)
        job("pieces-alone", settings, 1, resume=nth > 0)
    for name, (size, shares) in CUTS.items():
        six = short(corpus, cache, 6, train={"steps": 20}, machine={"shares": shares, "experts": "loop"})
        job(name, six, size)
        unclipped = six.model_copy(update={"optim": six.optim.model_copy(update={"clip": 0.0})})
        job(f"gradients-{name}", unclipped, size, gradients=True, fails=True)
    job("three-pieces", six, 3, [2, 9, "SIGTERM"])
    job("three-pieces", six, 3, resume=True)
    job("killed", two, 2, [1, 8, "SIGKILL"])
    with pytest.raises(Failed, match=r"^process 1 of 4 was ended by SIGKILL; --resume") as failed:
        together(4, folder / "x", *jobs)
    assert failed.value.exit_code == 75


def needed(settings, rows):
    """Bytes that a step in micro-batches of so many rows takes."""
    return budget.Hardware("", "cpu", "fp32", 0, 0, None).takes(budget.with_micro_batch(settings, rows)).peak


def column(run, name):
    return [float(row[name]) for row in outcome(run)[1]]


@pytest.mark.parametrize("name", ["uneven", "three", "four"])
def test_the_gradient_of_a_step_is_that_of_one_process(done, name):
    """In fp64. That of each parameter lies on one process, its owner."""

    def gradients(name):
        parts = [load_file(path) for path in (done / f"gradients-{name}").glob("*.safetensors")]
        assert len(parts) == CUTS[name][0] and all(parts)
        whole = {key: tensor for part in parts for key, tensor in part.items()}
        assert len(whole) == sum(map(len, parts))
        return whole

    ours, theirs = gradients(name), gradients("alone")
    assert ours.keys() == theirs.keys() and {tensor.dtype for tensor in ours.values()} == {torch.float64}
    largest = max(tensor.abs().max() for tensor in theirs.values())
    assert max((ours[key] - theirs[key]).abs().max() for key in ours) < 1e-6 * largest


@pytest.mark.parametrize("name", ["uneven", "three", "four"])
def test_with_several_micro_batches_on_each_only_rounding_differs(done, name):
    """1e-3, as a token near a tie may go to another expert."""
    assert column(done / name, "loss") == pytest.approx(column(done / "alone", "loss"), abs=1e-3)
    assert column(done / name, "grad_norm") == pytest.approx(column(done / "alone", "grad_norm"), rel=0.01)
    assert len(column(done / name, "loss")) == 20


def test_the_same_number_of_processes_gives_the_same_bits_also_in_pieces(done):
    assert outcome(done / "three-pieces") == outcome(done / "three")


@pytest.mark.parametrize("name", ["2-1", "1-2"])
def test_any_number_of_processes_goes_on_where_another_stopped(done, name):
    """A signal reached one of them: all stopped after that step, saved."""
    assert outcome(done / name) == outcome(done / "whole-alone") == outcome(done / "whole")
    assert "stopped by SIGTERM" in (done / name / "messages.txt").read_text()


def files_of(run):
    return {path.name: sorted(file.name for file in path.glob("*.safetensors")) for path in checkpoint.steps(run)}


def test_each_process_writes_its_part_of_a_large_checkpoint(done):
    """On the disk of one the first of two saves fails: all hear it, and go on."""
    parts = [tensor_files.name(kind, nth, 2) for kind in ("model", "optimizer") for nth in range(2)]
    assert files_of(done / "shared") == {"step-0000010": parts}
    assert outcome(done / "shared") == outcome(done / "whole")
    said = (done / "shared" / "messages.txt").read_text()
    assert "process 1: [Errno 28] No space left on device; training continues; nothing of this run is saved" in said


def test_a_save_that_must_succeed_fails_for_all_if_it_does_for_one(done):
    said = "2 a checkpoint could not be saved: process 1: [Errno 28] No space left on device; the last one saved is "
    for rank in (0, 1):
        assert (done / f"full-{rank}.txt").read_text() == f"{said}step-0000005, for --resume"
    assert [path.name for path in (done / "full" / "checkpoints").iterdir()] == ["step-0000005"]


@pytest.mark.slow
def test_a_kill_before_the_rename_leaves_the_last_checkpoint(corpus, cache, tmp_path):
    """All have written their parts by then. The next save removes them."""
    two = short(corpus, cache, 2, train={"save_every": 3})
    with pytest.raises(Failed, match="process 0 of 2 was ended by SIGKILL"):
        together(2, tmp_path / "x", (two, tmp_path / "run", False, None, {"shared": True, "killed": 6}))
    kept = tmp_path / "run" / "checkpoints"
    assert {path.name for path in kept.iterdir()} == {"step-0000003", "step-0000006.tmp"}
    assert len([*(kept / "step-0000006.tmp").iterdir()]) == 4
    train(two, tmp_path / "run", resume=True)
    train(two, tmp_path / "whole")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert not [*kept.glob("*.tmp")]


def test_two_four_and_two_processes_equal_one(done):
    """Each has one micro-batch of a step."""
    assert outcome(done / "pieces") == outcome(done / "pieces-alone")


def test_nobody_waits_for_one_that_is_gone(done):
    """It was killed in step 8 of 10."""
    settings = read_config(done / "killed")
    train(settings, done / "killed", resume=True)
    assert outcome(done / "killed") == outcome(done / "whole")


def test_where_only_answers_count_too(done):
    """Also in steps in which one process, or none, has an answer."""
    assert outcome(done / "talks") == outcome(done / "talks-alone")
    counted = column(done / "talks", "counted")
    assert {0.0, max(counted) / 2, max(counted)} == set(counted)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nan", "step 3 is rejected: the loss is nan"),
        ("back", "back to step 5, beyond"),
        ("text", "the text has changed"),
    ],
)
def test_all_decide_alike_what_a_rejected_step_means(done, name, says):
    assert outcome(done / name) == outcome(done / f"{name}-alone")
    assert says in (done / name / "messages.txt").read_text()


def test_without_memory_on_one_all_take_smaller_micro_batches(done):
    assert read_config(done / "memory").train.rows == read_config(done / "memory-alone").train.rows == 1
    assert column(done / "memory", "loss") == pytest.approx(column(done / "memory-alone", "loss"), abs=1e-3)


def test_a_run_by_time_ends_by_one_clock(done):
    assert (done / "time" / "checkpoints").exists()


def test_the_log_has_the_memory_of_the_process_that_took_most(done):
    """The nth of them claims to have taken n GB."""
    for name, size in (("alone", 1), ("three", 3), ("four", 4)):
        assert set(khanhllm.history(done / name)["memory_mb"]) == {1000.0 * size}


@pytest.mark.parametrize("name", ROOM)
def test_micro_batches_fit_into_the_process_that_has_least_memory(done, name):
    assert read_config(done / name).train.rows == min(ROOM[name])


def test_weights_on_which_processes_differ_are_not_saved(done):
    for rank in (0, 1):
        said = (done / f"apart-{rank}.txt").read_text()
        assert said.startswith("76 blocks.1.feedforward.router.bias_E has other bits on process 1 than on process 0: ")
    assert [path.name for path in (done / "apart" / "checkpoints").iterdir()] == ["step-0000005"]


@pytest.mark.parametrize("kind", ["shards", "belt"])
def test_every_row_of_a_step_is_one_process_s(kind, corpus, cache):
    """Also where they have unequal shares; from any cursor on, over three steps of six micro-batches."""
    data = {"source": str(corpus), "cache": str(cache), "validation": 0.2, "workers": 1}
    if kind == "belt":
        data |= {"source": f"{corpus}/json*.txt:1,{corpus}/logging*.txt:2", "shard_tokens": 600}
    folder = ensure(DataConfig(**data), 300, 1)

    def read(cursor, turns, rank):
        source = Shards.open(folder, "train", 32) if kind == "shards" else Belt(folder, 32, 4, 2**30, 60.0, rank)
        with closing(batches(source, 2, 7, cursor, torch.device("cpu"), turns=turns)) as stream:
            return [(batch.cursor, batch.inputs_BT.tolist()) for batch in islice(stream, 3 * sum(turns))]

    for cursor in (0, 60):
        whole = read(cursor, [True] * 6, 0)
        assert [place for place, _ in whole] == [*range(cursor + 2, cursor + 37, 2)]
        for shares in ((1,), (1, 1), (1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1, 1), (3, 1), (1, 3, 2)):
            groups = [Group(rank, len(shares), shares=shares) for rank in range(len(shares))]
            parts = [read(cursor, group.turns(6), rank=1) for group in groups]  # the shards lie there by now
            assert all(parts) and sorted(batch for part in parts for batch in part) == whole


@contextmanager
def watched():
    """The state and the address of all sockets that the processes started meanwhile have."""
    found, over = set(), Event()

    def look():
        while not over.wait(0.05):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    sockets = process.net_connections("inet")
                    found.update((one.status, one.laddr.ip) for one in sockets if one.laddr)

    thread = Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="under Windows gloo chooses its address itself")
def test_the_command_starts_processes_that_only_this_machine_can_reach(corpus, cache, tmp_path, capfd):
    """A step of one micro-batch is cut, so that each has rows. What goes wrong is raised, and said by nobody else."""
    whole = short(corpus, cache, 1, train={"micro_batch": 4}, machine={"processes": 2})
    with watched() as found:
        assert train(whole, tmp_path / "run") == ""
    assert "2 micro-batches of 2" in capfd.readouterr().out
    assert read_config(tmp_path / "run").train.accumulation == 2
    assert "LISTEN" in {state for state, _ in found}
    assert all(ip_address(address.removeprefix("::ffff:")).is_loopback for _, address in found), found
    (tmp_path / "own.toml").write_text(to_toml(whole))
    with pytest.raises(Failed, match=r"^\S+run already holds a run.*resume=True") as failed:
        khanhllm.train(tmp_path / "own.toml", run=tmp_path / "run")
    assert failed.value.exit_code == 2 and not capfd.readouterr().err


@pytest.mark.slow
def test_twenty_signals_later_a_run_is_what_it_is_undisturbed(corpus, cache, tmp_path):
    """They come to either process, in any of the collectives of a step. Each stops both after the same step."""
    whole = short(corpus, cache, 2, train={"steps": 60, "eval_every": 4, "sample_every": 7})
    train(whole, tmp_path / "whole")
    jobs = [(whole, tmp_path / "run", nth > 0, [nth % 2, 1, "SIGTERM", nth % 13 + 1]) for nth in range(20)]
    assert not together(2, tmp_path / "x", *jobs, (whole, tmp_path / "run", True, None))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert (tmp_path / "run" / "messages.txt").read_text().count("stopped by SIGTERM") == 20


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
def test_compiled_too(corpus, cache, tmp_path):
    compiled = short(corpus, cache, 2, machine={"compile": "on"})
    one, two = ((compiled, tmp_path / f"{size}", False, None, {"size": size}) for size in (1, 2))
    assert not together(2, tmp_path / "x", one, two)
    assert outcome(tmp_path / "2") == outcome(tmp_path / "1")
    assert "torch.compile" not in (tmp_path / "2" / "messages.txt").read_text()


@pytest.mark.slow
def test_a_run_is_tuned_and_goes_on_with_other_text_by_two_processes(corpus, cache, tmp_path, capfd):
    train(short(corpus, cache, 1, train={"steps": 3}), tmp_path / "base")
    chats = "".join(f'{{"question": "{nth % 10} {nth}?", "answer": "{nth % 10}"}}\n' for nth in range(120))
    (tmp_path / "chats.jsonl").write_text(chats)
    quick = ["--machine.threads", "1", "--train.steps", "6", "--train.micro_batch", "1", "--train.accumulation", "2"]
    tune = ["tune", str(tmp_path / "base"), "--data", str(tmp_path / "chats.jsonl"), *quick]
    more = ["train", "--from", str(tmp_path / "base"), "--data", str(corpus), *quick]
    for name, words in (("chat", tune), ("more", more)):
        for count in ("1", "2"):
            place = ["--machine.processes", count, "--run", str(tmp_path / f"{name}-{count}")]
            assert cli.main([*words, *place]) == 0, capfd.readouterr().err
        assert outcome(tmp_path / f"{name}-2") == outcome(tmp_path / f"{name}-1")
    assert "one of 2 processes" in capfd.readouterr().out
    assert cli.main([*more, *place]) == 2
    assert capfd.readouterr().err.count("\n") == 1
