"""When the outcome of a step is not to be believed.

A loss or a gradient that is not finite, or a loss far above those before it, never reaches the optimizer: the step is
rejected, and weights and moments stay as they are. "Far above" is measured with the median and the median absolute
deviation of recent losses, which one outlier cannot move; a rejected loss never enters them.

Several rejected steps in a row have one of two causes, and the loss alone cannot tell them apart: a model that meets a
new language or markup can do worse than chance, and so can one whose weights have gone wrong. So the run reads some
*known* rows again, those of the middle of the remembered losses. The weights have learned since, so they read them no
worse than then, unless something is wrong with the weights themselves:

- the known rows stay nearer to the old level than to the new one: the text has changed. The remembered losses are moved
  to the new level, nothing is lost but the rejected steps, and the run continues;
- they rose as well: the weights have gone wrong. The run returns to its last good checkpoint and passes the rows that
  it stumbled over. From one to which it returned in vain it goes back to the one before. When that does not help
  either, it stops.

The middle, since a divergence may rise slowly: the rows of the last believed steps may have been read badly already.
"""

from dataclasses import dataclass, replace
from math import isfinite
from statistics import median
from typing import Annotated

from pydantic import Field

from khanhllm.errors import UserError
from khanhllm.schema import GuardConfig

WINDOW = 128
"""losses that are remembered"""
LEAST = 32
"""losses from which on a spike can be told"""
RISE = 1.0
"""a loss less than this above the median is never a spike, however steady the losses were (nats per token)"""
SIGMA = 1.4826
"""standard deviations of a normal distribution in one median absolute deviation"""


Cursor = Annotated[int, Field(ge=0, le=2**62)]
"""rows trained on, or passed; checked where a checkpoint is read"""


class Diverged(UserError):
    """The run cannot be brought back. The last good checkpoint is kept."""

    exit_code = 76


@dataclass(frozen=True)
class Guard:
    """What is remembered of the steps so far; part of the run's state."""

    losses: tuple[float, ...] = ()
    """of accepted steps, the newest last (nats per token)"""
    cursors: tuple[Cursor, ...] = ()
    """where each of those steps began to read; fewer after a resume from a checkpoint from before they were noted"""
    rejected: int = 0
    """steps rejected in a row"""
    accepted: int = 0
    """steps accepted in a row"""
    spikes: int = 0
    """steps rejected until LEAST steps in a row are accepted: a text that comes and goes never breaks the row"""
    returns: int = 0
    """times the run went back to a checkpoint, until WINDOW steps in a row are accepted again"""

    def fault(self, loss: float, grad_norm: float, config: GuardConfig) -> str:
        """Why a step with this loss and gradient is to be rejected; empty if it is not."""
        if not isfinite(loss):
            return f"the loss is {loss}"
        if not isfinite(grad_norm):
            return f"the gradient's norm is {grad_norm}"
        if config.spike and len(self.losses) >= LEAST:
            middle = median(self.losses)
            deviation = SIGMA * median(abs(other - middle) for other in self.losses)
            if loss > middle + max(config.spike * deviation, RISE):
                return f"the loss is {loss:.4g}, far above the {middle:.4g} of the steps before"
        return ""

    def accept(self, loss: float, cursor: int) -> "Guard":
        """cursor: where the step began to read."""
        accepted = self.accepted + 1
        returns = 0 if accepted >= WINDOW else self.returns
        spikes = 0 if accepted >= LEAST else self.spikes
        losses, cursors = (*self.losses, loss)[-WINDOW:], (*self.cursors, cursor)[-WINDOW:]
        return Guard(losses, cursors, accepted=accepted, spikes=spikes, returns=returns)

    def reject(self) -> "Guard":
        return replace(self, rejected=self.rejected + 1, accepted=0, spikes=self.spikes + 1)

    def returned_to(self, returns: int) -> "Guard":
        """That of a checkpoint to which the run returns, the last of so many times. What was rejected before, of rows
        that it has passed for good, does not count any more."""
        return replace(self, accepted=0, spikes=0, returns=returns)

    def doubts(self, config: GuardConfig) -> bool:
        """Whether so many steps were rejected that text or weights must have changed."""
        return self.rejected >= config.patience or self.spikes >= LEAST

    def middle(self, cursor: int, rows: int) -> int:
        """Where the step of the middle loss began to read; there must be one. cursor: where the run stands, for steps
        that are not noted: as if only the last ones had been rejected, each of so many rows."""
        back = (len(self.losses) + 1) // 2
        return self.cursors[-back] if back <= len(self.cursors) else max(0, cursor - (self.rejected + back) * rows)

    def text_changed(self, loss: float, known: float) -> bool:
        """Whether the text explains a rejected loss. known: what the same weights make of rows from the middle of
        `losses` (nats per token)."""
        return bool(self.losses) and known - median(self.losses) < (loss - median(self.losses)) / 2

    def moved(self, loss: float) -> "Guard":
        """The text has changed, and its loss is believed: deviations stay, the level is the new one."""
        rise = loss - median(self.losses)
        return Guard(tuple(other + rise for other in self.losses), self.cursors, returns=self.returns)
