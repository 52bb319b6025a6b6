"""Checks that the tensors and numbers of a run that must be equal on several ranks are equal."""

from __future__ import annotations

from collections import Counter
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ext import accelerator
from megatron_ext.collectives import all_gather_objects
from megatron_ext.sharding import ShardSpec, canonical_parameters
from megatron_ext.supervision.replicas import Replica, find_differences, parameter_replicas
from pangu.engine.engine import TrainingEngine
from pangu.errors import InputError


class Counts(Protocol):
    """The progress of a run."""

    step: int
    """Number of optimizer steps taken."""
    consumed_samples: int


class ReplicaCheck:
    """Compares the replicas that an engine's ranks hold. Every rank creates one.

    Compared, bit for bit: weights over the data-parallel ranks, weights that are not split over the tensor-parallel ranks, the tied
    embedding over first and last stage, without ZeRO also the optimizer's states; the default random stream over the tensor-parallel
    ranks; the counts of steps and samples and the loss scale over all. ZeRO keeps the rest (optimizer states, stage 3's weights but small
    ones) once over the data-parallel ranks: there is nothing to compare it with. What tensor-parallel ranks all hold of stage 3's shards
    is compared.
    """

    def __init__(self, engine: TrainingEngine) -> None:
        self._engine = engine
        # A rank's own names are distinct; over ranks of one data and tensor coordinate, a name that counts twice has two stages.
        groups, place = engine.groups, engine.groups.coordinates
        names = [spec.name for spec, _ in canonical_parameters(engine.module)] if place.data == place.tensor == 0 else []
        held = Counter(name for of_rank in all_gather_objects(names, groups.world) for name in of_rank)
        self._shared = [name for name, stages in held.items() if stages > 1]

    def __call__(self, progress: Counts) -> None:
        """Compare all replicas. Every rank must call this at the same step.

        Raises:
            InputError: on every rank, naming each replica that differs, its ranks and the largest difference.
        """
        engine = self._engine
        found = find_differences(self._replicas(progress), engine.groups.world, accelerator.device())
        if found:
            raise InputError(
                f"replicas differ at step {progress.step}: {'; '.join(found)}. A device or its memory may be faulty: test those of the "
                "ranks named, then start again from the last checkpoint."
            )

    def _replicas(self, progress: Counts) -> list[Replica]:
        engine, groups = self._engine, self._engine.groups
        parameters = list(canonical_parameters(engine.module))
        if engine.config.parallel.zero_stage == 3:
            compared = _of_stage_3(parameters, engine)
        else:
            compared = parameter_replicas([(spec, parameter) for spec, parameter in parameters], groups, self._shared)
        if engine.config.parallel.zero_stage == 0:
            for spec, parameter in parameters:
                state = engine.engine.optimizer.state.get(parameter, {})
                for name in sorted(state):
                    if isinstance(state[name], Tensor):
                        compared.append(Replica(f"{spec.name} ({name})", groups.data, state[name]))
        counts = {
            "the number of steps": progress.step,
            "the number of consumed samples": progress.consumed_samples,
            "DeepSpeed's number of steps": engine.engine.global_steps,
            "DeepSpeed's number of skipped steps": engine.engine.skipped_steps,
        }
        numbers = {name: torch.tensor(value) for name, value in counts.items()}
        numbers["the loss scale"] = torch.tensor(float(getattr(engine.engine.optimizer, "loss_scale", 1.0)))
        return [
            *compared,
            Replica("the default random stream", groups.tensor, accelerator.get_rng_state()),
            *(Replica(name, groups.world, value) for name, value in numbers.items()),
        ]


def _of_stage_3(parameters: list[tuple[ShardSpec, Any]], engine: TrainingEngine) -> list[Replica]:
    """Shards of parameters that all tensor-parallel ranks hold, and the small parameters that stage 3 keeps whole on every data rank."""
    groups = engine.groups
    whole = [(spec, parameter.data) for spec, parameter in parameters if parameter.ds_persist and parameter.ds_status.name == "AVAILABLE"]
    shards = [
        (spec, parameter.ds_tensor)
        for spec, parameter in parameters
        if spec.split_dim is None and parameter.ds_tensor.status.name == "AVAILABLE"
    ]
    return [
        *(Replica(spec.name, groups.data, tensor) for spec, tensor in whole),
        *(Replica(f"{spec.name} (shard)", groups.tensor, tensor) for spec, tensor in shards),
    ]
