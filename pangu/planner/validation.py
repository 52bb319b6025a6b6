"""Fits the constants of the time model to published runs, and predicts others.

The fit is small on purpose: seven constants of a profile, each with a prior from what is known about such hardware, and a speed of each
family of runs and of each day within it, with a prior near 1. Runs of a family that was not fitted get speed 1. The fit is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pangu.config.sizes import stage_parameters
from pangu.errors import InputError
from pangu.planner.hardware import Cluster
from pangu.planner.memory import GIB, MEGATRON, estimate_memory
from pangu.planner.plan import Plan, Workload
from pangu.planner.profile import Profile
from pangu.planner.reference import Run
from pangu.planner.states import FP32_BYTES
from pangu.planner.time import TimeModel

PRIORS = {
    "matmul_efficiency": (0.85, 0.05),
    "matmul_saturation": (2.0, 0.3),
    "token_saturation": (4.0, 0.5),
    "memory_efficiency": (0.7, 0.2),
    "server_efficiency": (0.65, 0.2),
    "network_efficiency": (0.7, 0.3),
    "unaligned": (4.0, 0.3),
}
"""The constants that are fitted: what such hardware is known to reach, and how far from it the fit may go (standard deviation of the
logarithm). They are not the defaults of `Profile`, which come out of the fit."""
GROUP_SPREADS = (0.15, 0.06, 0.04)
"""Standard deviations of the logarithm of the speed of a software stack, of a family within it, and of a day within its family."""
NOISE = 0.03
"""Standard deviation of the logarithm of a run's time."""
OUTLIER = 1.5
"""Number of standard deviations beyond which a residual counts linearly instead of quadratically (Huber)."""
STEPS = 30
MIN_RUNS = 3


@dataclass(frozen=True)
class Fit:
    """The result of a fit: constants, and how much slower than they predict each family and day was."""

    profile: Profile
    slowness: dict[str, float]
    """Logarithm of the slowness by software stack, by family, and by family and day; a run's slowness is the sum of those that are
    known."""

    @classmethod
    def default(cls) -> Fit:
        """The default constants, with every software stack at speed 1."""
        return cls(Profile(), {})

    def predict(self, run: Run) -> float:
        """Predicted seconds per step of a run."""
        return fastest(run, self.profile) * math.exp(sum(self.slowness.get(name, 0.0) for name in run.groups))


@dataclass(frozen=True)
class Score:
    """Quality of the predictions of some runs."""

    runs: int
    error: float
    """Mean of |predicted / measured - 1|."""
    pairs: int
    """Number of pairs of the same family and day whose measured times differ."""
    right: int
    """Number of those pairs that are predicted in the right order."""


def is_feasible(workload: Workload, plan: Plan, cluster: Cluster, *, fp32_gradients: bool = False) -> bool:
    """Whether every stage of a plan fits in device memory, if activations are kept as in Megatron-LM.

    Args:
        workload: the training workload.
        plan: the layout.
        cluster: the cluster.
        fp32_gradients: whether gradients are accumulated over micro-batches in fp32, in addition to the 16-bit gradients.
    """
    parameters = stage_parameters(workload.model, plan.layout.tensor, plan.stage_layers)
    return all(
        estimate_memory(workload, plan, stage, MEGATRON).total + fp32_gradients * FP32_BYTES * held.total
        <= cluster.device.memory_gib.value * GIB
        for stage, held in enumerate(parameters)
    )


def fits_in_memory(run: Run) -> bool:
    """Whether a run has a micro-batch size that fits."""
    return any(is_feasible(run.workload, plan, run.cluster, fp32_gradients=run.fp32_gradients) for plan in run.plans)


def fastest(run: Run, profile: Profile) -> float:
    """Predicted seconds per step with the best of a run's possible micro-batch sizes, among those that fit if any does."""
    model = TimeModel(run.workload, run.cluster, profile)
    plans = run.plans
    if len(plans) > 1:
        plans = tuple(x for x in plans if is_feasible(run.workload, x, run.cluster, fp32_gradients=run.fp32_gradients)) or plans
    return min(model.step(plan).total for plan in plans)


