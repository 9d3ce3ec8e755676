"""The learning rate as a pure function of the step, without state in checkpoints."""

import math

from configs.schema import JobConfig, ScheduleConfig


def schedule_steps(config: JobConfig) -> int:
    """The step at which the schedule of a run ends."""
    return config.schedule.steps or config.train.steps


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (from 1) of a schedule of `steps`.

    Linear warmup reaches the peak at its last step; the decay reaches `min_lr_fraction * peak` at
    step `steps`, and the rate then stays there. A run shorter than its warmup ends during the
    warmup.
    """
    warmup = schedule.warmup_steps or round(schedule.warmup_fraction * steps)
    if step <= warmup:
        return peak * step / warmup
    start = warmup
    if schedule.kind == "wsd":
        start = max(start, steps - round(schedule.decay_fraction * steps))
    if step <= start or start >= steps:
        return peak
    progress = min((step - start) / (steps - start), 1.0)
    if schedule.kind == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        share = 1 - progress
    return peak * (schedule.min_lr_fraction + (1 - schedule.min_lr_fraction) * share)
