"""The type of the weights: fp32, or bf16 for the matrices.

Autocast stays on with either, and has nothing to cast in matrices that are bf16 already. Vectors and the router stay
fp32: a norm's gains near 1 would move in steps of 1/128, smaller errors than that reroute tokens with a near-tie, and
all of them are a thousandth of the memory.
"""

import torch
from torch import nn

from khanhllm.model.roles import HIDDEN, TABLES, Role, role

ROUNDED = HIDDEN | TABLES | {Role.HEAD}


def keep_in_bf16(model: nn.Module, gradients: str = "fp32") -> None:
    """Round the matrices to bf16, one after the other, in place. `gradients`: fp32 or bf16, the type of `.grad`."""
    for name, parameter in model.named_parameters():
        if role(name) in ROUNDED:
            parameter.data = parameter.data.bfloat16()
            parameter.grad_dtype = torch.float32 if gradients == "fp32" else torch.bfloat16  # type: ignore[attr-defined]
