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
        return dequantize_blockwise(state["momentum"], absmax=state["absmax"], blocksize=BLOCK)

    def _keep(self, parameter: Tensor, momentum: Tensor) -> None:
        kept, scales = quantize_blockwise(momentum, blocksize=BLOCK)
        self.state[parameter] = {"momentum": kept, "absmax": scales.absmax}
