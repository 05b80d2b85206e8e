"""Who works: all experts of a layer as stacked matrices (E, in, out), applied to rows that are sorted by expert.

Two roads lead through the stack. `loop_linear` multiplies one expert after the other: it defines what is right.
`grouped_linear` asks `torch.nn.functional.grouped_mm` for all of them at once, with shapes that never depend on the
routing, which is what a GPU and a compiler want. `machine/` picks one; the laws demand that they agree.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Linear = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]


def loop_linear(x_NI: Tensor, weight_EIO: Tensor, bias_EO: Tensor | None, count_E: Tensor) -> Tensor:
    """Rows sorted by expert, `count_E` of them for each (int64) -> (N, O). Reads the counts on the host."""
    rows = x_NI.split(count_E.tolist())
    if bias_EO is None:
        return torch.cat([x @ weight for x, weight in zip(rows, weight_EIO.unbind(), strict=True)])
    parts = zip(bias_EO.unbind(), rows, weight_EIO.unbind(), strict=True)
    return torch.cat([torch.addmm(bias, x, weight) for bias, x, weight in parts])


def grouped_linear(x_NI: Tensor, weight_EIO: Tensor, bias_EO: Tensor | None, count_E: Tensor) -> Tensor:
    """The same as `loop_linear` on static shapes. grouped_mm ignores autocast and takes no bias: both are done here."""
    if torch.is_autocast_enabled(x_NI.device.type):
        dtype = torch.get_autocast_dtype(x_NI.device.type)
        x_NI, weight_EIO = x_NI.to(dtype), weight_EIO.to(dtype)
    end_E = count_E.cumsum(0).to(torch.int32)
    out_NO = F.grouped_mm(x_NI, weight_EIO, offs=end_E)
    if bias_EO is None:
        return out_NO
    # A product with the one-hot expert of each row: its backward is a product too, so there is nothing to scatter.
    row_N1 = torch.arange(len(x_NI), device=x_NI.device)[:, None]
    own_NE = (row_N1 < end_E) & (row_N1 >= end_E - count_E)
    return out_NO + own_NE.to(out_NO.dtype) @ bias_EO.to(out_NO.dtype)


class GeluExperts(nn.Module):
    """E times down(gelu(up(x))), with biases."""

    def __init__(self, experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(experts, dim, hidden))
        self.up_bias = nn.Parameter(torch.empty(experts, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, dim))
        self.down_bias = nn.Parameter(torch.empty(experts, dim))
        self.linear: Linear = loop_linear

    def forward(self, x_ND: Tensor, count_E: Tensor) -> Tensor:
        hidden_NF = F.gelu(self.linear(x_ND, self.up, self.up_bias, count_E))
        return self.linear(hidden_NF, self.down, self.down_bias, count_E)


class SwiGLUExperts(nn.Module):
    """E times down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(experts, dim, hidden))
        self.up = nn.Parameter(torch.empty(experts, dim, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, dim))
        self.linear: Linear = loop_linear

    def forward(self, x_ND: Tensor, count_E: Tensor) -> Tensor:
        gate_NF = self.linear(x_ND, self.gate, None, count_E)
        up_NF = self.linear(x_ND, self.up, None, count_E)
        return self.linear(F.silu(gate_NF) * up_NF, self.down, None, count_E)
