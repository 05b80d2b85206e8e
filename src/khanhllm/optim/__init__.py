"""Build the optimizer: AdamW with fp32 or 8-bit moments, or Muon (muon.py). Every parameter is in exactly one group.

AdamW keeps two numbers for each weight. In 8 bits, quantised block by block (Dettmers et al. 2022, arXiv 2110.02861),
they take 2 bytes instead of 8, and the model learns as well. bitsandbytes does this on CPU and GPU.
"""

import logging
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from khanhllm.errors import UserError, first_line, missing_extra
from khanhllm.model.roles import HIDDEN, TABLES, Role, role
from khanhllm.optim.adamw import AdamW
from khanhllm.optim.muon import Muon
from khanhllm.schema import OptimConfig

SMALL = 4096
"""numbers in a parameter below which bitsandbytes keeps fp32 moments"""
WHOLE: Mapping[nn.Parameter, int] = MappingProxyType({})
"""no parameter is cut into parts"""


Group = dict[str, Any]


def groups(model: nn.Module, config: OptimConfig) -> list[Group]:
    """Put each parameter into exactly one group, by its role: hidden matrices if Muon updates them; other matrices,
    which decay; and the rest, which does not. Tables, head, routers and experts get groups of their own if they have
    their own rates or momentum."""
    width = width_factor(model, config)
    decayed = {"lr": config.lr * width, "weight_decay": config.weight_decay}
    plain = {"lr": config.lr, "weight_decay": 0.0}
    named: dict[str, Group] = {}
    if config.name.startswith("muon"):
        hidden = decayed | {"lr": config.muon_lr, "momentum": config.momentum, "newton_schulz": config.newton_schulz}
        named["hidden"] = {"params": [], **hidden}
        if config.expert_momentum or config.expert_out_lr or config.expert_every > 1:
            momentum = config.expert_momentum or config.momentum
            experts = hidden | {"momentum": momentum, "every": config.expert_every}
            named["experts"] = {"params": [], **experts}
            named["experts' output"] = {"params": [], **experts, "lr": config.expert_out_lr or config.muon_lr}
    named |= {"decayed": {"params": [], **decayed}, "plain": {"params": [], **plain}}
    if config.embedding_lr:
        named["tables"] = {"params": [], **plain, "lr": config.embedding_lr}
    if config.head_lr:
        named["head"] = {"params": [], **decayed, "lr": config.head_lr * width}
    if config.router_lr or config.router_beta1:
        betas = config.router_beta1 or config.beta1, config.beta2
        named["router"] = {"params": [], **decayed, "lr": (config.router_lr or config.lr) * width, "betas": betas}
    for name, parameter in model.named_parameters():
        candidates = GROUP_OF.get((role(name), parameter.dim()), GROUP_OF.get(role(name), ("plain",)))
        named[next(group for group in candidates if group in named)]["params"].append(parameter)
    return list(named.values())


GROUP_OF: dict[Role | tuple[Role, int], tuple[str, ...]] = {
    (Role.INPUT, 3): ("experts", "hidden", "decayed"),  # stacks
    (Role.OUTPUT, 3): ("experts' output", "hidden", "decayed"),
    **dict.fromkeys(HIDDEN, ("hidden", "decayed")),
    **dict.fromkeys(TABLES, ("tables", "plain")),
    Role.HEAD: ("head", "decayed"),
    Role.ROUTER: ("router", "decayed"),
}
"""the group of each role, or of each role and number of axes: the first of these that exists"""


def width_factor(model: nn.Module, config: OptimConfig) -> float:
    """Factor on the learning rate of a matrix under AdamW, relative to the width for which the rate was found. Each of
    its numbers moves equally far at any width, and an output sums them (Yang et al. 2022, arXiv 2203.03466)."""
    return config.base_dim / model.config.dim if config.base_dim else 1.0  # type: ignore[union-attr,operator,return-value]


