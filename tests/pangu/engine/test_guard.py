"""The gate of the loss, and how a ZeRO optimizer is made to decide by the norm; on whole layouts: tests/faults/test_numerics.py."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.harness import run_distributed
from torch import Tensor

from megatron_ext.collectives import world_size
from megatron_ext.context import ParallelContext
from megatron_ext.initialize import random_weights
from megatron_ext.layers import LayerNorm
from megatron_ext.supervision import rendezvous
from megatron_ext.topology import Groups, Topology
from pangu.engine.guard import StepGuard

ALONE = Groups.from_topology(Topology(tensor=1, pipeline=1, data=1), 0)


def gradients(losses: list[float], limit: float = math.inf) -> tuple[list[float], float]:
    """Gradient of each micro-batch's loss behind the gate, and the mean loss that the guard found."""
    guard = StepGuard([], ALONE, len(losses), torch.device("cpu"))
    found = []
    for _ in range(2):  # a step leaves nothing to the next
        found = []
        guard.begin(limit)
        for loss in losses:
            weight = torch.ones((), requires_grad=True)
            passed = guard.check_loss(weight * loss)
            assert passed.item() == pytest.approx(loss, nan_ok=True)
            (gradient,) = torch.autograd.grad(passed * 1.0, weight, retain_graph=True)
            found.append(gradient.item())
    return found, float(guard.mean_loss)


def test_good_losses_keep_their_gradients() -> None:
    assert gradients([1.0, 3.0]) == ([1.0, 3.0], 2.0)
    assert gradients([1.0, 3.0], limit=2.0) == ([1.0, 3.0], 2.0)


@pytest.mark.parametrize("losses", [[math.inf, 3.0], [1.0, math.nan], [-math.inf, 1.0]])
def test_a_loss_that_is_not_finite_spoils_the_last_gradient(losses: list[float]) -> None:
    """Whichever micro-batch it was in: one that is spoilt is enough to make the norm of the step not finite."""
    found, mean = gradients(losses)
    assert math.isnan(found[-1]) and not math.isfinite(mean)


def test_the_limit_is_on_the_mean_and_not_on_one_loss() -> None:
    assert gradients([9.0, 1.0], limit=6.0) == ([9.0, 1.0], 5.0)
    found, mean = gradients([9.0, 5.0], limit=6.0)
    assert found[0] == 9.0 and math.isnan(found[1]) and mean == 7.0


def optimizers() -> dict[str, Any]:
    """DeepSpeed's three kinds, by the name of the method in which each computes the norm."""
    return {
        "ZeRO-1 and 2": SimpleNamespace(scaled_global_norm=lambda: torch.tensor(2.0)),
        "ZeRO-3": SimpleNamespace(_get_norm_groups=lambda: [torch.tensor(2.0)]),
        "bf16": SimpleNamespace(get_grads_for_norm=lambda **_: ([torch.tensor(2.0)], {})),
    }


@pytest.mark.parametrize("kind", optimizers())
def test_the_norm_alone_decides(kind: str) -> None:
    optimizer = optimizers()[kind]
    StepGuard([], ALONE, 1, torch.device("cpu")).judge_by_norm(optimizer)
    assert optimizer.check_grad_overflow and optimizer.compute_grad_norm
    assert optimizer.check_overflow(anything=1) is None


def norms_after(faulty_rank: int) -> dict[str, bool]:
    """Whether each kind's norm is finite on this rank, where one rank's gradient of a parameter that both hold has a NaN."""
    rendezvous.initialize(60)
    groups = Groups.create(Topology(tensor=world_size(), pipeline=1, data=1))
    finite = {}
    for kind, optimizer in optimizers().items():
        norm = LayerNorm(4, ParallelContext(tensor=groups.tensor, fill=random_weights(1)), name="norm")
        guard = StepGuard(norm.parameters(), groups, 1, torch.device("cpu"))
        guard.judge_by_norm(optimizer)
        guard.begin(math.inf)
        (norm.weight.sum() * (math.nan if groups.tensor.rank == faulty_rank else 1.0)).backward()
        method = next(name for name in ("scaled_global_norm", "_get_norm_groups", "get_grads_for_norm") if hasattr(optimizer, name))
        finite[kind] = all_finite(getattr(optimizer, method)())
    return finite


def all_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    return all(map(all_finite, value.values() if isinstance(value, dict) else value))


def test_a_fault_of_one_rank_is_in_every_ranks_norm() -> None:
    """DeepSpeed's norm counts the first tensor-parallel rank's gradient of what all hold, and this fault is on the second."""
    assert run_distributed(norms_after, 2, 1) == [dict.fromkeys(optimizers(), False)] * 2
    assert run_distributed(norms_after, 2, -1) == [dict.fromkeys(optimizers(), True)] * 2
