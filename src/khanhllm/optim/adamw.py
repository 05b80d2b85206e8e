"""AdamW with fp32 moments (Loshchilov and Hutter 2019, arXiv 1711.05101), for weights of fp32 and of bf16."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from khanhllm.optim.rounding import noise, slices, store


class AdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW; it updates bf16 weights in fp32, a slice at a time, and rounds them stochastically.

    The random bits come from the "seed" and the "step" of its group.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step. Removes the gradients of bf16 weights, so that PyTorch's step skips these."""
        for group in self.param_groups:
            for nth, parameter in enumerate(group["params"]):
                if parameter.dtype == torch.bfloat16 and parameter.grad is not None:
                    self._update(parameter, group, noise(group, nth))
                    parameter.grad = None
        return super().step(closure)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any], bits: torch.Generator) -> None:
        state = self.state[parameter]
        if not state:
            moments = {key: torch.zeros_like(parameter, dtype=torch.float32) for key in ("exp_avg", "exp_avg_sq")}
            state |= {"step": torch.zeros((), device=parameter.device), **moments}
        weight, gradient = parameter.view(-1), parameter.grad.reshape(-1)  # type: ignore[union-attr]
        mean, square = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        settings = {key: group[key] for key in ("lr", "weight_decay", "eps", "maximize", "amsgrad")}
        settings |= {"beta1": group["betas"][0], "beta2": group["betas"][1]}
        for part in slices(len(weight)):
            exact, slope, step = weight[part].float(), gradient[part].float(), state["step"].clone()
            adamw([exact], [slope], [mean[part]], [square[part]], [], [step], fused=True, **settings)
            store(weight[part], exact, bits)
        state["step"] += 1
