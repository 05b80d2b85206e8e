"""What a process may use inside a container, on a file system that is made up: groups of version 1 and 2, nested."""

import os
from types import SimpleNamespace

import psutil
import pytest
import torch

from conftest import build, plain_machine, tiny
from khanhllm import limits, optim
from khanhllm.machine.devices import Machine
from khanhllm.planning import budget
from khanhllm.schema import OptimConfig
from khanhllm.training import checkpoint
from khanhllm.training.saver import Saver

GB = 10**9
UNLIMITED = 9223372036854771712
"""what version 1 says where there is no limit"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 64 cores and 100 GB, 80 of them free, whose files are what `machine` is given."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=80 * GB, total=100 * GB))
    monkeypatch.setattr(limits, "ROOT", tmp_path)

    def write(files: dict[str, object]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    return write


def v2(group: str = "", **files: object) -> dict[str, object]:
    return {f"sys/fs/cgroup/{group}{name.replace('_', '.')}": text for name, text in files.items()}


def test_without_groups_it_is_the_machine(machine):
    machine({})
    assert limits.cores() == 64
    assert limits.memory() == (80 * GB, 100 * GB)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 64), ("400000 100000", 4), ("250000 100000", 3), ("50000 100000", 1), ("9900000 100000", 64)],
)
def test_a_quota_of_time_is_so_many_cores(quota, cores, machine):
    machine({"proc/self/cgroup": "0::/"} | v2(cpu_max=quota))
    assert limits.cores() == cores
    machine({"sys/fs/cgroup/cpu.max": "max 100000"})
    assert limits.cores() == 64
    time, period = quota.split()
    folder = "sys/fs/cgroup/cpu,cpuacct"
    machine({"proc/self/cgroup": "3:cpu,cpuacct:/docker/abc", f"{folder}/cpu.cfs_period_us": period})
    machine({f"{folder}/cpu.cfs_quota_us": -1 if time == "max" else time})
    assert limits.cores() == cores


def test_memory_of_a_group_is_its_limit_less_what_it_holds_but_for_caches(machine):
    stat = f"anon {GB}\nactive_file {GB // 2}\ninactive_file {GB // 2}"
    machine({"proc/self/cgroup": "0::/"} | v2(memory_max=4 * GB, memory_current=2 * GB, memory_stat=stat))
    assert limits.memory() == (3 * GB, 4 * GB)
    machine(v2(memory_max="max"))
    assert limits.memory() == (80 * GB, 100 * GB)


def test_memory_of_a_group_of_version_1(machine):
    folder = "sys/fs/cgroup/memory/docker/abc"
    machine({"proc/self/cgroup": "2:cpu:/docker/abc\n4:memory:/docker/abc\n0::/system.slice"})
    machine({f"{folder}/memory.limit_in_bytes": 3 * GB, f"{folder}/memory.usage_in_bytes": 2 * GB})
    machine({"sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED})
    machine({f"{folder}/memory.stat": f"cache 5\ntotal_active_file {GB}\ntotal_inactive_file 0"})
    assert limits.memory() == (2 * GB, 3 * GB)
    machine({f"{folder}/memory.limit_in_bytes": UNLIMITED})
    assert limits.memory() == (80 * GB, 100 * GB)


def test_of_nested_groups_the_narrowest_counts(machine):
    outer, inner = "slurm/", "slurm/job_7/"
    machine({"proc/self/cgroup": "0::/slurm/job_7"})
    machine(v2(inner, cpu_max="max 100000", memory_max=50 * GB, memory_current=10 * GB, memory_stat="anon 1"))
    machine(v2(outer, cpu_max="200000 100000", memory_max=20 * GB, memory_current=15 * GB, memory_stat="anon 1"))
    assert limits.cores() == 2
    assert limits.memory() == (5 * GB, 20 * GB)


@pytest.mark.parametrize("path", ["/docker/abc", "/../../kubepods/pod1", "/"])
def test_a_container_sees_its_own_group_as_the_root(path, machine):
    """The path may be that of the host, which the container has no folders for."""
    machine({"proc/self/cgroup": f"0::{path}"} | v2(cpu_max="300000 100000", memory_max=GB, memory_current=0))
    assert limits.cores() == 3
    assert limits.memory() == (GB, GB)


@pytest.mark.parametrize("nonsense", ["", "banana", "0 0", "-5 -5", "1e9"])
def test_files_that_make_no_sense_limit_nothing(nonsense, machine):
    machine({"proc/self/cgroup": f"0::/\n{nonsense}"} | v2(cpu_max=nonsense, memory_max="banana", memory_stat=nonsense))
    assert limits.cores() == 64
    assert limits.memory() == (80 * GB, 100 * GB)


def test_a_group_that_is_full_has_nothing_free(machine):
    machine({"proc/self/cgroup": "0::/"} | v2(memory_max=GB, memory_current=2 * GB))
    assert limits.memory() == (0, GB)


def test_a_plan_fills_no_more_than_the_group_may_use(machine):
    machine({"proc/self/cgroup": "0::/"} | v2(memory_max=3 * GB, memory_current=GB, memory_stat="active_file 0"))
    here = budget.here(plain_machine())
    assert here.memory <= budget.SHARE * (2 * GB + here.process) + 1
    assert here.memory <= budget.SHARE * 3 * GB + 1


def test_the_machine_is_described_by_what_it_may_use(machine):
    machine({"proc/self/cgroup": "0::/"} | v2(memory_max=3 * GB, memory_current=GB))
    assert "2.0 of 3.0 GB free" in plain_machine().describe()


def test_a_checkpoint_is_copied_only_where_the_group_has_room(machine, tmp_path, monkeypatch):
    model = build(tiny())
    optimizer = optim.build(model, OptimConfig())
    copied = []
    honest = checkpoint.Snapshot.copied
    monkeypatch.setattr(checkpoint.Snapshot, "copied", lambda self: copied.append(1) or honest(self))
    (tmp_path / "run").mkdir()
    for step, used, copies in ((1, 0, 1), (2, GB, 1)):  # room at first, none then
        machine({"proc/self/cgroup": "0::/"} | v2(memory_max=GB, memory_current=used))
        with Saver(tmp_path / "run", keep=9) as saver:
            saver.begin(checkpoint.snapshot(step, model, optimizer, {}))
            assert saver.outcome(patient=True)
        assert len(copied) == copies


@pytest.mark.parametrize(
    ("free", "held", "share", "expected"),
    [
        (79 * GB, 0, 1.0, 79 * GB + budget.CONTEXT),
        (40 * GB, 10 * GB, 1.0, 50 * GB + budget.CONTEXT),
        (80 * GB, 0, 1.0, 80 * GB),
        (79 * GB, 0, 0.25, 20 * GB + budget.CONTEXT),
    ],
    ids=["alone", "beside others", "before the context is made", "with a cap of its own"],
)
def test_a_plan_for_a_card_leaves_others_what_they_hold(free, held, share, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: held)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: share)
    card = Machine(torch.device("cuda", 0), "bf16", compile=False, experts="loop")
    monkeypatch.setattr(Machine, "peak_flops", None)
    assert budget.here(card).memory == round(budget.SHARE * expected)
