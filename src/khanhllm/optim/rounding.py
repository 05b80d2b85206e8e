"""Round bf16 weights stochastically, so that updates too small for bf16 still count on average.

bf16 keeps 8 binary digits. An update of less than half the gap between a weight and its neighbour would vanish each
time that it is rounded to nearest. So an update is computed in fp32 and then rounded at random: up with probability
(x - lower) / (upper - lower), else down, whose mean is x itself (Gupta et al. 2015, arXiv 1502.02551; for all of a
language model's weights: Ozkara et al. 2025, arXiv 2502.20566).

    fp32   s eeeeeeee mmmmmmm | llllllllllllllll      bf16 is the upper half of fp32: add 16 random bits to the
         + random 16 bits       rrrrrrrrrrrrrrrr      lower half, let it carry, then cut it off
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

SLICE = 2**22
"""numbers whose fp32 copies exist at one time; a multiple of the 256 that one scale of 8-bit moments covers"""


def noise(group: dict[str, Any], nth: int) -> torch.Generator:
    """The random bits of one step for the nth parameter of an optimizer's group, on its device.

    They are the same for the same "seed" and "step" in the group, so there is nothing to save and resumed runs agree.
    Each parameter has bits of its own, so it does not matter which others this process updates.
    """
    digest = hashlib.blake2b(f"{group['seed']}/{nth} {group['step']}".encode(), digest_size=8).digest()
    return torch.Generator(group["params"][0].device).manual_seed(int.from_bytes(digest, "little", signed=True))


def store(weight: Tensor, exact: Tensor, bits: torch.Generator | None) -> None:
    """weight <- exact (fp32, of the same shape), rounded stochastically if the weight is bf16. Overwrites `exact`."""
    if weight.dtype == torch.bfloat16:
        round_stochastically_(exact, bits)
    if weight.dtype != torch.float32:  # the fp32 form of an fp32 weight is the weight itself
        weight.copy_(exact)


def round_stochastically_(x: Tensor, bits: torch.Generator | None) -> Tensor:
    """Round each number of `x` (fp32, contiguous) in place to one that bf16 holds: itself or one of two neighbours."""
    count = x.numel()
    drawn = torch.empty(-(-count // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None, generator=bits)
    half = drawn.view(torch.int16)[:count].view(x.shape)  # four from each draw, between -2^15 and 2^15 - 1
    x.view(torch.int32).add_(half).add_(2**15).bitwise_and_(-(2**16))
    return x


def slices(count: int) -> Iterator[slice]:
    """Cut `count` numbers into slices of at most SLICE."""
    for start in range(0, count, SLICE):
        yield slice(start, min(start + SLICE, count))
