"""Formats the result of a search as tables, JSON and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from pangu.errors import InputError
from pangu.planner.memory import GIB, MemoryEstimate
from pangu.planner.plan import Plan, Workload
from pangu.planner.search import KEYS, Candidate, Outcome
from pangu.planner.time import StepTime


def as_json(workload: Workload, one: Candidate) -> dict[str, Any]:
    """A plan by configuration key, with its seconds by cause and the GiB of its fullest stage by kind."""
    return {
        **{key: value(one.plan) for key, value in KEYS.items()},
        "data_parallel_size": one.plan.layout.data,
        "micro_batches": one.plan.micro_batches(workload),
        "step_seconds": one.time.total,
        "tokens_per_second": workload.global_batch_size * workload.sequence_length / one.time.total,
        "seconds": seconds_by_cause(one.time),
        "fullest_stage": one.stage,
        "total_gib": one.memory.total / GIB,
        "gib": gib_by_kind(one.memory),
    }


def seconds_by_cause(time: StepTime) -> dict[str, float]:
    """Seconds of a step by cause; they sum to the time of the step."""
    return vars(time)


def gib_by_kind(memory: MemoryEstimate) -> dict[str, float]:
    """GiB that a rank holds, by kind, and the reserve. Activations and the update's temporaries are never in memory at the same time."""
    states = memory.states
    bytes_ = {
        "weights": states.weights,
        "gradients": states.gradients,
        "optimizer": states.optimizer,
        "buffers": states.buffers,
        "activations": memory.activations + memory.recomputed,
        "logits": memory.logits,
        "update": states.step,
        "reserve": memory.reserve,
    }
    return {kind: size / GIB for kind, size in bytes_.items()}


def in_words(plan: Plan) -> str:
    """A description of a plan in one line."""
    layout = plan.layout
    words = [f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}", f"micro-batch {plan.micro_batch_size}"]
    words += [f"ZeRO-{plan.zero_stage}{' offloaded' if plan.offload_optimizer else ''}", f"recompute {plan.recompute}"]
    words += ["sequence parallel"] * plan.sequence_parallel
    words += [f"order {layout.order}"] * (layout.pipeline > 1 and layout.data > 1)
    return ", ".join(words)


def plan_tables(candidates: Sequence[Candidate], title: str) -> list[Table]:
    """Tables with one row per plan: its settings; its seconds by cause; the GiB of its fullest stage by kind."""
    plans = _table(title, "", "t", "p", "d", "order", "layers", "ZeRO", "seq", "recompute", "mb", "step s", "GiB")
    for rank, one in enumerate(candidates, start=1):
        plan, layout = one.plan, one.plan.layout
        plans.add_row(
            *map(str, (rank, layout.tensor, layout.pipeline, layout.data)),
            layout.order if layout.pipeline > 1 and layout.data > 1 else "",
            layers_in_words(plan.stage_layers),
            f"{plan.zero_stage}{' off' if plan.offload_optimizer else ''}",
            "yes" if plan.sequence_parallel else "no",
            plan.recompute,
            str(plan.micro_batch_size),
            f"{one.time.total:.3g}",
            f"{one.memory.total / GIB:.1f}",
        )
    causes = [seconds_by_cause(one.time) for one in candidates]
    kinds = [gib_by_kind(one.memory) for one in candidates]
    return [plans, _split("seconds by cause", causes, "{:.2g}"), _split("GiB of the fullest stage by kind", kinds, "{:.1f}")]


def _split(title: str, parts: Sequence[dict[str, float]], form: str) -> Table:
    """A table with one row per plan and one column for each part that any of them has."""
    names = [name for name in parts[0] if any(one[name] >= 0.001 * sum(one.values()) for one in parts)]
    table = _table(title, "", *(name.replace("_", " ") for name in names))
    for rank, one in enumerate(parts, start=1):
        table.add_row(str(rank), *(form.format(one[name]) for name in names))
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("order", "layers", "ZeRO", "recompute") else "right", no_wrap=True)
    return table


def layers_in_words(stage_layers: Sequence[int]) -> str:
    """`15x4 3`: fifteen stages of four layers, then one of three."""
    runs: list[list[int]] = []
    for layers in stage_layers:
        if runs and runs[-1][1] == layers:
            runs[-1][0] += 1
        else:
            runs.append([1, layers])
    return " ".join(f"{count}x{layers}" if count > 1 else str(layers) for count, layers in runs)


def left_out_table(outcome: Outcome) -> Table:
    """A table of the layouts without a plan, and the reasons."""
    table = Table("left out", "because", box=None, pad_edge=False)
    for region, reason in outcome.pruned:
        table.add_row(region, reason)
    return table


def comparison_table(best: Candidate, other: Candidate) -> Table:
    """A table that compares a plan with the best one, in time by cause and memory by kind."""
    table = Table(box=None, pad_edge=False)
    for heading in ("", "this plan", "the best", "difference"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = [("seconds", {"step": one.time.total, **seconds_by_cause(one.time)}) for one in (other, best)]
    sizes = [("GiB", {"memory": one.memory.total / GIB, **gib_by_kind(one.memory)}) for one in (other, best)]
    for (unit, mine), (_, its) in (rows, sizes):
        for name in mine:
            if max(mine[name], its[name]) >= 0.005:
                difference = mine[name] - its[name]
                table.add_row(f"{name.replace('_', ' ')}, {unit}", f"{mine[name]:.2f}", f"{its[name]:.2f}", f"{difference:+.2f}")
        table.add_section()
    return table


def draw(path: Path, outcome: Outcome, num_bars: int) -> None:
    """Draw time against memory of every plan that fits, with the Pareto front, and the best plans' time by cause.

    Raises:
        InputError: if matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--chart needs matplotlib, part of the extra [monitor]: pip install matplotlib.") from None
    figure = Figure(figsize=(12, 5), layout="constrained")
    cloud, bars = figure.subplots(1, 2)
    for plans, draw_plans in ((outcome.candidates, cloud.scatter), (outcome.pareto, cloud.plot)):
        memory, time = [one.memory.total / GIB for one in plans], [one.time.total for one in plans]
        draw_plans(memory, time, **({"s": 6, "alpha": 0.4} if plans is outcome.candidates else {"color": "C1", "marker": "o"}))
    cloud.set(xlabel="GiB per device", ylabel="seconds per step", yscale="log", title=f"{len(outcome.candidates):,} plans that fit")
    best = outcome.candidates[:num_bars]
    places, below = range(1, len(best) + 1), [0.0] * len(best)
    for cause in seconds_by_cause(best[0].time):
        values = [seconds_by_cause(one.time)[cause] for one in best]
        bars.bar(places, values, bottom=below, label=cause.replace("_", " "))
        below = [low + value for low, value in zip(below, values, strict=True)]
    bars.set(xlabel="plan", ylabel="seconds per step", title="the best, by cause", xticks=places)
    figure.legend(fontsize="small", loc="outside right upper")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError(f"--chart {path}: cannot be written ({error}). Name a .png, .svg or .pdf file.") from None
