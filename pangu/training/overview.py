"""What a run will be, worked out before anything is allocated: the layout, parameters and memory of each rank."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from pangu.config import Config
from pangu.config.layout import RunLayout
from pangu.config.sizes import num_parameters, stage_parameters
from pangu.planner.memory import ACCELERATOR, MemoryEstimate, Platform, estimate_memory
from pangu.planner.plan import plan_of

GIB = 2**30


@dataclass(frozen=True)
class StageReport:
    """One pipeline stage, as each of its ranks sees it."""

    layers: int
    """Transformer layers, query layer included."""
    parameters: int
    """That a rank holds before ZeRO shards them: its tensor slice, and its copy of a tied weight."""
    memory: MemoryEstimate


def stage_reports(config: Config, layout: RunLayout, platform: Platform = ACCELERATOR) -> list[StageReport]:
    """Each stage by the planner's arithmetic: no module is built, no processes are needed."""
    workload, plan = plan_of(config, layout)
    parameters = stage_parameters(config.model, layout.topology.tensor, plan.stage_layers)
    return [
        StageReport(layers, parameters[stage].total, estimate_memory(workload, plan, stage, platform))
        for stage, layers in enumerate(plan.stage_layers)
    ]


def print_report(config: Config, layout: RunLayout, console: Console, platform: Platform = ACCELERATOR) -> None:
    """The configuration, the layout, and parameters and memory a rank."""
    console.print(config.to_yaml().rstrip(), markup=False)
    reports = stage_reports(config, layout, platform)
    topology, total = layout.topology, num_parameters(config.model)
    console.print(
        f"\nlayout: {topology.world_size} processes = tensor {topology.tensor} x pipeline {topology.pipeline} x data {topology.data}, "
        f"ZeRO-{config.parallel.zero_stage}, recompute {config.parallel.recompute}, "
        f"{layout.micro_batches} micro-batches of {config.train.micro_batch_size} a step",
        markup=False,
    )
    console.print(f"parameters: {total:,} in all", markup=False)
    console.print("each rank, by pipeline stage; memory in GiB, estimated:")
    console.print("  ".join(name.rjust(max(len(name), width)) for name, width in _COLUMNS))
    for stage, report in enumerate(reports):
        memory, states = report.memory, report.memory.states
        activations = memory.activations + memory.recomputed
        kinds = (
            states.weights,
            states.gradients,
            states.optimizer,
            states.buffers,
            activations,
            memory.logits,
            memory.peak,
            memory.reserve,
        )
        cells = [str(stage), str(report.layers), f"{report.parameters:,}", *(f"{value / GIB:.2f}" for value in (*kinds, states.host))]
        console.print("  ".join(cell.rjust(max(len(name), width)) for cell, (name, width) in zip(cells, _COLUMNS, strict=True)))


_COLUMNS = (
    ("stage", 5),
    ("layers", 6),
    ("parameters", 15),
    ("weights", 7),
    ("gradients", 7),
    ("optimizer", 7),
    ("buffers", 7),
    ("activations", 7),
    ("logits", 7),
    ("peak", 7),
    ("reserve", 7),
    ("on host", 7),
)
