"""Learning rate as a pure function of the step, so that nothing of it needs saving.

Linear warm-up to the peak, then: cosine (Loshchilov & Hutter 2017, one cycle), linear, constant, or wsd (warm-up,
stable, decay: Hu et al. 2024, MiniCPM), down to peak x min_lr_ratio.
"""

import math

from megagpt.config.schema import ScheduleConfig


def learning_rate(step: int, peak: float, schedule: ScheduleConfig, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (the first is 0) of a run of `total_steps`."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return peak
    floor = peak * schedule.min_lr_ratio
    start, length = _decay_span(schedule, total_steps)
    progress = min(max(step - start, 0) / length, 1.0)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1 - progress
    return floor + (peak - floor) * remaining


def _decay_span(schedule: ScheduleConfig, total_steps: int) -> tuple[int, int]:
    """First step of the fall and its length in steps."""
    if schedule.name == "wsd":
        length = schedule.decay_steps or max(1, total_steps // 10)
        return max(total_steps - length, schedule.warmup_steps), length
    return schedule.warmup_steps, schedule.decay_steps or max(1, total_steps - schedule.warmup_steps)
