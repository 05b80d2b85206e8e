"""Muon: the hidden matrices move by the orthogonal part of their momentum, all else by AdamW (Jordan 2024,
https://kellerjordan.github.io/posts/muon).

A few directions dominate a gradient. Its momentum M = U S V' is replaced by U V', in which every direction counts the
same. Five turns of a Newton-Schulz iteration come near enough: the odd polynomial a s + b s^3 + c s^5 drives all
singular values s in (0, 1] to about 1, and needs matrix products only. A stack of experts (E, in, out) is E matrices,
each on its own; matrices of one shape share their products.
"""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from khanhllm.adamw import AdamW
from khanhllm.rounding import noise, store

if TYPE_CHECKING:
    Base = torch.optim.Optimizer
else:
    Base = object

A, B, C = 3.4445, -4.7750, 2.0315
"""Jordan's polynomial: so steep at zero that even small singular values arrive; they end between 0.7 and 1.2"""
LEAST_NORM = 1e-7
"""a gradient of zero stays zero"""
LARGEST = 2**26
"""numbers in one batch of products: more are no faster and would cost memory"""


class Turning(Base):
    """Put before an AdamW, it makes a group with the key "newton_schulz" (its steps) follow Muon, with its "momentum".

    Each group has its own "lr". For Muon it is the spectral norm of an update of a matrix that is not taller than wide
    in (out, in); taller ones move sqrt(out / in) further, so that outputs change as much at any width (Jordan 2024;
    Bernstein and Newhouse 2024, arXiv 2410.21265) and a learning rate carries over.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update from the gradients. Those of Muon's matrices are used up: AdamW skips a parameter without one."""
        for group in self.param_groups:
            if "newton_schulz" in group:
                bits = noise(group) if any(p.dtype == torch.bfloat16 for p in group["params"]) else None
                for alike in batches([parameter for parameter in group["params"] if parameter.grad is not None]):
                    self._move(alike, group, bits)
        return super().step(closure)

    def _move(self, alike: list[Tensor], group: dict[str, Any], bits: torch.Generator | None) -> None:
        """Momentum with Nesterov's look ahead, orthogonalised, after decoupled weight decay."""
        gradients = [_taken(parameter) for parameter in alike]
        momenta = [self._momentum(parameter) for parameter in alike]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
        for parameter, momentum in zip(alike, momenta, strict=True):
            self._keep(parameter, momentum)
        turned = orthogonalise(torch.cat([matrices(tensor) for tensor in ahead]), int(group["newton_schulz"]))
        for parameter, update in zip(alike, turned.split([len(matrices(p)) for p in alike]), strict=True):
            exact = parameter.float()  # the parameter itself, unless it is kept in bf16
            exact.mul_(1 - group["lr"] * group["weight_decay"])
            exact.add_(update.view_as(parameter), alpha=-group["lr"] * reach(parameter))
            store(parameter, exact, bits)

    def _momentum(self, parameter: Tensor) -> Tensor:
        """In fp32, zero at first."""
        kept = self.state[parameter].get("momentum")
        return torch.zeros_like(parameter, dtype=torch.float32) if kept is None else kept

    def _keep(self, parameter: Tensor, momentum: Tensor) -> None:
        self.state[parameter]["momentum"] = momentum


class Muon(Turning, AdamW):
    """With fp32 momentum and moments."""


def _taken(parameter: Tensor) -> Tensor:
    """The gradient in fp32, which the parameter no longer has."""
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    return gradient.float()


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Attention, feed-forward, experts. Not the router, the embedding and the head, whose rows are things apart: a
    token or an expert each; nor the biases of stacked experts, which are vectors."""
    outside = ("embedding.", "value_embedding.", "head.")
    return parameter.dim() >= 2 and not name.startswith(outside) and "router" not in name and "bias" not in name


def batches(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters whose matrices have one shape, together as long as they are not too LARGEST."""
    for _, alike in groupby(sorted(parameters, key=_shape), key=_shape):
        batch: list[Tensor] = []
        for parameter in alike:
            if batch and sum(p.numel() for p in batch) + parameter.numel() > LARGEST:
                yield batch
                batch = []
            batch.append(parameter)
        yield batch


def _shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(parameter.shape[-2:])


def matrices(tensor: Tensor) -> Tensor:
    """(out, in) -> (1, out, in); a stack (E, in, out) as it is."""
    return tensor.unflatten(0, (1, -1)) if tensor.dim() == 2 else tensor


def reach(parameter: Tensor) -> float:
    """sqrt(max(1, out / in)); a single matrix is (out, in), those in a stack (E, in, out)."""
    rows, columns = parameter.shape[-2:]
    return max(1.0, rows / columns if parameter.dim() == 2 else columns / rows) ** 0.5


def orthogonalise(x_NIO: Tensor, steps: int) -> Tensor:
    """U V' for each matrix U S V' of a batch, nearly. bf16 on CUDA, where it is enough and fastest, else fp32."""
    tall = x_NIO.shape[-2] > x_NIO.shape[-1]
    x_NRC = x_NIO.mT if tall else x_NIO  # the Gram matrix is the smaller one
    x_NRC = x_NRC / torch.linalg.matrix_norm(x_NRC, keepdim=True).clamp(min=LEAST_NORM)
    if x_NRC.is_cuda:
        x_NRC = x_NRC.bfloat16()
    for _ in range(steps):
        gram_NRR = x_NRC @ x_NRC.mT
        bent_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=B, alpha=C)
        x_NRC = torch.baddbmm(x_NRC, bent_NRR, x_NRC, beta=A)
    return (x_NRC.mT if tall else x_NRC).to(x_NIO.dtype)
