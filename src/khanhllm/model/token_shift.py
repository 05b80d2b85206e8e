"""What the position before brings to each layer (Peng et al. 2023, arXiv 2305.13048, in another form).

    x_t + a * norm(x_{t-1})        a number a for each feature of each layer, zero at first

So the queries, keys and values of a layer tell of two neighbours, for which attention would need a head in the layer
before. The first position of a text has itself before it. Elsewhere it is a layer of attention alone, whose heads look
at the position before: see `as_deeper` in export/encode.py.
"""

import torch
from torch import Tensor, nn

from khanhllm.model.cache import LayerCache
from khanhllm.model.norm import rms_norm


class TokenShift(nn.Module):
    """Adds the position before to the input of each layer."""

    def __init__(self, layers: int, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.shift_LD = nn.Parameter(torch.empty(layers, dim))

    def forward(
        self, x_BTD: Tensor, layer: int, past: LayerCache | None = None, place_BT: Tensor | None = None
    ) -> Tensor:
        """x_BTD -> (B, T, D). With `past`, x holds the positions that follow those in it. place_BT: the position of
        each token in its own document."""
        normed_BTD = rms_norm(x_BTD, None, self.eps)
        before_BTD = past.before(normed_BTD) if past else torch.cat((normed_BTD[:, :1], normed_BTD[:, :-1]), dim=1)
        if place_BT is not None:
            before_BTD = torch.where(place_BT.unsqueeze(-1) == 0, normed_BTD, before_BTD)
        return x_BTD + self.shift_LD[layer] * before_BTD
