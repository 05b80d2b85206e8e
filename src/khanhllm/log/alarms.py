"""Watch the rows of the log for routing that has gone wrong, and advise what to do.

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
"""steps in a row that an expert is idle, or a layer collapsed, before a message"""
DEAD = 20
"""steps in a row with a gradient of exactly zero before a message"""
COLLAPSED = 0.75
"""a layer has collapsed when its balance is this far from even (0) to the worst possible (1)"""
ADVICE = "a larger --loss.balance spreads tokens, a smaller --optim.lr makes the router change more slowly"


class Alarms:
    """Checks each row once. Reports each trouble once, and again only if it has ended and returned."""

    def __init__(self, moe_layers: list[int], model: ModelConfig) -> None:
        self.moe_layers = moe_layers
        self.experts = model.experts
        self.worst = model.experts / model.experts_per_token
        """balance of a layer whose tokens all go to the same experts; 1 is even"""
        self.since: Counter[tuple[int, int]] = Counter()
        """steps in a row of each trouble: (layer, expert), (layer, -1) for a collapse, (-1, -1) for a dead model"""

    def check(self, row: dict[str, Any]) -> Iterator[str]:
        """Yield a message for each trouble that has just lasted STEPS steps, or DEAD for a model that is dead."""
        if self._lasts((-1, -1), row.get("grad_norm") == 0, DEAD):
            yield f"the gradient has been exactly zero for {DEAD} steps: the model learns nothing; lower --optim.lr"
        if self.worst == 1 or row.get("rejected"):
            return
        layers = zip(self.moe_layers, row.get("load_per_layer", []), row.get("balance_per_layer", []), strict=False)
        for layer, shares, balance in layers:
            for expert, share in enumerate(shares):
                if self._lasts((layer, expert), share < IDLE / self.experts):
                    yield f"layer {layer}: expert {expert} has been idle for {STEPS} steps ({share:.2%}); {ADVICE}"
            if self._lasts((layer, -1), balance > 1 + COLLAPSED * (self.worst - 1)):
                yield f"layer {layer}: its routing has collapsed onto few experts (balance {balance:.2f}); {ADVICE}"

    def _lasts(self, trouble: tuple[int, int], now: bool, steps: int = STEPS) -> bool:
        """Whether a trouble has just lasted so many steps; `now`: whether this step has it."""
        self.since[trouble] = self.since[trouble] + 1 if now else 0
        return self.since[trouble] == steps
