"""The keys and values of past positions, kept so that a new token costs one token of work. No module stores a cache:
the code that generates text owns it and passes it along.

Several texts of different lengths share one `TextCache`: `one` gives the cache of a single text, as the model reads a
prompt into it; `several` that of a step in which each of them grows by one token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class LayerCache:
    """Past keys and values of one attention layer, each (B, H, context, d), and with `token_shift` the past vectors
    (B, 1, context, D) that it adds; `length` positions are filled."""

    mask_BHTS: Tensor | None = None
    """which positions each query sees, where the rows differ in it; None: all before it"""

    def __init__(self, tensors: Sequence[Tensor], length: int = 0) -> None:
        self.tensors, self.length = tensors, length
        self.key_BHTd, self.value_BHTd, *_ = tensors

    @property
    def start(self) -> int | Tensor:
        """The position of the next token: a number, or (B,) if the rows differ in it."""
        return self.length

    def append(self, key_BHTd: Tensor, value_BHTd: Tensor) -> tuple[Tensor, Tensor]:
        """Write the newest positions and return all of them, old and new. Raises ValueError when the cache is full."""
        end = self.length + key_BHTd.shape[2]
        if end > self.key_BHTd.shape[2]:
            raise ValueError(f"the cache holds {self.key_BHTd.shape[2]} positions, {end} are needed")
        self.key_BHTd[:, :, self.length : end] = key_BHTd
        self.value_BHTd[:, :, self.length : end] = value_BHTd
        self.length = end
        return self.key_BHTd[:, :, :end], self.value_BHTd[:, :, :end]

    def before(self, x_BTD: Tensor) -> Tensor:
        """Write the newest vectors, before `append`, and return that of the position before each, (B, T, D). The first
        position has itself before it."""
        whole_BTD, end = self.tensors[2][:, 0], self.length + x_BTD.shape[1]
        whole_BTD[:, self.length : end] = x_BTD
        return whole_BTD[:, torch.arange(self.length - 1, end - 1, device=x_BTD.device).clamp(min=0)]


class RaggedCache(LayerCache):
    """Some rows of a LayerCache, which have different lengths and grow by one token."""

    def __init__(
        self, whole: LayerCache, row_B: Tensor, start_B: Tensor, longest: int, mask_BHTS: Tensor, all_rows: bool
    ) -> None:
        super().__init__(whole.tensors, longest)
        self.row_B, self.start_B, self.mask_BHTS = row_B, start_B, mask_BHTS
        self.all_rows = all_rows

    @property
    def start(self) -> Tensor:
        return self.start_B

    def append(self, key_BHTd: Tensor, value_BHTd: Tensor) -> tuple[Tensor, Tensor]:
        self.key_BHTd[self.row_B, :, self.start_B] = key_BHTd[:, :, 0].to(self.key_BHTd.dtype)
        self.value_BHTd[self.row_B, :, self.start_B] = value_BHTd[:, :, 0].to(self.value_BHTd.dtype)
        return self._seen(self.key_BHTd), self._seen(self.value_BHTd)

    def before(self, x_BTD: Tensor) -> Tensor:
        whole_BTD = self.tensors[2][:, 0]
        whole_BTD[self.row_B, self.start_B] = x_BTD[:, 0].to(whole_BTD.dtype)
        return whole_BTD[self.row_B, (self.start_B - 1).clamp(min=0)].unsqueeze(1)

    def _seen(self, x_BHTd: Tensor) -> Tensor:
        seen_BHTd = x_BHTd[:, :, : self.length + 1]
        return seen_BHTd if self.all_rows else seen_BHTd[self.row_B]


class KVCache:
    """One LayerCache per layer, and the newest token of each row, if there is one."""

    def __init__(self, layers: Sequence[LayerCache], last_B1: Tensor | None = None) -> None:
        self.layers = list(layers)
        self.last_B1 = last_B1

    @property
    def length(self) -> int:
        """Positions that are filled, in the longest row."""
        return self.layers[0].length

    @property
    def start(self) -> int | Tensor:
        """The position of the next token; (B,) if the rows differ in it."""
        return self.layers[0].start


class TextCache:
    """The caches of several texts that grow independently. `ids` says what each row holds, and its owner keeps it:
    ids that are dropped there are forgotten."""

    def __init__(self, layers: list[LayerCache]) -> None:
        self.layers = layers
        self.ids: list[list[int]] = [[] for _ in layers[0].key_BHTd]
        self.device = layers[0].key_BHTd.device

    def one(self, row: int) -> KVCache:
        """The cache of one text, to be continued by any number of tokens."""
        ids, here = self.ids[row], slice(row, row + 1)
        layers = [LayerCache([tensor[here] for tensor in layer.tensors], len(ids)) for layer in self.layers]
        return KVCache(layers, torch.tensor([ids[-1:]], device=self.device) if ids else None)

    def several(self, rows: Sequence[int]) -> KVCache:
        """The cache of texts that each grow by one token, in this order of rows."""
        lengths = [len(self.ids[row]) for row in rows]
        longest = max(lengths)
        row_B, start_B = (torch.tensor(numbers, device=self.device) for numbers in (rows, lengths))
        place_S = torch.arange(longest + 1, device=self.device)
        mask_BHTS = (place_S <= start_B[:, None])[:, None, None]
        last_B1 = torch.tensor([self.ids[row][-1:] or [0] for row in rows], device=self.device)
        ordered = list(rows) == list(range(len(self.ids)))
        layers = [RaggedCache(layer, row_B, start_B, longest, mask_BHTS, ordered) for layer in self.layers]
        return KVCache(layers, last_B1)

    def copy(self, source: int, target: int, length: int) -> None:
        """Let row `target` begin as the first `length` tokens of row `source`."""
        if source != target:
            for layer in self.layers:
                for x_BHTd in layer.tensors:
                    x_BHTd[target, :, :length] = x_BHTd[source, :, :length]
        self.ids[target] = self.ids[source][:length]

    def clear(self, row: int) -> None:
        """Forget a row and what it wrote, which may not be finite."""
        self.ids[row] = []
        for layer in self.layers:
            for x_BHTd in layer.tensors:
                x_BHTd[row] = 0
