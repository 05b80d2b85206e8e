"""When the outcome of a step is not to be believed.

A loss or a gradient that is not finite, or a loss far above those before it, never reaches the optimizer: the step is
rejected, and weights and moments stay as they are. Several in a row mean that the weights themselves have gone wrong;
then the run returns to its last good checkpoint and passes the rows that it stumbled over. When that does not help
either, it stops.

"Far above" is measured with the median and the median absolute deviation of recent losses, which one outlier cannot
move; and a rejected loss never enters them.
"""

from dataclasses import dataclass, replace
from math import isfinite
from statistics import median

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


class Diverged(UserError):
    """The run cannot be brought back. The last good checkpoint is kept."""

    exit_code = 76


@dataclass(frozen=True)
class Guard:
    """What is remembered of the steps so far; part of the run's state."""

    losses: tuple[float, ...] = ()
    """of accepted steps, the newest last (nats per token)"""
    rejected: int = 0
    """steps rejected in a row"""
    accepted: int = 0
    """steps accepted in a row"""
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

    def accept(self, loss: float) -> "Guard":
        accepted = self.accepted + 1
        returns = 0 if accepted >= WINDOW else self.returns
        return Guard((*self.losses, loss)[-WINDOW:], rejected=0, accepted=accepted, returns=returns)

    def reject(self) -> "Guard":
        return replace(self, rejected=self.rejected + 1, accepted=0)
