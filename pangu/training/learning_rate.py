"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from pangu.config import Config


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    `original`: the released code's schedule. Warm-up starts at 0, so the very first step changes nothing; the cosine counts from step 0 and
    not from the end of the warm-up, so the rate drops a little at the end of the warm-up and `optimizer.lr` is never quite reached.
    `cosine`: warm-up reaches `optimizer.lr` at the last warm-up step, and the cosine starts there.
    """
    schedule, peak = config.schedule, config.optimizer.lr
    warmup, decay = schedule.warmup_steps, schedule.decay_steps
    if schedule.name == "original":
        if step < warmup:
            return peak * step / warmup
        progress = min(step, decay) / decay
    else:
        if step < warmup:
            return peak * (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, decay - warmup))
    return schedule.min_lr + (peak - schedule.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
