"""The machine, examined once: device, precision, threads, memory, peak speed. Other rooms get these as arguments."""

import contextlib
import ctypes
import gc
import mmap
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec

import psutil
import torch

from khanhllm.errors import UserError
from khanhllm.limits import cores, memory
from khanhllm.machine.backends import BackendName, probe
from khanhllm.machine.cards import known_peak
from khanhllm.machine.group import ALONE, Group
from khanhllm.schema import MachineConfig


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch works in this thread alone. A thread keeps the helpers that it once had (OpenMP's), and if two
    threads have some, there are more than cores: all of them then sleep between any two operations, and a small model
    takes twice as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Machine:
    """The device that a run uses, and how it uses it."""

    device: torch.device
    precision: str
    """fp32, tf32 or bf16"""
    compile: bool
    experts: BackendName
    """loop, grouped or triton: see backends"""
    threads: int = 0
    """CPU threads; 0 leaves the number as it is"""
    group: Group = ALONE
    """the processes that train together, of which this machine serves one"""

    @cached_property
    def peak_flops(self) -> float | None:
        """Matrix throughput that counts as 100 % MFU (FLOP/s): on CUDA the maker's figure, on a CPU measured at the
        first access; None if it is unknown."""
        return _peak(self.device)

    def take_process(self) -> None:
        """Set the number of threads and the precision of matrix products of this process."""
        if self.threads:
            torch.set_num_threads(self.threads)
        # the router stays fp32 under bf16
        torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")

    @contextlib.contextmanager
    def taken_process(self) -> Iterator[None]:
        """`take_process`, until the end of the block."""
        threads, products = torch.get_num_threads(), torch.get_float32_matmul_precision()
        self.take_process()
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(products)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Around every forward: bf16 products with fp32 weights, or nothing."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def peak_memory(self) -> float:
        """Most memory that this process has used (MB)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        return _peak_resident() / 1e6

    def wait(self) -> None:
        """Wait until the device has finished all its work."""
        _wait(self.device)

    def give_back_memory(self) -> None:
        """Free the memory that no tensor uses any more, so that larger tensors fit."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()

    def describe(self) -> str:
        """Device, memory, precision and compile in one line."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            name = f"{torch.cuda.get_device_name(self.device)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        else:
            free, total = memory()
            name = f"{torch.get_num_threads()} threads, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        others = "" if self.group.alone else f", one of {self.group.size} processes"
        return f"{self.device} ({name}), {self.precision}, compile {'on' if self.compile else 'off'}{others}"


def open_machine(config: MachineConfig, group: Group = ALONE) -> Machine:
    """Find the device that the config asks for. Raises UserError if the hardware cannot do it. Does not change the
    process; `Machine.take_process` does."""
    device = _device(config.device, group.local_rank)
    if config.split == "all" and not group.alone and device.type == "mps":
        raise UserError(
            "machine.split: all needs NVIDIA GPUs or CPUs, but this device is mps; use --machine.device cpu"
        )
    precision = _precision("bf16" if config.weights == "bf16" else config.precision, device)
    cuda = device.type == "cuda"
    return Machine(
        device=device,
        precision=precision,
        compile=config.compile == "on" or (config.compile == "auto" and cuda and find_spec("triton") is not None),
        experts=_backend(config.experts, device, precision),
        threads=config.threads or (0 if "OMP_NUM_THREADS" in os.environ else max(1, cores() // group.local_size)),
        group=group,
    )


OUT_OF_MEMORY = (
    "can't allocate memory",  # a CPU under Linux and macOS
    "not enough memory",  # a CPU under Windows
    "out of memory",  # MPS, and CUDA outside torch's allocator
    "STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN, cuSOLVER
)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error means that memory ran out. But for torch's own allocator on CUDA, only its text says so."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def _device(wanted: str, local_rank: int = 0) -> torch.device:
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if wanted.startswith("cuda"):
        count = torch.cuda.device_count()
        device = torch.device("cuda", int(wanted.partition(":")[2] or local_rank))
        if device.index >= count:
            raise UserError(f"machine.device: {wanted} asked for, but {count} CUDA devices found; use auto or cpu")
        return device
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise UserError("machine.device: mps asked for, but this torch finds no Apple GPU; use auto or cpu")
    return torch.device(wanted)


def _precision(wanted: str, device: torch.device) -> str:
    tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if wanted == "auto":
        return "bf16" if tensor_cores else "fp32"
    if wanted == "tf32" and not tensor_cores:
        raise UserError(f"machine.precision: tf32 needs an NVIDIA GPU of 2020 or later, this is {device}; use fp32")
    return wanted


def _backend(wanted: str, device: torch.device, precision: str) -> BackendName:
    if wanted == "auto":
        return probe(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    if wanted == "triton" and device.type != "cuda":
        raise UserError(f"machine.experts: triton needs an NVIDIA GPU, this is {device}; use auto, loop or grouped")
    return wanted  # type: ignore[return-value]


def keep_freed_memory(keep: bool) -> None:
    """Choose whether freed memory stays in this process for the next tensor or goes back to the system.

    By default glibc returns blocks of megabytes at once, and a small model's step spends up to a third of its time on
    fresh pages. Kept memory, on the other hand, is fragmented, which costs a large model a gigabyte. Other C libraries
    have no such switch.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20 if keep else 1 << 20)  # M_MMAP_THRESHOLD: larger blocks go back when freed
        mallopt(-1, 2**31 - 1 if keep else 1 << 20)  # M_TRIM_THRESHOLD: free memory kept at the end of the heap
        if keep:
            _take_huge_pages()


def _take_huge_pages() -> None:
    """Let the heap lie in pages of 2 MB where Linux gives them to those who ask. Tensors of a few megabytes wander
    through the heap, and with pages of 4 kB the processor spends a quarter of a small model's step on looking up where
    they are. glibc asks by itself only if the environment said so before it started. Called again, it does nothing
    unless the gigabyte that it took is used up."""
    libc = ctypes.CDLL(None)
    libc.sbrk.restype = libc.malloc.restype = ctypes.c_void_p
    start = libc.sbrk(0)
    libc.mallopt(-2, 1 << 30)  # M_TOP_PAD: by how much the heap grows
    libc.free(ctypes.c_void_p(libc.malloc(24 << 20)))
    libc.mallopt(-2, 128 << 10)  # as it was
    begin = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(libc.sbrk(0) - begin), mmap.MADV_HUGEPAGE)


def _peak(device: torch.device) -> float | None:
    if device.type == "cuda":
        return known_peak(torch.cuda.get_device_name(device))
    return matmul_rate(device, 1024) if device.type == "cpu" else None


def matmul_rate(device: torch.device, size: int, dtype: torch.dtype = torch.float32) -> float:
    """Matrix throughput of this machine, the best of a few products of `size` cubed (FLOP/s)."""
    left, right, out = (torch.rand(size, size, device=device, dtype=dtype) for _ in range(3))
    seconds = []
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_resident() -> int:
    """Peak resident memory of this process (bytes): on Windows from psutil, elsewhere from getrusage."""
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):
        return int(info.peak_wset)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
