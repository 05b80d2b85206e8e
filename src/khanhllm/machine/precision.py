"""What the weights are kept in: fp32, or the matrices in bf16 (the last rung of the precision ladder).

Autocast stays on with either, and finds nothing to cast in matrices that are bf16 already. Vectors and the router stay
fp32: norms' gains near 1 would move in steps of 1/128, a near-tie of the router falls the other way for less, and all
of them are a thousandth of the memory.
"""

import torch
from torch import nn

from khanhllm.model.roles import HIDDEN, TABLES, Role, role

ROUNDED = HIDDEN | TABLES | {Role.HEAD}


def keep_in_bf16(model: nn.Module, gradients: str = "fp32") -> None:
    """Round the matrices to bf16, one after the other, in place. `gradients`: fp32 or bf16, what `.grad` sums up in."""
    for name, parameter in model.named_parameters():
        if role(name) in ROUNDED:
            parameter.data = parameter.data.bfloat16()
            parameter.grad_dtype = torch.float32 if gradients == "fp32" else torch.bfloat16  # type: ignore[attr-defined]
