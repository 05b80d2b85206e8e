"""Muon with a momentum of 8 bits, a byte a weight, quantised block by block as AdamW8bit's moments are; it learns as
well (Gupta et al. 2025, arXiv 2509.23106)."""

import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise
from torch import Tensor

from khanhllm.adamw8bit import BLOCK, AdamW8bit
from khanhllm.muon import Turning


class Muon8bit(Turning, AdamW8bit):
    """AdamW8bit for what is not Muon's."""

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            return torch.zeros_like(parameter, dtype=torch.float32)
        values = self._values(parameter)
        return dequantize_blockwise(state["momentum"], absmax=state["absmax"], code=values, blocksize=BLOCK)

    def _keep(self, parameter: Tensor, momentum: Tensor) -> None:
        kept, scales = quantize_blockwise(momentum, self._values(parameter), blocksize=BLOCK)
        self.state[parameter] = {"momentum": kept, "absmax": scales.absmax}

    def _values(self, parameter: Tensor) -> Tensor:
        """The 256 that 8 bits stand for; AdamW8bit has them too."""
        self.name2qmap["dynamic"] = self.name2qmap["dynamic"].to(parameter.device)
        return self.name2qmap["dynamic"]  # type: ignore[no-any-return]
