"""Every plan that a cluster can run, judged by memory and time.

The space is small enough to look at all of it: what cannot run is left out with its reason, what does not fit with the memory it needs,
and the rest is sorted by predicted time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from megatron_ext.topology import Topology
from pangu.planner.hardware import Cluster
from pangu.planner.memory import GIB, MemoryEstimate, fullest_stage
from pangu.planner.plan import Plan, Recompute, Workload, partitions
from pangu.planner.profile import Profile
from pangu.planner.time import StepTime, predict

MAX_MICRO_BATCH = 64
"""Samples. No device gains from more, and all of them cost memory."""

Wanted = Mapping[str, Any]
"""Configuration keys and the values that plans must have, such as {"parallel.tensor": 8}. What is asked for is looked at even where a
search would leave it out by a rule of thumb."""


@dataclass(frozen=True)
class Candidate:
    """A plan that fits."""

    plan: Plan
    stage: int
    """The pipeline stage that needs most memory."""
    memory: MemoryEstimate
    """Of a rank of that stage."""
    time: StepTime


class Pruned(NamedTuple):
    """Plans that were left out together."""

    region: str
    reason: str
    plans: int
    """How many were looked at before; 0 where a rule excludes them all."""


@dataclass(frozen=True)
class Outcome:
    """What a search found."""

    candidates: list[Candidate]
    """Fastest first."""
    pruned: list[Pruned]

    @property
    def pareto(self) -> list[Candidate]:
        """Plans that need less memory than every faster one, fastest first."""
        front: list[Candidate] = []
        for candidate in self.candidates:
            if not front or candidate.memory.total < front[-1].memory.total:
                front.append(candidate)
        return front


def search(workload: Workload, cluster: Cluster, profile: Profile, wanted: Wanted | None = None) -> Outcome:
    """Look at every plan on all devices of a cluster.

    Args:
        workload: what is to be trained.
        cluster: where.
        profile: how fast its devices really are.
        wanted: look only at plans with these values.
    """
    wanted = wanted or {}
    pruned: list[Pruned] = []
    candidates: list[Candidate] = []
    budget = cluster.device.memory_gib.value * GIB
    for layout in _layouts(workload, cluster, wanted, pruned):
        before, looked_at, least = len(candidates), 0, math.inf
        for family in _families(workload, layout, wanted):
            for micro_batch in _micro_batches(workload, layout, wanted):
                plan = replace(family, micro_batch_size=micro_batch)
                stage, memory = fullest_stage(workload, plan)
                looked_at += 1
                least = min(least, memory.total)
                if memory.total > budget:
                    break  # a larger micro-batch needs more
                for placed in _placements(plan, wanted):
                    candidates.append(Candidate(placed, stage, memory, predict(workload, placed, cluster, profile)))
        if len(candidates) == before:
            reason = f"needs {least / GIB:.1f} GiB a device or more, of {budget / GIB:.0f}" if looked_at else "no batch divides"
            pruned.append(Pruned(_name(layout), reason, looked_at))
    candidates.sort(key=lambda one: (one.time.total, one.memory.total))
    return Outcome(candidates, pruned)


def smallest_cluster(workload: Workload, cluster: Cluster, limit: int = 2**17) -> int | None:
    """The least number of devices of this kind on which some plan fits: 2, 3, 4, 6, 8, 12 … , then whole servers. None: none does."""
    server = server_devices(cluster)
    for number in sorted({base * 2**power for base in (1, 3) for power in range(18)}):
        if number > limit or (number > server and number % server):
            continue
        larger = cluster.with_devices(number)
        budget = cluster.device.memory_gib.value * GIB
        for layout in _layouts(workload, larger, {}, []):
            for family in _families(workload, layout, {}):
                if fullest_stage(workload, replace(family, micro_batch_size=1))[1].total <= budget:
                    return number
    return None


def server_devices(cluster: Cluster) -> int:
    """Devices of one server; of the whole cluster where no level has that name."""
    return next((level.devices for level in cluster.levels if level.name == "server"), cluster.num_devices)


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [one for one in range(1, math.isqrt(number) + 1) if number % one == 0]
    return small + [number // one for one in reversed(small) if one * one != number]


def _layouts(workload: Workload, cluster: Cluster, wanted: Wanted, pruned: list[Pruned]) -> Iterator[Topology]:
    """Sizes of the axes that multiply to the number of devices."""
    model, devices, server = workload.model, cluster.num_devices, server_devices(cluster)
    common = math.gcd(model.num_heads, model.ffn_hidden_size)
    indivisible = []
    for tensor in _chosen("parallel.tensor", divisors(devices), wanted):
        if common % tensor:
            indivisible.append(tensor)
            continue
        if tensor > server and "parallel.tensor" not in wanted:
            pruned.append(Pruned(f"tensor {tensor}", f"would leave the server of {server} devices several times in every layer", 0))
            continue
        too_deep, ragged = [], []
        for pipeline in _chosen("parallel.pipeline", divisors(devices // tensor), wanted):
            data = devices // (tensor * pipeline)
            if pipeline > model.num_layers:
                too_deep.append(pipeline)
            elif workload.global_batch_size % data:
                ragged.append(f"{pipeline} (data {data})")
            else:
                yield Topology(tensor=tensor, pipeline=pipeline, data=data)
        if too_deep:
            pruned.append(Pruned(f"tensor {tensor}, pipeline {_some(too_deep)}", f"more stages than the {model.num_layers} layers", 0))
        if ragged:
            reason = f"the data-parallel size does not divide the global batch of {workload.global_batch_size}"
            pruned.append(Pruned(f"tensor {tensor}, pipeline {_some(ragged)}", reason, 0))
    if indivisible:
        reason = f"does not divide num_heads = {model.num_heads} and ffn_hidden_size = {model.ffn_hidden_size}"
        pruned.append(Pruned(f"tensor {_some(indivisible)}", reason, 0))


def _families(workload: Workload, layout: Topology, wanted: Wanted) -> Iterator[Plan]:
    """Plans of one sample a micro-batch that differ in what costs memory: ZeRO, sequence parallelism, recomputation, cut, offloading."""
    zero_stages = [1] if layout.pipeline > 1 else [1, 2, 3] if layout.data > 1 else [1]
    if layout.pipeline == 1 and workload.precision == "fp32":
        zero_stages = [0, *zero_stages]  # with 16 bits DeepSpeed clips wrongly without ZeRO, in a pipeline always
    splits_sequence = layout.tensor > 1 and workload.sequence_length % layout.tensor == 0
    # With fused attention, selective recomputation keeps what no recomputation keeps, and takes longer.
    recomputes: list[Recompute] = ["none", "selective", "full"] if workload.model.attention == "eager" else ["none", "full"]
    for zero_stage in _chosen("parallel.zero_stage", zero_stages, wanted):
        for sequence in _chosen("parallel.sequence", [False, True] if splits_sequence else [False], wanted):
            for recompute in _chosen("parallel.recompute", recomputes, wanted):
                for stage_layers in _chosen("parallel.stage_layers", partitions(workload.model, layout.pipeline), wanted):
                    for offload in _chosen("offload_optimizer", [False, True] if zero_stage else [False], wanted):
                        yield Plan(
                            layout=layout,
                            micro_batch_size=1,
                            stage_layers=tuple(stage_layers),
                            zero_stage=zero_stage,
                            sequence_parallel=sequence,
                            recompute=recompute,
                            offload_optimizer=offload,
                            offload_parameters=offload and zero_stage == 3,
                        )


def _micro_batches(workload: Workload, layout: Topology, wanted: Wanted) -> Sequence[int]:
    """Ascending sizes that divide a data-parallel rank's samples."""
    samples = workload.global_batch_size // layout.data
    usual = [2**power for power in range(7) if 2**power <= MAX_MICRO_BATCH]
    return [size for size in _chosen("train.micro_batch_size", usual, wanted) if samples % size == 0]


def _placements(plan: Plan, wanted: Wanted) -> Iterator[Plan]:
    """The plan with either axis nearer, where there are two."""
    both = plan.layout.pipeline > 1 and plan.layout.data > 1
    for order in _chosen("parallel.order", ["tp-dp-pp", "tp-pp-dp"] if both else ["tp-dp-pp"], wanted):
        yield plan if order == plan.order else replace(plan, order=order)


def _chosen(key: str, usual: list[Any], wanted: Wanted) -> list[Any]:
    return [wanted[key]] if key in wanted else usual


def _name(layout: Topology) -> str:
    return f"tensor {layout.tensor}, pipeline {layout.pipeline}, data {layout.data}"


def _some(values: Sequence[object]) -> str:
    shown = ", ".join(map(str, values[:6]))
    return shown if len(values) <= 6 else f"{shown} … {values[-1]}"
