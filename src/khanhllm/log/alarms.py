"""Routing that has gone wrong, noticed from the rows of the log, with what to do about it.

An expert that gets almost nothing learns almost nothing, and a router that sends all tokens to the same few experts
has made a dense model of the mixture. Both show early, and rarely go away by themselves.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from khanhllm.schema import ModelConfig

IDLE = 0.1
"""an expert with less than this share of an even load is idle"""
STEPS = 500
"""steps in a row that an expert is idle, or a layer collapsed, until it is said"""
COLLAPSED = 0.75
"""a layer has collapsed when its balance is this far on the way from even to as bad as can be"""
ADVICE = "a larger --loss.balance spreads tokens, a smaller --optim.lr keeps the router from running ahead"


class Alarms:
    """Hears each row once; speaks once for each trouble, and again only when it has passed and returned."""

    def __init__(self, moe_layers: list[int], model: ModelConfig) -> None:
        self.moe_layers = moe_layers
        self.experts = model.experts
        self.worst = model.experts / model.experts_per_token
        """balance of a layer whose tokens all go to the same experts; 1 is even"""
        self.since: Counter[tuple[int, int]] = Counter()
        """steps in a row of each trouble: (layer, expert), or (layer, -1) for a collapse"""

    def hear(self, row: dict[str, Any]) -> Iterator[str]:
        if self.worst == 1 or row.get("rejected"):
            return
        found = zip(self.moe_layers, row.get("load_per_layer", []), row.get("balance_per_layer", []), strict=False)
        for layer, shares, balance in found:
            for expert, share in enumerate(shares):
                if self._lasts((layer, expert), share < IDLE / self.experts):
                    yield f"layer {layer}: expert {expert} has been idle for {STEPS} steps ({share:.2%}); {ADVICE}"
            if self._lasts((layer, -1), balance > 1 + COLLAPSED * (self.worst - 1)):
                yield f"layer {layer}: its routing has collapsed onto few experts (balance {balance:.2f}); {ADVICE}"

    def _lasts(self, trouble: tuple[int, int], now: bool) -> bool:
        """Whether a trouble has just lasted for STEPS steps."""
        self.since[trouble] = self.since[trouble] + 1 if now else 0
        return self.since[trouble] == STEPS
