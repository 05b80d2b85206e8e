"""The keys and values of past positions, kept so that a new token costs one token of work. No module stores a cache:
the code that generates text owns it and passes it along."""

import torch
from torch import Tensor


class LayerCache:
    """Past keys and values of one attention layer, each (B, H, context, d); `length` positions are filled."""

    def __init__(self, key_BHTd: Tensor, value_BHTd: Tensor) -> None:
        self.key_BHTd, self.value_BHTd = key_BHTd, value_BHTd
        self.length = 0

    def append(self, key_BHTd: Tensor, value_BHTd: Tensor) -> tuple[Tensor, Tensor]:
        """Write the newest positions and return all of them, old and new. Raises ValueError when the cache is full."""
        end = self.length + key_BHTd.shape[2]
        if end > self.key_BHTd.shape[2]:
            raise ValueError(f"the cache holds {self.key_BHTd.shape[2]} positions, {end} are needed")
        self.key_BHTd[:, :, self.length : end] = key_BHTd
        self.value_BHTd[:, :, self.length : end] = value_BHTd
        self.length = end
        return self.key_BHTd[:, :, :end], self.value_BHTd[:, :, :end]


class KVCache:
    """One LayerCache per layer, and the newest token."""

    last_B1: Tensor | None = None

    def __init__(
        self, layers: int, rows: int, heads: int, head_dim: int, context: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (rows, heads, context, head_dim)
        self.layers = [
            LayerCache(torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype))
            for _ in range(layers)
        ]

    @property
    def length(self) -> int:
        """Positions that are filled."""
        return self.layers[0].length
