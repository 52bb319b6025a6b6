"""What a layout costs on this machine: the same step by one process and by several, and by the engine and a bare PyTorch loop.

Each way to train is a set of processes that wait; they take turns, a step a turn, and each turn's time is compared with that of the first
way in the same turn. The losses are compared, so that all do the same work. Each process computes with the threads that its share of the
cores gives it. All keep freed memory, as pangu.train does; the bare loop is there twice, once with glibc's allocator as it comes.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from pangu.benchmarks import harness
from pangu.benchmarks.workers import Way, same_work, take_turns

COUNTS = {
    "layers": (4, "of the model, query layer included"),
    "hidden": (1024, "its width"),
    "heads": (16, "its attention heads"),
    "vocab": (8192, "its ids"),
    "sequence": (256, "tokens a sample"),
    "repeats": (5, "turns of each"),
    "cores": (2, "shared by the processes of a way"),
}


@dataclass(frozen=True)
class Layout:
    """A way to do the step of a comparison."""

    name: str
    processes: int = 1
    program: str = "engine"
    allocator: str = "kept"
    parallel: dict[str, int] = field(default_factory=dict)
    micro_batch: int = 2


@dataclass(frozen=True)
class Comparison:
    """Ways to do the same step; the first `peers` of them are what the others are measured by."""

    name: str
    layouts: tuple[Layout, ...]
    samples: int
    """Samples of a step."""
    peers: int = 1
    shorter: int = 1
    """Divides the sequence."""


COMPARISONS = (
    Comparison(
        "engine",
        (
            Layout("bare loop, same allocator", program="bare"),
            Layout("bare loop, default allocator", program="bare", allocator="default"),
            Layout("ZeRO-0", parallel={"zero_stage": 0}),
            Layout("ZeRO-1", parallel={"zero_stage": 1}),
        ),
        samples=2,
        peers=2,
    ),
    Comparison(
        "tensor",
        (Layout("one process", parallel={"zero_stage": 0}), Layout("tensor 2", 2, parallel={"zero_stage": 0, "tensor": 2})),
        samples=2,
    ),
    Comparison(
        "pipeline",
        (Layout("one process, 8 micro-batches"), Layout("pipeline 2, 8 micro-batches", 2, parallel={"pipeline": 2})),
        samples=16,
        shorter=2,
    ),
    Comparison("data", (Layout("one process", micro_batch=4), Layout("data 2, ZeRO-1", 2)), samples=4),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this task."""
    harness.add_counts(parser, COUNTS)
    names = [comparison.name for comparison in COMPARISONS]
    parser.add_argument("--only", choices=names, action="append", help="one comparison; may be given several times")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train in turns.

    Raises:
        InputError: if an option is impossible or a process ends early.
    """
    model = harness.check_counts(arguments, *COUNTS)
    ours: dict[str, Any] = {}
    peers: dict[str, Any] = {}
    all_ratios: dict[str, dict[str, list[float]]] = {}
    for comparison in COMPARISONS:
        if arguments.only and comparison.name not in arguments.only:
            continue
        ways = [_way(layout, comparison, arguments) for layout in comparison.layouts]
        courses = take_turns(ways, arguments.repeats, label=f"{comparison.name}, turn")
        same_work(courses, list(courses))
        seconds = {name: course.seconds for name, course in courses.items()}
        names = list(seconds)
        ours |= {f"step_seconds, {comparison.name}: {name}": statistics.median(seconds[name]) for name in names[comparison.peers :]}
        for peer in names[: comparison.peers]:
            title = f"{comparison.name}: {peer}"
            peers[title] = {"step_seconds": statistics.median(seconds[peer])}
            all_ratios[title] = {
                f"step_seconds, {comparison.name}: {name}": harness.quotients(seconds[peer], seconds[name])
                for name in names[comparison.peers :]
            }
    return {"model": model, "ours": ours, "peers": peers, **harness.paired(all_ratios)}


def _way(layout: Layout, comparison: Comparison, arguments: argparse.Namespace) -> Way:
    shape = vars(arguments) | {"sequence": max(1, arguments.sequence // comparison.shorter)}
    # Without dropout: ways draw different masks, and would have different losses.
    config = harness.run_settings(shape, comparison.samples, micro_batch=layout.micro_batch, **layout.parallel)
    threads = max(1, arguments.cores // layout.processes)
    return Way(layout.name, config, layout.program, layout.processes, threads, layout.allocator)


def table(result: dict[str, Any]) -> Table:
    """The result for people: a row for each pair."""
    model = result["model"]
    table = harness.new_table(
        f"{model['layers']} layers, hidden {model['hidden']}, vocabulary {model['vocab']}, sequence {model['sequence']}",
        f"{result['device']}; medians of {model['repeats']} paired steps",
        *("", "step s", "speed", "range"),
    )
    for peer, ratios in result["all_ratios"].items():
        table.add_row(peer, f"{result['peers'][peer]['step_seconds']:.3f}", "1", "")
        for metric, values in ratios.items():
            table.add_row(metric.removeprefix("step_seconds, "), f"{result['ours'][metric]:.3f}", *harness.times(values))
        table.add_section()
    return table
