"""Searches all plans that a cluster can run, and rates them by memory and time.

The space is small enough to search exhaustively: plans that cannot run are left out with the reason, plans that do not fit with the memory
they need, and the others are sorted by predicted time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from megatron_ext.topology import Topology
from pangu.config.parsing import read_json
from pangu.config.stages import balance, balanced_layers
from pangu.planner.hardware import Cluster
from pangu.planner.memory import ACCELERATOR, GIB, MemoryEstimate, Platform, estimate_memory
from pangu.planner.plan import Plan, Recompute, Workload, bucket_elements
from pangu.planner.profile import Profile
from pangu.planner.recipe import deepspeed_json
from pangu.planner.time import StepTime, TimeModel

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Micro-batch sizes that are searched, in samples. No device gains from more, and larger ones need more memory."""

KEYS: dict[str, Callable[[Plan], Any]] = {
    "parallel.tensor": lambda plan: plan.layout.tensor,
    "parallel.pipeline": lambda plan: plan.layout.pipeline,
    "parallel.order": lambda plan: plan.layout.order,
    "parallel.stage_layers": lambda plan: list(plan.stage_layers),
    "parallel.zero_stage": lambda plan: plan.zero_stage,
    "parallel.sequence": lambda plan: plan.sequence_parallel,
    "parallel.recompute": lambda plan: plan.recompute,
    "train.micro_batch_size": lambda plan: plan.micro_batch_size,
    "offload_optimizer": lambda plan: plan.offload_optimizer,
}
"""The settings of a plan by configuration key; offloading is set in the DeepSpeed JSON."""

Wanted = Mapping[str, Any]
"""Values of `KEYS` that plans must have. Requested values are searched even if a rule of thumb would leave them out."""


@dataclass(frozen=True)
class Candidate:
    """A plan with its predicted time and memory."""

    plan: Plan
    stage: int
    """Index of the pipeline stage that needs most memory."""
    memory: MemoryEstimate
    """Memory of a rank of that stage."""
    time: StepTime


class Pruned(NamedTuple):
    """Plans that were left out together."""

    region: str
    reason: str


@dataclass(frozen=True)
class Outcome:
    """The result of a search."""

    candidates: list[Candidate]
    """The plans that fit, fastest first."""
    pruned: list[Pruned]

    @property
    def pareto(self) -> list[Candidate]:
        """Plans that need less memory than every faster one, fastest first."""
        front: list[Candidate] = []
        for candidate in self.candidates:
            if not front or candidate.memory.total < front[-1].memory.total:
                front.append(candidate)
        return front


