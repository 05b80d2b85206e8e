"""The experts' products on a CUDA device: our Triton kernels against `grouped_mm` against the loop.

    python benchmarks/grouped_gemm.py [OUT.json]

The backends take turns after all are tuned and warm; loads are uneven and the same for all. The time of
a backend is what the device's clock says from its first to its last kernel, waiting for the host included.
"""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from khanhllm.machine.backends import probe

REPEATS, WARM_UP, EXPERTS, DIM = 20, 3, 8, 1024
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


class Backend(NamedTuple):
    grouped_mm: Product
    grouped_mm_wgrad: Product


def split(x_NI: Tensor, end_E: Tensor) -> tuple[Tensor, ...]:
    return x_NI.tensor_split(end_E[:-1].tolist())


def loop_rows(x_NI: Tensor, weight_EIO: Tensor, end_E: Tensor) -> Tensor:
    return torch.cat([x @ weight for x, weight in zip(split(x_NI, end_E), weight_EIO, strict=True)])


def loop_outer(x_NI: Tensor, grad_NO: Tensor, end_E: Tensor) -> Tensor:
    return torch.stack([x.mT @ grad for x, grad in zip(split(x_NI, end_E), split(grad_NO, end_E), strict=True)])


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_EIO: Tensor, end_E: Tensor, backend: Backend) -> Tensor:
        ctx.save_for_backward(x_NI, weight_EIO, end_E)
        ctx.backend = backend
        return backend.grouped_mm(x_NI, weight_EIO, end_E)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_NI, weight_EIO, end_E = ctx.saved_tensors
        return (
            ctx.backend.grouped_mm(grad_NO, weight_EIO.mT, end_E),
            ctx.backend.grouped_mm_wgrad(x_NI, grad_NO, end_E),
            None,
            None,
        )


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, grad: Tensor, end: Tensor, backend: Backend) -> Tensor:
    """Forward and backward of a whole layer of experts -> the gradient of x."""
    hidden = F.silu(Linear.apply(x, gate, end, backend)) * Linear.apply(x, up, end, backend)
    return torch.autograd.grad(Linear.apply(hidden, down, end, backend), (x, gate, up, down), grad)[0]


def milliseconds(work: Callable[[Backend], Tensor], backend: Backend) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work(backend)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(n: int, hidden: int, backends: dict[str, Backend]) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    chance_E = torch.softmax(0.5 * torch.randn(EXPERTS), 0)
    load_E = torch.multinomial(chance_E, n, replacement=True).bincount(minlength=EXPERTS)
    end = load_E.cumsum(0).to("cuda", torch.int32)
    shapes = (n, DIM), (n, DIM), (n, hidden), (EXPERTS, DIM, hidden), (EXPERTS, DIM, hidden), (EXPERTS, hidden, DIM)
    x, grad, wide, gate, up, down = (0.02 * torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, gate, up, down)]
    cases: dict[str, tuple[int, Callable[[Backend], Tensor]]] = {
        "rows": (2, lambda backend: backend.grouped_mm(x, gate, end)),
        "rows, weight transposed": (2, lambda backend: backend.grouped_mm(wide, gate.mT, end)),
        "outer": (2, lambda backend: backend.grouped_mm_wgrad(x, wide, end)),
        "swiglu forward and backward": (18, lambda backend: swiglu(*leaves, grad, end, backend)),
    }
    found = []
    for case, (flops, work) in cases.items():
        want = work(backends["loop"]).float()
        error = {
            name: ((work(backend) - want).abs().max() / want.abs().max()).item() for name, backend in backends.items()
        }
        rounds = [{name: milliseconds(work, backends[name]) for name in backends} for _ in range(WARM_UP + REPEATS)][
            WARM_UP:
        ]
        for name in backends:
            times = [one[name] for one in rounds]
            ms = {"ms": statistics.median(times), "ms_least": min(times), "ms_most": max(times)}
            row = {"case": case, "n": n, "hidden": hidden, "backend": name, "error": error[name]} | ms
            found.append(row | {"tflops": flops * n * DIM * hidden / ms["ms"] / 1e9})
            print(*(f"{value:.4g}" if isinstance(value, float) else value for value in found[-1].values()), flush=True)
    return found


def main(out: str = "benchmarks/results/grouped_gemm.json") -> int:
    if not torch.cuda.is_available():
        print("grouped_gemm: no CUDA device here, and nothing to measure without one", file=sys.stderr)
        return 2
    from khanhllm.machine.triton_grouped import grouped_mm, grouped_mm_wgrad

    library = Backend(lambda x, w, end: F.grouped_mm(x, w, offs=end), lambda x, g, end: F.grouped_mm(x.mT, g, offs=end))
    backends = {
        "triton": Backend(grouped_mm, grouped_mm_wgrad),
        "grouped": library,
        "loop": Backend(loop_rows, loop_outer),
    }
    card = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "probe": probe(torch.device("cuda"))}
    results = [row for hidden in (4096, 2752) for n in (4096, 16384, 65536) for row in measure(n, hidden, backends)]
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(card | {"repeats": REPEATS, "results": results}, indent=1), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
