"""Experts that learn together, as one dense layer, before they part: sparse upcycling (Komatsuzaki et al. 2022, arXiv
2212.05055) within a run.

A new expert learns from K / E of the tokens only, which is too little for a while. So at first the E experts are E / K
copies of the same K, and the rows of the router that belong to one copy are equal too. Then the K experts of one copy
answer a token, each with weight 1 / K (the router's probability if K is 1); and which copy does makes no difference.
Gradients are tied, so that this stays: each expert learns from the mean over the copies, each row of the router from
the mean over its copy. All that the router learns is to share out the tokens evenly. After each step all copies become
equal to the first, which is the only one that an optimizer need move. Once experts are no longer tied, every one goes
its own way.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from khanhllm.model.moe import MoE


@torch.no_grad()
def tie(model: nn.Module) -> None:
    """Make all copies equal to the first one. K must divide E."""
    for tensor, axis in _in_copies(model):
        tensor.copy_(tensor.narrow(axis, 0, 1).clone())


@torch.no_grad()
def tie_gradients(model: nn.Module) -> None:
    """Let each expert have the mean gradient of its copies, and each row of a router that of the rows of its copy."""
    for tensor, axis in _in_copies(model, gradients=True):
        tensor.copy_(tensor.mean(axis, keepdim=True))


def _in_copies(model: nn.Module, gradients: bool = False) -> Iterator[tuple[Tensor, int]]:
    """The parameters and biases of experts and routers, or gradients, as (E / K, K, ...), with the axis along which
    they are to be equal."""
    for layer in model.modules():
        if isinstance(layer, MoE):
            router = [(each, 1) for each in (layer.router.weight, layer.router.bias_E) if each is not None]
            for each, axis in *router, *((stack, 0) for stack in layer.experts.parameters()):
                tensor = each.grad if gradients else each
                if tensor is not None:
                    yield tensor.unflatten(0, (-1, layer.router.per_token)), axis
