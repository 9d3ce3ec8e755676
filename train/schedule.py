"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from configs.schema import Schedule


def learning_rate(schedule: Schedule, peak: float, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (1 to `steps`).

    Linear warmup reaches the peak at step `warmup_steps`; the decay reaches
    `min_lr_fraction * peak` at the last step. A run shorter than its warmup stays on the ramp.
    """
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    start = schedule.warmup_steps
    if schedule.kind == "wsd":
        start = max(start, steps - round(schedule.decay_fraction * steps))
    if step <= start:
        return peak
    progress = (step - start) / (steps - start)
    if schedule.kind == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        share = 1 - progress
    return peak * (schedule.min_lr_fraction + (1 - schedule.min_lr_fraction) * share)
