"""AdamW with moments, and Muon with a momentum, of 8 bits, quantised block by block (Dettmers et al. 2022, arXiv
2110.02861) by bitsandbytes. Muon learns as well with them (Gupta et al. 2025, arXiv 2509.23106).

Separate from `adamw` and `muon`, because the import loads a shared library that not every platform has.
"""

from typing import Any

import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise
from bitsandbytes.optim import AdamW8bit as Whole
from torch import Tensor, nn

from khanhllm.optim.muon import MuonMixin
from khanhllm.optim.rounding import noise, slices, store

BLOCK = 256
"""numbers that share one scale"""


class AdamW8bit(Whole):  # type: ignore[misc]
    """bitsandbytes' AdamW8bit, a slice of a parameter at a time, so that no fp32 copy of a whole one ever exists; the
    result is the same. It updates bf16 weights in fp32 and rounds them stochastically, with bits from a group's "seed"
    and "step"."""

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
        """Update one parameter: bitsandbytes updates a stand-in for each slice, with the slice's moments."""
        state, weight, gradient = self.state[p], p.data.view(-1), p.grad.reshape(-1)  # type: ignore[union-attr]
        bits = noise(group, pindex) if p.dtype == torch.bfloat16 else None
        for part in slices(len(weight)):
            stand_in = nn.Parameter(weight[part].float(), requires_grad=False)
            stand_in.grad = gradient[part].float()
            self.state[stand_in] = {key: _part(key, value, part) for key, value in state.items()}
            super().update_step(group, stand_in, gindex, pindex)
            store(weight[part], stand_in.data, bits)
            steps = self.state.pop(stand_in)["step"]
        state["step"] = steps


def _part(key: str, value: Any, part: slice) -> Any:
    """The part of a state that belongs to a slice: the slice of moments, its blocks of scales, all of anything else."""
    if key.startswith("state"):
        return value.view(-1)[part]
    if key.startswith("absmax"):
        return value[part.start // BLOCK : -(-part.stop // BLOCK)]
    return value


class Muon8bit(MuonMixin, AdamW8bit):
    """Muon with an 8-bit momentum, and AdamW8bit for the parameters that Muon does not update."""

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            return torch.zeros_like(parameter, dtype=torch.float32)
        values = self._values(parameter)
        return dequantize_blockwise(state["momentum"], absmax=state["absmax"], code=values, blocksize=BLOCK)

    def _keep(self, parameter: Tensor, momentum: Tensor) -> None:
        quantised, scales = quantize_blockwise(momentum, self._values(parameter), blocksize=BLOCK)
        self.state[parameter] = {"momentum": quantised, "absmax": scales.absmax}

    def _values(self, parameter: Tensor) -> Tensor:
        """The 256 values that 8 bits stand for, the same as AdamW8bit's."""
        self.name2qmap["dynamic"] = self.name2qmap["dynamic"].to(parameter.device)
        return self.name2qmap["dynamic"]  # type: ignore[no-any-return]
