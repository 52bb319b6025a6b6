"""What is a fault of a step, and what is done about it; in whole runs: tests/faults/test_numerics.py."""

from __future__ import annotations

import math

import pytest

from pangu.engine.engine import StepResult
from pangu.training.anomalies import MAX_ROLLBACKS, MAX_SKIPPED, MIN_HISTORY, Policy, decide, fault_of, loss_limit


def step_result(loss: float = 2.0, skipped: bool = False, overflow: bool = False) -> StepResult:
    return StepResult(loss=loss, grad_norm=math.inf if skipped else 1.0, skipped=skipped, overflow=overflow, loss_scale=None)


@pytest.mark.parametrize(
    ("result", "fault"),
    [
        (step_result(), None),
        (step_result(loss=math.nan, skipped=True), "the loss is nan"),
        (step_result(loss=-math.inf, skipped=True), "the loss is -inf"),
        (step_result(loss=7.0, skipped=True), "the loss 7.0000 is above its limit of 6.0000"),
        (step_result(skipped=True), "the gradient is not finite"),
        (step_result(skipped=True, overflow=True), None),
    ],
)
def test_what_is_a_fault(result: StepResult, fault: str | None) -> None:
    assert fault_of(result, 6.0) == fault


def test_limit_of_the_loss() -> None:
    assert loss_limit([1.0] * 50, 0.0) == math.inf
    assert loss_limit([1.0] * (MIN_HISTORY - 1), 2.0) == math.inf
    assert loss_limit([3.0] * MIN_HISTORY + [100.0] * (MIN_HISTORY - 1), 2.0) == 6.0


@pytest.mark.parametrize(
    ("policy", "in_a_row", "rollbacks", "has_checkpoint", "decision"),
    [
        ("skip", 1, 0, True, "skip"),
        ("skip", MAX_SKIPPED - 1, 0, True, "skip"),
        ("skip", MAX_SKIPPED, 0, True, "stop"),
        ("stop", 1, 0, True, "stop"),
        ("rollback", 1, 0, True, "rollback"),
        ("rollback", 1, MAX_ROLLBACKS, True, "stop"),
        ("rollback", 1, 0, False, "skip"),
        ("rollback", MAX_SKIPPED, 0, False, "stop"),
    ],
)
def test_decisions(policy: Policy, in_a_row: int, rollbacks: int, has_checkpoint: bool, decision: str) -> None:
    assert decide(policy, in_a_row=in_a_row, rollbacks=rollbacks, has_checkpoint=has_checkpoint) == decision
