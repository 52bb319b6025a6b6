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

from pangu.benchmarks.results import paired
from pangu.benchmarks.workers import Way, same_work, take_turns
from pangu.errors import InputError

COUNTS = {"layers": 4, "hidden": 1024, "heads": 16, "vocab": 8192, "sequence": 256, "repeats": 5, "cores": 2}
"""Whole-number options and their defaults."""


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
    for name, default in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"(default {default})")
    names = [comparison.name for comparison in COMPARISONS]
    parser.add_argument("--only", choices=names, action="append", help="one comparison; may be given several times")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train in turns.

    Raises:
        InputError: if an option is impossible or a process ends early.
    """
    for name in COUNTS:
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} {getattr(arguments, name)}: expected 1 or more.")
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
                f"step_seconds, {comparison.name}: {name}": [theirs / own for theirs, own in zip(seconds[peer], seconds[name], strict=True)]
                for name in names[comparison.peers :]
            }
    return {"model": {name: getattr(arguments, name) for name in COUNTS}, "ours": ours, "peers": peers, **paired(all_ratios)}


def _way(layout: Layout, comparison: Comparison, arguments: argparse.Namespace) -> Way:
    config = {
        "model": {
            "num_layers": arguments.layers,
            "hidden_size": arguments.hidden,
            "num_heads": arguments.heads,
            "vocab_size": arguments.vocab,
            "max_positions": max(1, arguments.sequence // comparison.shorter),
            "hidden_dropout": 0.0,  # ways draw different masks, and would have different losses
            "attention_dropout": 0.0,
        },
        "parallel": layout.parallel,
        "train": {"micro_batch_size": layout.micro_batch, "global_batch_size": comparison.samples, "steps": 1000},
        "data": {"train": ["synthetic"]},
        "run": {"dir": "unused"},
    }
    threads = max(1, arguments.cores // layout.processes)
    return Way(layout.name, config, layout.program, layout.processes, threads, layout.allocator)


def table(result: dict[str, Any]) -> Table:
    """The result for people: a row for each pair."""
    model = result["model"]
    table = Table(
        title=f"{model['layers']} layers, hidden {model['hidden']}, vocabulary {model['vocab']}, sequence {model['sequence']}",
        caption=f"{result['device']}; medians of {model['repeats']} paired steps",
    )
    for heading in ("", "step s", "speed", "range"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for peer, ratios in result["all_ratios"].items():
        table.add_row(peer, f"{result['peers'][peer]['step_seconds']:.3f}", "1", "")
        for metric, values in ratios.items():
            row = f"{statistics.median(values):.2f}x", f"{min(values):.2f} .. {max(values):.2f}"
            table.add_row(metric.removeprefix("step_seconds, "), f"{result['ours'][metric]:.3f}", *row)
        table.add_section()
    return table
