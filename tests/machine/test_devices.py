"""What a machine says and does, whatever the device: words of errors, and settings of the process."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from khanhllm.machine import devices
from khanhllm.machine.devices import Machine, open_machine, out_of_memory
from khanhllm.schema import MachineConfig


@pytest.mark.parametrize(("said", "asked", "threads"), [("3", 0, 0), (None, 0, 5), ("3", 2, 2), (None, 2, 2)])
def test_threads_are_those_of_the_config_or_the_environment_or_one_for_each_core(said, asked, threads, monkeypatch):
    """Torch itself reads OMP_NUM_THREADS; 0 leaves its number as it is."""
    monkeypatch.setattr(devices, "cores", lambda: 5)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert open_machine(MachineConfig(device="cpu", threads=asked)).threads == threads


@pytest.mark.parametrize(("precision", "products"), [("tf32", "high"), ("fp32", "highest"), ("bf16", "highest")])
def test_only_tf32_rounds_the_products_of_fp32(precision, products):
    before = torch.get_float32_matmul_precision()
    try:
        Machine(torch.device("cpu"), precision, compile=False, experts="loop").take_process()
        assert torch.get_float32_matmul_precision() == products
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "words",
    [
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4000000000 bytes. Error code 12 (Cannot allocate memory)",
        "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried to allocate "
        "4000000000 bytes.",
        "MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB, max allowed: 9.07 GB). Tried "
        "to allocate 256.00 MB on private pool.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "HIP out of memory. Tried to allocate 2.00 GiB",
    ],
)
def test_every_platform_s_words_for_memory_that_ran_out(words):
    assert out_of_memory(RuntimeError(words))


@pytest.mark.parametrize(
    "words",
    [
        "shapes do not match",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "CUDA error: an illegal memory access was encountered",
        "out of resource: shared memory, Required: 102400, Hardware limit: 101376",
    ],
)
def test_other_errors_are_not_taken_for_it(words):
    assert not out_of_memory(RuntimeError(words))


HEAP = """
from khanhllm.machine.devices import keep_freed_memory

keep_freed_memory(True)
keep_freed_memory(True)
heap = open("/proc/self/smaps").read().split("[heap]")[1:]
print([" hg" in part.split("VmFlags:")[1].splitlines()[0] for part in heap])
"""


def test_the_heap_of_a_small_model_lies_in_huge_pages():
    offered = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not offered.exists() or "[never]" in offered.read_text() or platform.libc_ver()[0] != "glibc":
        pytest.skip("no huge pages to ask for here")
    seen = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True, check=True).stdout
    assert seen.strip() in ("[False, True]", "[True]"), seen
