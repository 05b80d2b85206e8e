"""Every parameter in exactly one group; then AdamW with fp32 or with 8-bit moments, or Muon (muon.py).

The upside-down pyramid: AdamW keeps two numbers for each weight. In 8 bits, quantised block by block (Dettmers et al.
2022, arXiv 2110.02861), they take 2 bytes instead of 8 and learn as well. bitsandbytes does it on CPU and GPU alike.
"""

import logging
from typing import Any

import torch
from torch import nn

from khanhllm.errors import UserError, missing_extra
from khanhllm.model.roles import HIDDEN, TABLES, Role, role
from khanhllm.optim.adamw import AdamW
from khanhllm.optim.muon import Muon
from khanhllm.schema import OptimConfig

SMALL = 4096
"""numbers in a parameter below which bitsandbytes keeps fp32 moments"""


Group = dict[str, Any]


def groups(model: nn.Module, config: OptimConfig) -> list[Group]:
    """Each parameter in exactly one group, by its role: the hidden matrices if Muon moves them, all other matrices,
    which decay, then all that does not; and tables and head apart if they have a learning rate of their own."""
    decayed = {"lr": config.lr * width_factor(model, config), "weight_decay": config.weight_decay}
    plain = {"lr": config.lr, "weight_decay": 0.0}
    found: dict[str, Group] = {}
    if config.name.startswith("muon"):
        by_muon = {"lr": config.muon_lr, "momentum": config.momentum, "newton_schulz": config.newton_schulz}
        found["hidden"] = {"params": [], **decayed, **by_muon}
    found |= {"decayed": {"params": [], **decayed}, "plain": {"params": [], **plain}}
    if config.embedding_lr:
        found["tables"] = {"params": [], **plain, "lr": config.embedding_lr}
    if config.head_lr:
        found["head"] = {"params": [], **decayed, "lr": config.head_lr * width_factor(model, config)}
    for name, parameter in model.named_parameters():
        wanted = HOMES.get(role(name), ("plain",))
        found[next(home for home in wanted if home in found)]["params"].append(parameter)
    return list(found.values())


HOMES = {
    **dict.fromkeys(HIDDEN, ("hidden", "decayed")),
    **dict.fromkeys(TABLES, ("tables", "plain")),
    Role.HEAD: ("head", "decayed"),
    Role.ROUTER: ("decayed",),
}
"""the group of each role, the first that there is"""


def width_factor(model: nn.Module, config: OptimConfig) -> float:
    """How much smaller the steps of a matrix under AdamW must be than at the width where their rate was found. Each of
    its numbers moves alike whatever the width, and outputs add them up (Yang et al. 2022, arXiv 2203.03466)."""
    return config.base_dim / model.config.dim if config.base_dim else 1.0  # type: ignore[union-attr,operator,return-value]


def build(model: nn.Module, config: OptimConfig, seed: int = 0) -> torch.optim.Optimizer:
    """The optimizer that the config names. Each of its groups remembers its "peak_lr", which the schedule scales; who
    trains sets its "lr" and its "step" (-1 before the first) before each step. "seed" and "step" decide how bf16
    weights are rounded."""
    optimizer = _build(model, config)
    for index, group in enumerate(optimizer.param_groups):
        group |= {"peak_lr": group["lr"], "seed": f"{seed}/{index}", "step": -1}
    return optimizer


def _build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    found = groups(model, config)
    if config.name == "muon":
        return Muon(found, **settings, fused=True)
    if config.name == "adamw":
        return AdamW(found, **settings, fused=True)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about kernels that only inference needs
    try:
        from khanhllm.optim.eight_bit import AdamW8bit, Muon8bit
    except Exception as error:  # its import loads a shared library, and what that raises depends on the platform
        name, plain = config.name, config.name.removesuffix("8bit")
        if isinstance(error, ModuleNotFoundError) and (missing := missing_extra(error)):
            raise UserError(f"optim.name {name}: {missing}; or use {plain}") from None
        reason = str(error).splitlines()[0]
        raise UserError(f"optim.name: {name} needs bitsandbytes, which fails here ({reason}); use {plain}") from None
    return AdamW8bit(found, **settings) if config.name == "adamw8bit" else Muon8bit(found, **settings)


def state_shapes(
    optimizer: torch.optim.Optimizer,
) -> dict[nn.Parameter, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Each parameter's moments as they are after a step: names, types, shapes. An update trusts them unseen."""
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            whole = (torch.float32, tuple(parameter.shape))
            scales = (torch.float32, (-(-parameter.numel() // 256),))
            eight_bit = "8bit" in type(optimizer).__name__
            if "newton_schulz" in group:
                kept = {"momentum": whole}
                if eight_bit:
                    kept = {"momentum": (torch.uint8, tuple(parameter.shape)), "absmax": scales}
            elif eight_bit:
                kept = {"state1": whole, "state2": whole}
                if parameter.numel() >= SMALL:
                    kept = dict.fromkeys(kept, (torch.uint8, tuple(parameter.shape)))
                    kept |= dict.fromkeys(("qmap1", "qmap2"), (torch.float32, (256,)))
                    kept |= dict.fromkeys(("absmax1", "absmax2"), scales)
            else:
                kept = {"step": (torch.float32, ()), "exp_avg": whole, "exp_avg_sq": whole}
            found[parameter] = kept
    return found


def describe(optimizer: torch.optim.Optimizer) -> str:
    """Which one runs, and whose: ours only add the rounding."""
    library = next(
        kind.__module__.partition(".")[0] for kind in type(optimizer).__mro__ if __package__ not in kind.__module__
    )
    return f"{type(optimizer).__name__} of {library}"


def state_size(optimizer: torch.optim.Optimizer) -> int:
    """What the optimizer's state will take (bytes), known before the first step: see `state_bytes`."""
    eight_bit = "8bit" in type(optimizer).__name__
    size = 2 * 256 * 4 if eight_bit else 0  # the tables of 256 values that 8 bits stand for
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            count = parameter.numel()
            scales = 4 * -(-count // 256)
            if "newton_schulz" in group:
                size += count + scales if eight_bit else 4 * count
            elif eight_bit and count >= SMALL:
                size += 2 * (count + scales)
            else:
                size += 8 * count + (0 if eight_bit else 4)  # AdamW counts its steps in a tensor
    return size


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Memory of the optimizer's state (bytes); tables shared by all parameters count once."""
    tensors = {
        value.data_ptr(): value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    return sum(tensors.values())
