"""Decides what a run does after a bad step: a loss or gradient that is not finite, or a loss far above the recent ones.

The update of such a step never reaches the weights (pangu.engine.guard). What follows is decided here from numbers that are the same on
every rank, so all ranks decide alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pangu.engine.engine import StepResult

Policy = Literal["skip", "rollback", "stop"]

HISTORY = 100
"""Number of recent losses of which the median is taken."""
MIN_HISTORY = 20
"""Number of losses below which no loss is judged a spike."""
MAX_SKIPPED = 10
"""Number of bad steps in a row that ends the run."""
MAX_ROLLBACKS = 3
"""Number of returns to the same checkpoint that are allowed; the next one ends the run."""


def loss_limit(recent_losses: Sequence[float], spike_factor: float) -> float:
    """The loss above which a step is a spike; infinite if `spike_factor` is 0 or there are too few losses."""
    if spike_factor == 0.0 or len(recent_losses) < MIN_HISTORY:
        return math.inf
    return spike_factor * statistics.median(recent_losses)


def fault_of(result: StepResult, limit: float) -> str | None:
    """What was wrong with a step, or None. An fp16 overflow that lowered the loss scale is normal and not a fault."""
    if not math.isfinite(result.loss):
        return f"the loss is {result.loss}"
    if result.loss > limit:
        return f"the loss {result.loss:.4f} is above its limit of {limit:.4f}"
    if result.skipped and not result.overflow:
        return "the gradient is not finite"
    return None


def decide(policy: Policy, *, in_a_row: int, rollbacks: int, has_checkpoint: bool) -> Policy:
    """What to do after a bad step.

    Args:
        policy: `train.on_bad_step`.
        in_a_row: number of consecutive bad steps, this one included.
        rollbacks: number of earlier returns to the newest checkpoint.
        has_checkpoint: whether there is a checkpoint to return to. Without one the update is only skipped.
    """
    if policy == "stop" or in_a_row >= MAX_SKIPPED:
        return "stop"
    if policy == "rollback" and has_checkpoint:
        return "rollback" if rollbacks < MAX_ROLLBACKS else "stop"
    return "skip"
