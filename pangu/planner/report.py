"""What a search found, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from pangu.errors import InputError
from pangu.planner.memory import GIB
from pangu.planner.plan import Plan, Workload
from pangu.planner.search import Candidate, Outcome, keys


def as_json(workload: Workload, candidate: Candidate) -> dict[str, Any]:
    """A plan under the names of the configuration, with its time by cause in seconds and its memory by kind in GiB."""
    time = candidate.time
    return {
        **keys(candidate.plan),
        "data": candidate.plan.layout.data,
        "micro_batches": candidate.plan.micro_batches(workload),
        "step_seconds": time.total,
        "tokens_per_second": tokens(workload) / time.total,
        "seconds_by_cause": time.parts(),
        "memory_gib": {"stage": candidate.stage, "total": candidate.memory.total / GIB, **memory_parts(candidate)},
    }


def tokens(workload: Workload) -> int:
    """Tokens an optimizer step sees."""
    return workload.global_batch_size * workload.sequence_length


def memory_parts(candidate: Candidate) -> dict[str, float]:
    """GiB of a rank of the fullest stage by kind; they sum to the total."""
    return {kind: size / GIB for kind, size in candidate.memory.parts().items()}


def in_words(plan: Plan) -> str:
    """A plan in one line."""
    layout = plan.layout
    words = [f"tensor {layout.tensor}", f"pipeline {layout.pipeline}", f"data {layout.data}", f"micro-batch {plan.micro_batch_size}"]
    words += [f"ZeRO-{plan.zero_stage}" + (" offloaded" if plan.offload_optimizer else ""), f"recompute {plan.recompute}"]
    words += ["sequence parallel"] * plan.sequence_parallel
    words += [f"order {layout.order}"] * (layout.pipeline > 1 and layout.data > 1)
    return ", ".join(words)


def plans_table(workload: Workload, candidates: Sequence[Candidate], title: str) -> Table:
    """A row a plan: layout, seconds by cause, GiB by kind."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    for heading in ("", "tensor", "pipe", "data", "micro", "ZeRO", "seq", "recompute", "order", "layers a stage"):
        table.add_column(heading, justify="left" if heading in ("recompute", "order", "layers a stage") else "right", no_wrap=True)
    causes = [cause for cause in candidates[0].time.parts() if any(one.time.parts()[cause] >= 5e-4 * one.time.total for one in candidates)]
    kinds = [kind for kind in memory_parts(candidates[0]) if any(memory_parts(one)[kind] >= 0.005 for one in candidates)]
    for heading in ("step s", *causes, "GiB", *kinds):
        table.add_column(heading.replace("_", " "), justify="right")
    for rank, one in enumerate(candidates, start=1):
        plan, parts, memory = one.plan, one.time.parts(), memory_parts(one)
        table.add_row(
            str(rank),
            *map(str, (plan.layout.tensor, plan.layout.pipeline, plan.layout.data, plan.micro_batch_size)),
            f"{plan.zero_stage}{' off' if plan.offload_optimizer else ''}",
            "yes" if plan.sequence_parallel else "no",
            plan.recompute,
            plan.layout.order,
            layers_in_words(plan.stage_layers),
            seconds(one.time.total),
            *(seconds(parts[cause]) for cause in causes),
            f"{one.memory.total / GIB:.1f}",
            *(f"{memory[kind]:.1f}" for kind in kinds),
        )
    return table


def layers_in_words(stage_layers: Sequence[int]) -> str:
    """`5x4, 3`: five stages of four layers, then one of three."""
    runs: list[list[int]] = []
    for layers in stage_layers:
        if runs and runs[-1][1] == layers:
            runs[-1][0] += 1
        else:
            runs.append([1, layers])
    return ", ".join(f"{count}x{layers}" if count > 1 else str(layers) for count, layers in runs)


def seconds(value: float) -> str:
    """Three figures."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def pruned_table(outcome: Outcome) -> Table:
    """Where no plan was found, and why."""
    table = Table(title="left out", title_justify="left")
    table.add_column("plans")
    table.add_column("why")
    for one in outcome.pruned:
        table.add_row(one.region, one.reason)
    return table


def comparison(best: Candidate, other: Candidate) -> Table:
    """A plan beside the best one: where it loses time, and memory."""
    table = Table(title=f"{in_words(other.plan)}\nbeside the best: {in_words(best.plan)}", title_justify="left")
    for heading in ("", "this plan", "the best", "difference"):
        table.add_column(heading, justify="right" if heading else "left")
    ours, theirs = {"step": other.time.total, **other.time.parts()}, {"step": best.time.total, **best.time.parts()}
    for cause in ours:
        if max(ours[cause], theirs[cause]) > 0:
            difference = ours[cause] - theirs[cause]
            table.add_row(f"{cause.replace('_', ' ')}, s", seconds(ours[cause]), seconds(theirs[cause]), f"{difference:+.3g}")
    table.add_section()
    ours, theirs = {"memory": other.memory.total / GIB, **memory_parts(other)}, {"memory": best.memory.total / GIB, **memory_parts(best)}
    for kind in ours:
        if max(ours[kind], theirs[kind]) >= 0.005:
            difference = ours[kind] - theirs[kind]
            table.add_row(f"{kind.replace('_', ' ')}, GiB", f"{ours[kind]:.2f}", f"{theirs[kind]:.2f}", f"{difference:+.2f}")
    return table


def draw(path: Path, workload: Workload, outcome: Outcome, num_bars: int) -> None:
    """A picture: memory against time of all plans that fit, with the Pareto front, and the best ones' time by cause.

    Raises:
        InputError: if matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--chart needs matplotlib, part of the extra [monitor]: pip install matplotlib. Or leave it out.") from None
    figure = Figure(figsize=(12, 5), layout="constrained")
    cloud, bars = figure.subplots(1, 2)
    cloud.scatter([one.memory.total / GIB for one in outcome.candidates], [one.time.total for one in outcome.candidates], s=6, alpha=0.3)
    front = outcome.pareto
    cloud.step([one.memory.total / GIB for one in front], [one.time.total for one in front], where="post", color="C1", label="Pareto front")
    cloud.set(xlabel="GiB a device", ylabel="seconds a step", yscale="log", title=f"{len(outcome.candidates):,} plans that fit")
    cloud.legend()
    best = outcome.candidates[:num_bars]
    below = [0.0] * len(best)
    for cause in best[0].time.parts():
        values = [one.time.parts()[cause] for one in best]
        if max(values) > 0:
            bars.bar(range(1, len(best) + 1), values, bottom=below, label=cause.replace("_", " "))
            below = [low + value for low, value in zip(below, values, strict=True)]
    bars.set(xlabel="plan", ylabel="seconds a step", title="the best, by cause", xticks=range(1, len(best) + 1))
    bars.legend(fontsize="small")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError(f"--chart {path}: cannot be written ({error}). Name a .png, .svg or .pdf file.") from None
