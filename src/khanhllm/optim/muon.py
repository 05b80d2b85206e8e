"""Muon updates hidden matrices by the orthogonal part of their momentum, and AdamW updates all else (Jordan 2024,
https://kellerjordan.github.io/posts/muon).

A few directions dominate a gradient. Muon replaces its momentum M = U S V' by U V', in which every direction counts
the same. A few Newton-Schulz iterations come near enough: each is an odd polynomial a s + b s^3 + c s^5 of all singular
values s, made of matrix products only, and brings as many of them as it can near 1. A stack of experts (E, in, out) is
E matrices, each on its own; matrices of one shape are multiplied together, as a batch.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from khanhllm.optim.adamw import AdamW
from khanhllm.optim.rounding import noise, store

if TYPE_CHECKING:
    Base = torch.optim.Optimizer
else:
    Base = object

ITERATIONS = (
    (1.000, 8.3166, -24.6638, 18.3021),
    (1.994, 4.1221, -3.0623, 0.5709),
    (1.975, 4.0435, -3.0116, 0.5696),
    (1.898, 3.5059, -2.6270, 0.5258),
    (1.647, 2.4906, -1.8347, 0.4369),
)
"""Largest s at the input, a, b, c. Each polynomial deviates least from 1 over the values that the iterations before it
leave (Amsel et al. 2025, arXiv 2505.16932), such that the last leaves 0.8 to 1.2. Fewer iterations are the last of
these: 5 reach singular values of 0.0007 of the largest or more, 4 0.003, 3 0.013, 2 0.05, 1 0.2.

A polynomial is steep at its end: a thousandth above its largest s is a hundredth above that of the next one, a tenth
after that. So the first two leave no more than 1 / ROOM of the next one's largest s"""
ROOM = 1.02
"""margin below the largest s at the input, for the rounding of bf16"""
LEAST_NORM = 1e-7
"""a gradient of zero stays zero"""
LARGEST = 2**26
"""numbers in one batch of products: more are no faster and would cost memory"""


class MuonMixin(Base):
    """Before an AdamW among the bases, it updates groups that have "newton_schulz" (iterations) and "momentum" by Muon.

    Each group has its own "lr". For Muon it is the spectral norm of an update of a matrix that is not taller than wide
    in (out, in); taller ones move sqrt(out / in) further, so that outputs change as much at any width (Jordan 2024;
    Bernstein and Newhouse 2024, arXiv 2410.21265) and a learning rate transfers to other widths.

    If a group has "copies", a stack consists of as many equal copies (model/tied.py): only the first one moves. If it
    has "every", its parameters take turns: each moves and decays once in so many steps, and the square root of that
    number as far. Updates with nothing in common would go as far in sum; those of one momentum have much in common, so
    the rate is in effect a smaller one.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step. Removes the gradients of Muon's matrices, so that AdamW skips these."""
        for group in self.param_groups:
            if "newton_schulz" in group:
                nth = {parameter: number for number, parameter in enumerate(group["params"])}
                for alike in batches([parameter for parameter in group["params"] if parameter.grad is not None]):
                    self._move(alike, group, [nth[parameter] for parameter in alike])
        return super().step(closure)

    def _move(self, alike: list[Tensor], group: dict[str, Any], numbers: list[int]) -> None:
        """Decay the weights, then move them by Nesterov's momentum, orthogonalised. numbers: those of the parameters in
        their group."""
        gradients = [_take_gradient(parameter) for parameter in alike]
        momenta = [self._momentum(parameter) for parameter in alike]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        for parameter, momentum in zip(alike, momenta, strict=True):
            self._keep(parameter, momentum)
        copies = group.get("copies", 1)
        every = group.get("every", 1) if copies == 1 else 1
        rate = group["lr"] * every**0.5
        moving = [
            (nth, *(_first_copy(each, copies) for each in (parameter, gradient, momentum)))
            for nth, parameter, gradient, momentum in zip(numbers, alike, gradients, momenta, strict=True)
            if every == 1 or (group["step"] + nth) % every == 0
        ]
        if not moving:
            return
        numbers, weights, gradients, momenta = map(list, zip(*moving, strict=True))
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
        updates = orthogonalise(torch.cat([matrices(tensor) for tensor in ahead]), int(group["newton_schulz"]))
        parts = updates.split([len(matrices(weight)) for weight in weights])
        for weight, update, nth in zip(weights, parts, numbers, strict=True):
            exact = weight.float()  # the weight itself, unless it is bf16
            exact.mul_(1 - rate * group["weight_decay"])
            exact.add_(update.view_as(weight), alpha=-rate * reach(weight))
            store(weight, exact, noise(group, nth) if weight.dtype == torch.bfloat16 else None)

    def _momentum(self, parameter: Tensor) -> Tensor:
        """The momentum of a parameter in fp32, zero at first."""
        momentum = self.state[parameter].get("momentum")
        return torch.zeros_like(parameter, dtype=torch.float32) if momentum is None else momentum

    def _keep(self, parameter: Tensor, momentum: Tensor) -> None:
        self.state[parameter]["momentum"] = momentum


