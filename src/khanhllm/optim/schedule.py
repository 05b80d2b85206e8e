"""The learning rate as a share of its peak, by step. Pure functions, so a resumed run cannot be one step off."""

import math

from khanhllm.schema import ScheduleConfig

WARM = 0.05
"""largest share of a time budget that a warm-up takes, unless it has fewer steps than LEAST by then"""
LEAST = 20
"""the first step may be slow, as it compiles, and after a return to the beginning much time has passed; but a rate at
its peak needs AdamW's mean of squared gradients, which is one of about 20 steps (beta2 = 0.95)"""
SHORT = 2
"""where steps are counted, a warm-up takes at most the run's steps divided by this"""


def factor_at(share: float, step: int, schedule: ScheduleConfig) -> float:
    """Share of the peak learning rate for optimizer step `step` of a run that has used up `share` of its time."""
    warm = max((step + 1) / max(1, schedule.warmup), min(share / WARM, (step + 1) / LEAST))
    if schedule.kind == "cosine":
        height = 0.5 + 0.5 * math.cos(math.pi * share)
    else:
        height = min(1.0, (1 - share) / max(schedule.decay, 1e-9))
    return min(1.0, warm, _between(schedule.floor, height))


def warmup_of(steps: int, schedule: ScheduleConfig) -> int:
    """Steps of warm-up in a run of so many steps: a short one must not end near the peak of its rate."""
    return min(schedule.warmup, max(1, steps // SHORT))


def factor(step: int, steps: int, schedule: ScheduleConfig) -> float:
    """Share of the peak learning rate for optimizer step `step` (the first is 0) of `steps`."""
    warmup = warmup_of(steps, schedule)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "cosine":
        return _between(schedule.floor, 0.5 + 0.5 * math.cos(math.pi * _share(step, warmup, steps)))
    down = max(warmup, steps - round(schedule.decay * steps))
    return _between(schedule.floor, 1 - _share(step, down, steps))


def _share(step: int, start: int, end: int) -> float:
    """The position of step between start and the last step before end, 0 to 1."""
    return min(1.0, max(0, step - start + 1) / max(1, end - start))


def _between(floor: float, height: float) -> float:
    return floor + (1 - floor) * height
