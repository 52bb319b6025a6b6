"""What a run will be, worked out before anything is allocated: the layout, parameters and memory of each rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from megatron_ext.topology import Topology
from pangu.config import Config
from pangu.config.layout import RunLayout
from pangu.config.sizes import num_parameters, stage_parameters
from pangu.planner.memory import ACCELERATOR, MemoryEstimate, Platform, estimate_memory
from pangu.planner.plan import plan_of

MIB, GIB = 2**20, 2**30
MAP_ROWS = 8
"""Lines of the rank map's grid."""


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


def summary(config: Config, layout: RunLayout, reports: Sequence[StageReport]) -> list[str]:
    """Four lines about a run: parameters, layout, batch, and the memory of the ranks that need most."""
    model, train, topology = config.model, config.train, layout.topology
    stage, most = max(enumerate(reports), key=lambda item: item[1].memory.total)
    unit, size = memory_unit(most.memory.total)
    tensors = "" if most.memory.reserve else " of tensors"  # a CPU's process needs more: Python and its libraries
    where = f" at most (stage {stage})" if topology.pipeline > 1 else ""
    return [
        f"parameters: {num_parameters(model):,} in all; {model.num_layers} layers, hidden {model.hidden_size}, {model.num_heads} heads, "
        f"{train.precision}",
        f"layout: {topology.world_size} processes = tensor {topology.tensor} x pipeline {topology.pipeline} x data {topology.data}, "
        f"ZeRO-{config.parallel.zero_stage}",
        f"batch: {train.global_batch_size} samples of {train.sequence_length} tokens = {layout.micro_batches} "
        f"micro-batch{'es' if layout.micro_batches > 1 else ''} of "
        f"{train.micro_batch_size} x data {topology.data}",
        f"memory: {most.memory.total / size:.2f} {unit}{tensors} per rank{where}, estimated; recompute {config.parallel.recompute}",
    ]


def memory_unit(num_bytes: float) -> tuple[str, int]:
    """The unit that a number of bytes is best read in, and the bytes of one: MiB below a GiB, else GiB."""
    return ("GiB", GIB) if num_bytes >= GIB else ("MiB", MIB)


def rank_map(topology: Topology) -> str:
    """A grid that shows which global rank holds which pipeline stage (rows), data replica (columns) and tensor slice (order in a cell).

    At most 80 columns wide; where stages or replicas are too many to be shown, the last one follows after dots.
    """

    def cell(stage: int | None, replica: int | None) -> str:
        if stage is None or replica is None:
            return "..."
        first, last = (topology.rank(stage, replica, tensor) for tensor in (0, topology.tensor - 1))
        return str(first) if first == last else f"{first}-{last}"

    width = max(len(f"data {topology.data - 1}"), len(cell(topology.pipeline - 1, topology.data - 1))) + 2
    label = len(f"stage {topology.pipeline - 1}")
    replicas = _shown(topology.data, (80 - label) // width)
    slices = f"; a cell's ranks hold tensor slices 0 to {topology.tensor - 1}, in this order" if topology.tensor > 1 else ""
    lines = [f"rank map ({topology.order}){slices}"]
    lines.append(" " * label + "".join(("..." if data is None else f"data {data}").rjust(width) for data in replicas))
    for stage in _shown(topology.pipeline, MAP_ROWS):
        name = "..." if stage is None else f"stage {stage}"
        lines.append(name.ljust(label) + "".join(cell(stage, data).rjust(width) for data in replicas))
    return "\n".join(lines)


def _shown(number: int, room: int) -> list[int | None]:
    """The indices below `number` that have room: all of them, or the first, a gap (None) and the last."""
    return [*range(number)] if number <= room else [*range(room - 2), None, number - 1]


def print_report(config: Config, layout: RunLayout, console: Console, platform: Platform = ACCELERATOR) -> None:
    """The report of a dry run, at most 80 columns wide: summary, rank map, parameters and memory by stage."""
    reports = stage_reports(config, layout, platform)
    for line in summary(config, layout, reports):
        console.print(line, markup=False)
    console.print()
    if layout.topology.world_size > 1:
        console.print(rank_map(layout.topology), markup=False)
        console.print()
    unit, size = memory_unit(max(report.memory.peak for report in reports))  # the reserve alone is more than a GiB

    def shown(value: int) -> str:
        return f"{value / size:.{2 if value < 100 * size else 1 if value < 1000 * size else 0}f}"

    rows: list[tuple[str, ...]] = [_COLUMNS]
    for stage, report in enumerate(reports):
        memory, states = report.memory, report.memory.states
        kinds = (states.weights, states.gradients, states.optimizer, states.buffers, memory.activations + memory.recomputed)
        cells = map(shown, (*kinds, memory.logits, memory.peak, memory.total))
        rows.append((str(stage), str(report.layers), f"{report.parameters:,}", *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if hosts := [report.memory.states.host for report in reports if report.memory.states.host]:
        console.print(f"in host memory: {shown(max(hosts))} {unit} per rank{' at most' if len(set(hosts)) > 1 else ''}")
    console.print(f"each rank, by pipeline stage; memory in {unit}, estimated; total = peak + reserve:")
    for row in rows:
        console.print(" ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


_COLUMNS = ("stage", "layers", "parameters", "weights", "grads", "optim", "buffers", "activ", "logits", "peak", "total")
