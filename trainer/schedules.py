"""The learning rate as a pure function of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math

from trainer.config_blocks import ScheduleConfig


def lr_ratio(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Learning rate of optimiser step ``step`` (0 is the first) of ``steps``, relative to its peak."""
    # The lower of the two, so that a warm-up that reaches into the decay does not end in a jump.
    return min((step + 1) / max(schedule.warmup_steps, 1), _shape(schedule, step, steps))


def _shape(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The ratio without a warm-up."""
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "inverse_sqrt":
        return min(1.0, math.sqrt(schedule.inverse_sqrt_from / (step + 1)))
    steps = schedule.end_step or steps
    if schedule.kind == "cosine":
        span = max(steps - 1 - schedule.warmup_steps, 1)
        done = min(max(step - schedule.warmup_steps, 0) / span, 1.0)
        return schedule.final_ratio + (1 - schedule.final_ratio) * 0.5 * (1 + math.cos(math.pi * done))
    decay_steps = schedule.decay_steps or max(round(schedule.decay_share * steps), 1)
    left = min(max(steps - 1 - step, 0) / decay_steps, 1.0)
    return schedule.final_ratio + (1 - schedule.final_ratio) * left
