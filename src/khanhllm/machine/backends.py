"""Choose the fastest expert backend that works on this device, by trying each on a tiny problem.

grouped   torch's grouped_mm, where it gives the right numbers and never makes the host wait
triton    our own kernels, where grouped_mm waits or fails
loop      expert after expert, which is always right
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from khanhllm.model.experts import GROUPED, LOOP, Backend

log = logging.getLogger(__name__)

BackendName = Literal["grouped", "triton", "loop"]
Answers = tuple[Tensor, Tensor, Tensor]
Guard = Callable[[], AbstractContextManager[None]]


class Problem(NamedTuple):
    """A very small example of what a layer of experts multiplies in a step. One expert has no rows."""

    x_NI: Tensor
    weight_EIO: Tensor
    grad_NO: Tensor
    end_E: Tensor

    @classmethod
    def tiny(cls, device: torch.device, dtype: torch.dtype) -> "Problem":
        """A problem of random numbers, always the same."""
        dice = torch.Generator().manual_seed(0)
        shapes = (40, 32), (4, 32, 48), (40, 48)
        x, weight, grad = (torch.randn(shape, generator=dice).to(device, dtype) for shape in shapes)
        return cls(x, weight, grad, torch.tensor([9, 9, 33, 40], dtype=torch.int32).to(device))


Attempt = Callable[[Problem], Answers]


def answers(backend: Backend, problem: Problem) -> Answers:
    """Forward, gradient of x and gradient of the weights."""
    x_NI, weight_EIO, grad_NO, end_E = problem
    return (
        backend.grouped_mm(x_NI, weight_EIO, end_E),
        backend.grouped_mm(grad_NO, weight_EIO.mT, end_E),
        backend.grouped_mm_wgrad(x_NI, grad_NO, end_E),
    )


def by_triton(problem: Problem) -> Answers:
    """The answers by our Triton kernels."""
    from khanhllm.machine.triton_grouped import BACKEND  # only here, as triton may be missing

    return answers(BACKEND, problem)


def by_loop(problem: Problem) -> Answers:
    """The same in fp32, expert after expert, which defines what is right."""
    x_NI, weight_EIO, grad_NO, end_E = problem
    return answers(LOOP, Problem(x_NI.float(), weight_EIO.float(), grad_NO.float(), end_E))


@contextmanager
def host_must_not_wait() -> Iterator[None]:
    """Within this context, an operation that makes the host wait for the CUDA device raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def fault(attempt: Attempt, problem: Problem, guard: Guard = nullcontext) -> str | None:
    """What is wrong with a backend, in a few words, or None. bf16 is right to 1 % of the largest number."""
    try:
        with guard():
            given = attempt(problem)
        pairs = zip(given, by_loop(problem), strict=True)
        right = all(bool((answer.float() - want).abs().max() <= 0.01 * want.abs().max()) for answer, want in pairs)
    except Exception as error:  # a kernel has a hundred ways to fail, and each of them rules the backend out
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return None if right else "wrong numbers"


def choose(problem: Problem, grouped: Attempt, triton: Attempt, guard: Guard) -> BackendName:
    """The best of the backends that work. Under `guard` an attempt that makes the host wait raises."""
    wrong = fault(grouped, problem)  # unguarded first: a device that starts up may wait once
    if wrong is None and fault(grouped, problem, guard) is None:
        return "grouped"
    broken = fault(triton, problem)
    if broken is None:
        return "triton"
    if wrong is None:
        log.warning("experts use grouped_mm, which makes the host wait: our Triton kernels fail here (%s)", broken)
        return "grouped"
    log.warning(
        "experts are computed one by one: grouped_mm fails here (%s), our Triton kernels as well (%s)", wrong, broken
    )
    return "loop"


def probe(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> BackendName:
    """The backend for `dtype` on `device`; without CUDA always the loop. Takes seconds the first time."""
    if device.type != "cuda":
        return "loop"
    return choose(Problem.tiny(device, dtype), partial(answers, GROUPED), by_triton, host_must_not_wait)
