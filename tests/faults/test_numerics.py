"""Numbers gone wrong on one rank: no rank updates, all know it, and training goes on as if that step had not been."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import run_distributed
from layouts import random_batches, small_config, start

from megatron_ext.collectives import world_rank, world_size
from megatron_ext.sharding import canonical_parameters
from pangu.training.anomalies import fault_of
from pangu.training.engine import TrainingEngine

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one process, no ZeRO": (1, {"zero_stage": 0}, {}),
    "data 2, no ZeRO": (2, {"zero_stage": 0}, {}),
    "data 2, ZeRO-1": (2, {"zero_stage": 1}, {}),
    "data 2, ZeRO-2": (2, {"zero_stage": 2}, {}),
    "data 2, ZeRO-3": (2, {"zero_stage": 3}, {}),
    "tensor 2, no ZeRO": (2, {"tensor": 2, "zero_stage": 0}, {}),
    "tensor 2": (2, {"tensor": 2}, {}),
    "tensor 2, ZeRO-3, bf16": (2, {"tensor": 2, "zero_stage": 3}, {"precision": "bf16"}),
    "tensor 2, ZeRO-2, bf16": (2, {"tensor": 2, "zero_stage": 2}, {"precision": "bf16"}),
    "pipeline 2": (2, {"pipeline": 2}, {}),
    "tensor 2 x pipeline 2": (4, {"tensor": 2, "pipeline": 2}, {}),
    "tensor 2 x data 2, bf16": (4, {"tensor": 2}, {"precision": "bf16"}),
}


def state_of(engine: TrainingEngine) -> list[torch.Tensor]:
    """Copies of this rank's weights and optimizer states."""
    tensors = []
    for _, parameter in canonical_parameters(engine.module):
        with engine.whole(parameter) as whole:
            tensors.append(whole.clone())
    optimizer = engine.engine.optimizer
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        tensors += [value.clone() for _, value in sorted(state.items()) if isinstance(value, torch.Tensor)]
    return tensors


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def infinite_loss(engine: TrainingEngine) -> Callable[[], None]:
    """The loss of the last rank is infinite; its gradient is not."""
    import pangu.model.model
    import pangu.model.pipeline

    modules = (pangu.model.model, pangu.model.pipeline)
    intact = pangu.model.model.language_model_loss
    for module in modules:
        module.language_model_loss = lambda *args, **keywords: intact(*args, **keywords) + math.inf

    def undo() -> None:
        for module in modules:
            module.language_model_loss = intact

    return undo


def nan_in_gradient(name: str) -> Callable[[TrainingEngine], Callable[[], None]]:
    """The last rank's gradient of one parameter holds a NaN."""

    def inject(engine: TrainingEngine) -> Callable[[], None]:
        parameter = next(p for spec, p in canonical_parameters(engine.module) if spec.name.endswith(name))

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            gradient.view(-1)[0] = math.nan
            return gradient

        return parameter.register_hook(spoil).remove

    return inject


def nan_in_parameter(engine: TrainingEngine) -> Callable[[], None]:
    """One element of one of the last rank's parameters is NaN during the step."""
    parameter = list(canonical_parameters(engine.module))[-1][1]
    data = getattr(parameter, "ds_tensor", parameter.data)
    kept = data.view(-1)[0].clone()
    data.view(-1)[0] = math.nan

    def undo() -> None:
        getattr(parameter, "ds_tensor", parameter.data).view(-1)[0] = kept

    return undo


FAULTS = {
    2: infinite_loss,
    3: nan_in_gradient("mlp.c_fc.weight"),  # split over the tensor-parallel ranks
    5: nan_in_gradient("ln_1.weight"),  # whole on each
    7: nan_in_parameter,
}
"""By step."""
NUM_STEPS = 9


def train(parallel: dict[str, Any], section: dict[str, Any], *, leave_out: bool) -> list[str]:
    """Losses of the good steps as bits. The last rank has the faults; or their steps are left out."""
    engine = start(small_config(parallel=parallel, train=section))
    batches = random_batches(engine.config, engine.groups)
    reads = not engine.has_pipeline or engine.groups.coordinates.pipe in (0, engine.groups.topology.pipeline - 1)
    losses = []
    for step in range(NUM_STEPS):
        if step not in FAULTS:
            result = engine.train_step(batches, 1e-2)
            assert not result.skipped
            losses.append(result.loss.hex())
        elif leave_out:
            for _ in range(engine.micro_batches * reads):
                next(batches)
        else:
            before = state_of(engine)
            undo = FAULTS[step](engine) if world_rank() == world_size() - 1 else None
            result = engine.train_step(batches, 1e-2)
            if undo:
                undo()
            assert result.skipped and not result.overflow and fault_of(result, math.inf), step
            assert equal(before, state_of(engine)), step
    return losses


def with_faults(parallel: dict[str, Any], section: dict[str, Any]) -> list[str]:
    return train(parallel, section, leave_out=False)


def without(parallel: dict[str, Any], section: dict[str, Any]) -> list[str]:
    return train(parallel, section, leave_out=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_fault_reaches_the_weights(layout: str) -> None:
    world_size, parallel, section = LAYOUTS[layout]
    expected = run_distributed(without, world_size, parallel, section)
    assert run_distributed(with_faults, world_size, parallel, section) == expected
    assert all(losses == expected[0] for losses in expected)