class Search:
    """Searches plans for one workload on one kind of cluster.

    Args:
        workload: the training workload.
        cluster: the cluster.
        profile: the fraction of its rates that the software reaches.
        platform: what the implementation keeps in memory.

    Raises:
        InputError: if the device has no peak for the workload's precision.
    """

    def __init__(self, workload: Workload, cluster: Cluster, profile: Profile, platform: Platform = ACCELERATOR) -> None:
        self.workload, self.cluster, self.platform = workload, cluster, platform
        self.time = TimeModel(workload, cluster, profile)
        cases = [(stage, offload) for stage in range(4) for offload in (False, True) if stage or not offload]
        self._zero = {case: read_json(deepspeed_json(*case))["zero_optimization"] for case in cases}
        self.device_gib, self.host_gib = cluster.device.memory_gib.value, cluster.device.host_memory_gib.value

    def share(self, memory: MemoryEstimate) -> float:
        """Fraction of the device's or the host's memory that a rank needs, whichever is larger; the plan fits if it is at most 1."""
        return max(memory.total / (self.device_gib * GIB), memory.states.host / (self.host_gib * GIB))

    def need(self, memory: MemoryEstimate) -> str:
        """A message about the memory that a rank needs and what is available."""
        if memory.states.host / self.host_gib > memory.total / self.device_gib:
            return f"needs {memory.states.host / GIB:,.1f} GiB of host memory per device, of {self.host_gib:,.0f}"
        return f"needs {memory.total / GIB:,.1f} GiB per device, of {self.device_gib:,.0f}"

    def run(self, wanted: Wanted | None = None, limit: float = 1.0) -> Outcome:
        """Search all plans on all devices that have the values `wanted` and need at most the fraction `limit` of a rank's memory."""
        wanted = wanted or {}
        candidates: list[Candidate] = []
        pruned: list[Pruned] = []
        too_small: dict[int, list[tuple[Topology, MemoryEstimate]]] = {}
        for layout in self._layouts(wanted, pruned):
            found, smallest = len(candidates), []
            for family in self._families(layout, wanted):
                for offloaded in self._offloadings(family, wanted):
                    fitting: list[Candidate] = []
                    for micro_batch in self._micro_batches(layout, wanted):
                        plan = replace(offloaded, micro_batch_size=micro_batch)
                        stage, memory = self.fullest_stage(plan)
                        if self.share(memory) > limit:
                            smallest.append(memory)
                            break  # a larger micro-batch needs more
                        times = {self.time.step(placed): placed for placed in reversed(_placements(plan, wanted))}
                        fitting += [Candidate(placed, stage, memory, time) for time, placed in times.items()]
                    candidates += fitting
                    if fitting:
                        break  # offloading makes no plan faster
            if len(candidates) > found:
                continue
            if smallest:
                too_small.setdefault(layout.tensor, []).append((layout, min(smallest, key=self.share)))
            else:
                pruned.append(Pruned(_some_layouts(layout.tensor, [layout]), "the micro-batch does not divide a rank's samples"))
        for tensor, regions in too_small.items():
            layout, memory = min(regions, key=lambda region: self.share(region[1]))
            reason = f"{self.need(memory)} (pipeline {layout.pipeline})"
            pruned.append(Pruned(_some_layouts(tensor, [layout for layout, _ in regions]), reason))
        candidates.sort(key=lambda one: (one.time.total, one.memory.total))
        return Outcome(candidates, pruned)

    def explain(self, wanted: Wanted) -> Candidate | None:
        """The fastest plan with the values `wanted`; if none fits, the one that needs least memory; None if there is none at all."""
        if fitting := self.run(wanted).candidates:
            return fitting[0]
        return min(self.run(wanted, limit=math.inf).candidates, key=lambda one: self.share(one.memory), default=None)

    def fullest_stage(self, plan: Plan) -> tuple[int, MemoryEstimate]:
        """The pipeline stage that needs most memory, and how much a rank of it needs."""
        last = plan.layout.pipeline - 1
        # Of stages in the middle with equally many layers the earliest has most micro-batches in flight.
        middle = {layers: stage for stage, layers in reversed([*enumerate(plan.stage_layers)][1:last])}
        estimates = {stage: estimate_memory(self.workload, plan, stage, self.platform) for stage in {0, *middle.values(), last}}
        return max(estimates.items(), key=lambda item: (self.share(item[1]), item[1].total))

    def fits(self) -> bool:
        """Whether any plan fits."""
        return any(
            self.share(self.fullest_stage(plan)[1]) <= 1.0
            for layout in self._layouts({}, [])
            for family in self._families(layout, {})
            for plan in self._offloadings(family, {})
        )

    def _layouts(self, wanted: Wanted, pruned: list[Pruned]) -> Iterator[Topology]:
        """Sizes of the axes that multiply to the number of devices."""
        model, devices, batch = self.workload.model, self.cluster.num_devices, self.workload.global_batch_size
        server = server_devices(self.cluster)
        indivisible, too_wide = [], []
        for tensor in _chosen("parallel.tensor", divisors(devices), wanted):
            if devices % tensor or math.gcd(model.num_heads, model.ffn_hidden_size) % tensor:
                indivisible.append(tensor)
                continue
            if tensor > server and "parallel.tensor" not in wanted:
                too_wide.append(tensor)
                continue
            too_deep, ragged = [], []
            for pipeline in _chosen("parallel.pipeline", divisors(devices // tensor), wanted):
                data = devices // (tensor * pipeline)
                if pipeline > model.num_layers or pipeline * data * tensor != devices:
                    too_deep.append(pipeline)
                elif batch % data:
                    ragged.append(f"{pipeline} (data {data})")
                else:
                    yield Topology(tensor=tensor, pipeline=pipeline, data=data)
            if too_deep:
                pruned.append(Pruned(f"tensor {tensor}, pipeline {_some(too_deep)}", f"more stages than the {model.num_layers} layers"))
            if ragged:
                reason = f"the data-parallel size does not divide the global batch of {batch}"
                pruned.append(Pruned(f"tensor {tensor}, pipeline {_some(ragged)}", reason))
        if too_wide:
            reason = f"every layer would talk several times over the network: a server has {server} devices"
            pruned.append(Pruned(f"tensor {_some(too_wide)}", reason))
        if indivisible:
            reason = f"does not divide num_heads = {model.num_heads}, ffn_hidden_size = {model.ffn_hidden_size} or the {devices} devices"
            pruned.append(Pruned(f"tensor {_some(indivisible)}", reason))

    def _families(self, layout: Topology, wanted: Wanted) -> Iterator[Plan]:
        """Plans with micro-batches of one sample that differ in what affects memory: ZeRO, sequence parallelism, recomputation, cut,
        offloading."""
        workload = self.workload
        zero_stages = [1, 2, 3] if layout.pipeline == 1 and layout.data > 1 else [1]
        if layout.pipeline == 1 and workload.precision == "fp32":
            zero_stages = [0, *zero_stages]  # with 16 bits DeepSpeed clips wrongly without ZeRO, and in a pipeline always
        splits_sequence = layout.tensor > 1 and workload.sequence_length % layout.tensor == 0
        # With fused attention, selective recomputation keeps what no recomputation keeps, and takes longer.
        recomputes: list[Recompute] = ["none", "selective", "full"] if workload.model.attention == "eager" else ["none", "full"]
        for zero_stage in _chosen("parallel.zero_stage", zero_stages, wanted):
            for sequence in _chosen("parallel.sequence", [False, True] if splits_sequence else [False], wanted):
                for recompute in _chosen("parallel.recompute", recomputes, wanted):
                    whole = Plan(
                        layout,
                        micro_batch_size=1,
                        stage_layers=balanced_layers(workload.model, layout.pipeline),
                        zero_stage=zero_stage,
                        sequence_parallel=sequence,
                        recompute=recompute,
                    )
                    for stage_layers in _chosen("parallel.stage_layers", self._cuts(whole), wanted):
                        yield replace(whole, stage_layers=tuple(stage_layers))

    def _offloadings(self, plan: Plan, wanted: Wanted) -> Iterator[Plan]:
        """The plan without and with offloading of its optimizer states (under ZeRO-3 also the weights) to host memory."""
        for offload in _chosen("offload_optimizer", [False, True] if plan.zero_stage else [False], wanted):
            zero = self._zero[plan.zero_stage, offload]
            yield replace(
                plan,
                offload_optimizer=offload,
                offload_parameters=offload and plan.zero_stage == 3,
                bucket_elements=bucket_elements(zero, self.workload.model, plan.layout.pipeline),
            )

    def _cuts(self, plan: Plan) -> list[tuple[int, ...]]:
        """Cuts of the layers into stages of equal parameters, and of equal time."""
        costs = [round(1e9 * seconds) for seconds in self.time.layer_seconds(plan)]
        bounds = balance(costs, plan.layout.pipeline)
        by_time = tuple(end - begin for begin, end in pairwise(bounds))
        return [plan.stage_layers, *([by_time] if by_time != plan.stage_layers else [])]

    def _micro_batches(self, layout: Topology, wanted: Wanted) -> Sequence[int]:
        """Ascending sizes that divide a data-parallel rank's samples."""
        samples = self.workload.global_batch_size // layout.data
        return [size for size in _chosen("train.micro_batch_size", [*MICRO_BATCHES], wanted) if samples % size == 0]


def smallest_cluster(search: Search, profile: Profile, limit: int = 2**17) -> int | None:
    """The smallest number of devices on which some plan fits, out of 1, 2, 3, 4, 6, 8, 12 … and then whole servers; None if there is
    none."""
    server = server_devices(search.cluster)
    for number in sorted({base * 2**power for base in (1, 3) for power in range(18)}):
        if number <= limit and (number <= server or number % server == 0):
            cluster = search.cluster.with_devices(number)
            if Search(search.workload, cluster, profile, search.platform).fits():
                return number
    return None


def server_devices(cluster: Cluster) -> int:
    """Number of devices of one server, or of the whole cluster if it is smaller."""
    inside = [level.devices for level in cluster.levels if level.name in ("group", "server")]
    return inside[-1] if inside else 1


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [one for one in range(1, math.isqrt(number) + 1) if number % one == 0]
    return small + [number // one for one in reversed(small) if one * one != number]


def _placements(plan: Plan, wanted: Wanted) -> list[Plan]:
    """The plan with both orders of the data and pipeline axes, if both are larger than 1."""
    layout = plan.layout
    both = layout.pipeline > 1 and layout.data > 1
    orders = _chosen("parallel.order", ["tp-dp-pp", "tp-pp-dp"] if both else ["tp-dp-pp"], wanted)
    return [replace(plan, layout=replace(layout, order=order)) for order in orders]


def _some_layouts(tensor: int, layouts: Sequence[Topology]) -> str:
    return f"tensor {tensor}, pipeline {_some([layout.pipeline for layout in layouts])}"


def _chosen(key: str, usual: list[Any], wanted: Wanted) -> list[Any]:
    return [wanted[key]] if key in wanted else usual


def _some(values: Sequence[object]) -> str:
    shown = ", ".join(map(str, values[:6]))
    return shown if len(values) <= 6 else f"{shown} … {values[-1]}"