def build(model: nn.Module, config: OptimConfig, seed: int = 0) -> torch.optim.Optimizer:
    """The optimizer that the config names. Each of its groups keeps its "peak_lr", which the schedule scales. The
    training sets "lr" and "step" (-1 before the first) before each step. "seed" and "step" decide how bf16 weights are
    rounded."""
    optimizer = _build(model, config)
    for index, group in enumerate(optimizer.param_groups):
        group |= {"peak_lr": group["lr"], "seed": f"{seed}/{index}", "step": -1}
    return optimizer


def _build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    parameters = groups(model, config)
    if config.name == "muon":
        return Muon(parameters, **settings, fused=True)
    if config.name == "adamw":
        return AdamW(parameters, **settings, fused=True)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about kernels that only inference needs
    try:
        from khanhllm.optim.eight_bit import AdamW8bit, Muon8bit
    except Exception as error:  # its import loads a shared library, and what that raises depends on the platform
        name, plain = config.name, config.name.removesuffix("8bit")
        if isinstance(error, ModuleNotFoundError) and (missing := missing_extra(error)):
            raise UserError(f"optim.name {name}: {missing}; or use {plain}") from None
        reason = first_line(error)
        raise UserError(f"optim.name: {name} needs bitsandbytes, which fails here ({reason}); use {plain}") from None
    return {"adamw8bit": AdamW8bit, "muon8bit": Muon8bit}[config.name](parameters, **settings)


def state_shapes(
    optimizer: torch.optim.Optimizer, parts: Mapping[nn.Parameter, int] = WHOLE
) -> dict[nn.Parameter, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Names, types and shapes of each parameter's moments after a step. The optimizer does not check loaded ones.

    parts: for some, of how many equal parts the parameter is one; the moments are then those of the whole.
    """
    shapes = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            shape = tuple(parameter.shape)
            if parameter in parts:
                shape = (shape[0] * parts[parameter], *shape[1:])
            count = math.prod(shape)
            whole = (torch.float32, shape)
            scales = (torch.float32, (-(-count // 256),))
            eight_bit = "8bit" in type(optimizer).__name__
            if "newton_schulz" in group:
                moments = {"momentum": whole}
                if eight_bit:
                    moments = {"momentum": (torch.uint8, shape), "absmax": scales}
            elif eight_bit:
                moments = {"state1": whole, "state2": whole}
                if count >= SMALL:
                    moments = dict.fromkeys(moments, (torch.uint8, shape))
                    moments |= dict.fromkeys(("qmap1", "qmap2"), (torch.float32, (256,)))
                    moments |= dict.fromkeys(("absmax1", "absmax2"), scales)
            else:
                moments = {"step": (torch.float32, ()), "exp_avg": whole, "exp_avg_sq": whole}
            shapes[parameter] = moments
    return shapes


def refuse_torn_moments(optimizer: torch.optim.Optimizer, parts: Mapping[nn.Parameter, int]) -> None:
    """UserError if the moments of these parts would not be parts of the whole's moments: 256 numbers share a scale of
    8 bits, and small parameters have none."""
    for parameter, of in parts.items():
        count = parameter.numel()
        if "8bit" in type(optimizer).__name__ and (count % 256 or count < SMALL <= count * of):
            raise UserError(
                f"machine.expert_processes: {of} processes would hold {count:,} numbers of a stack each, but 8-bit "
                f"moments need a multiple of 256, at least {SMALL:,}; use fewer processes, or optim.name muon or adamw"
            )


def describe(optimizer: torch.optim.Optimizer) -> str:
    """Name and library of the optimizer; our classes only add rounding to the library's."""
    library = next(
        kind.__module__.partition(".")[0] for kind in type(optimizer).__mro__ if __package__ not in kind.__module__
    )
    return f"{type(optimizer).__name__} of {library}"


def state_size(optimizer: torch.optim.Optimizer) -> int:
    """Memory that the optimizer's state will take (bytes), computed before the first step; see `state_bytes`."""
    moments = {
        (None if name.startswith("qmap") else parameter, name): kind  # the tables of 8 bits are shared
        for parameter, own in state_shapes(optimizer).items()
        for name, kind in own.items()
    }
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in moments.values())


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Memory of the optimizer's state (bytes); tables shared by all parameters count once."""
    tensors = {
        value.data_ptr(): value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    return sum(tensors.values())
