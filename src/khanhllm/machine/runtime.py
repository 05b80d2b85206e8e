"""The machine, asked once: device, precision, threads, memory, peak speed. Others get what they need as arguments."""

import contextlib
import ctypes
import os
import time
from dataclasses import dataclass
from importlib.util import find_spec

import psutil
import torch

from khanhllm.config import MachineConfig, UserError

# Dense bf16 matrix throughput with fp32 accumulation, as the makers publish it (TFLOP/s).
KNOWN_PEAKS = {
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "RTX 5090": 209,
    "RTX 5080": 113,
    "RTX 5070": 62,
    "RTX 4090": 165,
    "RTX 4080": 97,
    "RTX 4070": 58,
    "RTX 4060": 30,
    "RTX 3090": 71,
    "RTX 3080": 60,
    "RTX 3070": 41,
    "RTX 3060": 26,
}


@dataclass(frozen=True)
class Machine:
    device: torch.device
    precision: str
    """fp32, tf32 or bf16"""
    compile: bool
    grouped_experts: bool
    peak_flops: float | None
    """matrix throughput that 100 % MFU means: the maker's figure on CUDA, measured on a CPU (FLOP/s); None unknown"""

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

    def describe(self) -> str:
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            name = f"{torch.cuda.get_device_name(self.device)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        else:
            memory = psutil.virtual_memory()
            name = (
                f"{torch.get_num_threads()} threads, {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
            )
        return f"{self.device} ({name}), {self.precision}, compile {'on' if self.compile else 'off'}"


def open_machine(config: MachineConfig) -> Machine:
    """Find the device and switch on what the config asks for. UserError where the hardware cannot do it."""
    device = _device(config.device)
    precision = _precision(config.precision, device)
    torch.set_num_threads(config.threads or _cores())
    if device.type == "cpu":
        _keep_freed_memory()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")  # bf16: the router stays fp32
    cuda = device.type == "cuda"
    return Machine(
        device=device,
        precision=precision,
        compile=config.compile == "on" or (config.compile == "auto" and cuda and find_spec("triton") is not None),
        grouped_experts=config.experts == "grouped" or (config.experts == "auto" and cuda and precision == "bf16"),
        peak_flops=_known_peak(device) if cuda else _measured_peak() if device.type == "cpu" else None,
    )


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if wanted.startswith("cuda"):
        found = torch.cuda.device_count()
        device = torch.device("cuda", int(wanted.partition(":")[2] or 0))
        if device.index >= found:
            raise UserError(f"machine.device: {wanted} asked for, but {found} CUDA devices found; use auto or cpu")
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


def _cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor: by default blocks of megabytes go back to the system at once,
    and a step spends up to a third of its time on fresh pages. Other C libraries have no such switch."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _known_peak(device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for card, peak in KNOWN_PEAKS.items() if card in name), None)


def _measured_peak(size: int = 1024) -> float:
    """fp32 matrix throughput of this CPU, the best of a few products (FLOP/s); takes about 0.1 s."""
    left, right = torch.rand(size, size), torch.rand(size, size)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def _peak_resident() -> int:
    """Peak resident memory of this process (bytes). Windows keeps it in psutil, the others in the kernel's usage."""
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):
        return int(info.peak_wset)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