class Muon(MuonMixin, AdamW):
    """Muon with an fp32 momentum, and AdamW with fp32 moments for the parameters that Muon does not update."""


def _take_gradient(parameter: Tensor) -> Tensor:
    """Remove the gradient from the parameter and return it in fp32."""
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    return gradient.float()


def batches(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Group parameters whose matrices have one shape, in batches of at most LARGEST numbers."""
    for _, alike in groupby(sorted(parameters, key=_shape), key=_shape):
        batch: list[Tensor] = []
        for parameter in alike:
            if batch and sum(p.numel() for p in batch) + parameter.numel() > LARGEST:
                yield batch
                batch = []
            batch.append(parameter)
        yield batch


def _first_copy(tensor: Tensor, copies: int) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor[: len(tensor) // copies]


def _shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(parameter.shape[-2:])


def matrices(tensor: Tensor) -> Tensor:
    """(out, in) -> (1, out, in); a stack (E, in, out) as it is."""
    return tensor.unflatten(0, (1, -1)) if tensor.dim() == 2 else tensor


def reach(parameter: Tensor) -> float:
    """Factor on the update of a shape: sqrt(max(1, out / in)). A matrix is (out, in), a stack (E, in, out)."""
    rows, columns = parameter.shape[-2:]
    return max(1.0, rows / columns if parameter.dim() == 2 else columns / rows) ** 0.5


def orthogonalise(x_NIO: Tensor, steps: int) -> Tensor:
    """Approximate U V' for each matrix U S V' of a batch by the last `steps` of ITERATIONS, in bf16 on CUDA, else fp32.

    The root of the Gram matrix's norm bounds the largest singular value up to R^(1/4) times closer than the norm of the
    matrix itself, and a closer bound saves an iteration.
    """
    rows, columns = x_NIO.shape[-2:]
    if steps <= 3 and not x_NIO.is_cuda and max(rows, columns) >= 2 * min(rows, columns):
        return _by_gram_matrix(x_NIO.float(), ITERATIONS[-steps:]).to(x_NIO.dtype)
    x_NRC = x_NIO.mT if rows > columns else x_NIO  # the Gram matrix is the smaller one
    x_NRC = x_NRC / norm(x_NRC)
    if x_NRC.is_cuda:
        x_NRC = x_NRC.bfloat16()
    for nth, (largest, a, b, c) in enumerate(ITERATIONS[-steps:]):
        gram_NRR = x_NRC @ x_NRC.mT
        if nth == 0:
            scale = largest / (ROOM * norm(gram_NRR).sqrt())
            x_NRC, gram_NRR = x_NRC * scale, gram_NRR * scale.square()
        bent_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, bent_NRR, x_NRC, beta=a)
    return (x_NRC.mT if rows > columns else x_NRC).to(x_NIO.dtype)


def _by_gram_matrix(x_NIO: Tensor, iterations: Sequence[tuple[float, ...]]) -> Tensor:
    """The same for matrices that are much longer than wide: x only meets its Gram matrix G and, at the end, the product
    of the polynomials p, because p(G) x has the Gram matrix p(G) G p(G). Each p multiplies the rounding errors of G,
    which stay small over three iterations in fp32, but not over five, nor in bf16."""
    tall = x_NIO.shape[-2] > x_NIO.shape[-1]
    gram_NRR = x_NIO.mT @ x_NIO if tall else x_NIO @ x_NIO.mT
    scale = iterations[0][0] / (ROOM * norm(gram_NRR, LEAST_NORM**2).sqrt())
    gram_NRR = scale.square() * gram_NRR
    (_, *first), *others = iterations
    bent_NRR = _polynomial(gram_NRR, *first)
    product_NRR = scale * bent_NRR
    for _, a, b, c in others:
        gram_NRR = bent_NRR @ gram_NRR @ bent_NRR
        bent_NRR = _polynomial(gram_NRR, a, b, c)
        product_NRR = bent_NRR @ product_NRR
    return x_NIO @ product_NRR if tall else product_NRR @ x_NIO


def _polynomial(gram_NRR: Tensor, a: float, b: float, c: float) -> Tensor:
    """a + b G + c G^2."""
    bent_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
    bent_NRR.diagonal(dim1=-2, dim2=-1).add_(a)
    return bent_NRR


def norm(x_NRC: Tensor, least: float = LEAST_NORM) -> Tensor:
    """Frobenius norm of each matrix of a batch, (N, 1, 1)."""
    return torch.linalg.matrix_norm(x_NRC, keepdim=True).clamp(min=least)