def fit(runs: Sequence[Run]) -> Fit:
    """Fit constants and speeds to measured runs: the maximum of the posterior, by damped Gauss-Newton steps.

    Args:
        runs: published runs; those without a measured time are left out.

    Raises:
        InputError: if fewer than three runs have a measured time.
    """
    timed = [run for run in runs if run.seconds is not None]
    if len(timed) < MIN_RUNS:
        raise InputError(f"{len(timed)} runs with a measured iter_s can be understood, but {MIN_RUNS} or more are needed for a fit.")
    groups = sorted({(depth, name) for run in timed for depth, name in enumerate(run.groups)})
    names = list(PRIORS)
    default = np.log([centre for centre, _ in PRIORS.values()])
    spread = np.array([*(spread for _, spread in PRIORS.values()), *(GROUP_SPREADS[depth] for depth, _ in groups)])
    measured = np.log([run.seconds or math.nan for run in timed])
    belongs = np.array([[depth < len(run.groups) and run.groups[depth] == name for depth, name in groups] for run in timed], dtype=float)

    def profile(constants: NDArray[np.float64]) -> Profile:
        values = dict(zip(names, np.exp(constants).tolist(), strict=True))
        return Profile.model_validate({name: _allowed(name, value) for name, value in values.items()})

    def model(constants: NDArray[np.float64]) -> NDArray[np.float64]:
        chosen = profile(constants)
        return np.log([fastest(run, chosen) for run in timed])

    def loss(misfit: NDArray[np.float64], unknowns: NDArray[np.float64]) -> float:
        size = np.abs(misfit)
        huber = np.where(size <= OUTLIER, size**2, 2 * OUTLIER * size - OUTLIER**2)
        return float(huber.sum() + ((unknowns - centre) ** 2 / spread**2).sum())

    centre = np.concatenate([default, np.zeros(len(groups))])
    unknowns, count = centre.copy(), len(names)
    predicted, damping = model(default), 1e-3
    for _ in range(STEPS):
        misfit = (measured - predicted - belongs @ unknowns[count:]) / NOISE
        before = loss(misfit, unknowns)
        slopes = np.empty((len(timed), count))
        for index in range(count):
            moved = unknowns[:count].copy()
            moved[index] += 1e-4 if moved[index] <= default[index] else -1e-4  # shares end at 1: step inwards
            slopes[:, index] = (model(moved) - predicted) / (moved[index] - unknowns[index])
        jacobian = np.hstack([slopes, belongs]) / NOISE
        weight = np.minimum(1.0, OUTLIER / np.maximum(np.abs(misfit), 1e-12))
        gradient = jacobian.T @ (weight * misfit) + (centre - unknowns) / spread**2
        curvature = jacobian.T @ (weight[:, None] * jacobian) + np.diag(1 / spread**2)
        improved = False
        while not improved and damping < 1e6:
            trial = unknowns + np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), gradient)
            trial_predicted = model(trial[:count])
            after = loss((measured - trial_predicted - belongs @ trial[count:]) / NOISE, trial)
            improved = after < before
            damping = damping / 5 if improved else damping * 5
        if not improved:
            break
        unknowns, predicted = trial, trial_predicted
        if before - after < 1e-6 * before:
            break
    slowness = dict(zip([name for _, name in groups], unknowns[count:].tolist(), strict=True))
    return Fit(profile(unknowns[:count]), slowness)


def score(runs: Sequence[Run], predictions: Sequence[float]) -> Score:
    """Score predictions of measured runs, by size and by order."""
    timed = [(run, predicted) for run, predicted in zip(runs, predictions, strict=True) if run.seconds is not None]
    errors = [abs(predicted / run.seconds - 1) for run, predicted in timed if run.seconds]
    pairs = right = 0
    for index, (run, predicted) in enumerate(timed):
        for other, other_predicted in timed[:index]:
            if run.groups == other.groups and run.seconds != other.seconds:
                pairs += 1
                assert run.seconds is not None and other.seconds is not None
                right += (run.seconds - other.seconds) * (predicted - other_predicted) > 0
    return Score(len(timed), sum(errors) / len(errors) if errors else math.nan, pairs, right)


def cross_validate(runs: Sequence[Run]) -> list[tuple[str, list[Run], list[float]]]:
    """Predict each family, or each day of a family that has several, by a fit to all the others.

    Returns:
        For each: name, measured runs and predicted seconds.
    """
    timed = [run for run in runs if run.seconds is not None]
    found = []
    for name in sorted({run.groups[-1] for run in timed}):
        held = [run for run in timed if run.groups[-1] == name]
        fitted = fit([run for run in timed if run.groups[-1] != name])
        found.append((name, held, [fitted.predict(run) for run in held]))
    return found


def _allowed(name: str, value: float) -> float:
    """The nearest value that `Profile` accepts."""
    return min(value, 1.0) if name.endswith("efficiency") else max(value, 1.0) if name == "unaligned" else value
