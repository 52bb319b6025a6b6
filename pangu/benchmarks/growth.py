"""How time and memory of a training step grow with the sizes of the model and the batch, next to what arithmetic expects.

Around one small shape, each size is doubled and doubled again while the others stay. Each shape is a process of its own that trains a few
steps as pangu.train does (ZeRO-0, fp32, no dropout). The arithmetic is that of the reports of a run: floating-point operations a token
(pangu.training.overview), and the memory that the planner estimates (pangu.planner.memory).

Time is compared as growth over the base shape. Of memory the growth itself is compared, in bytes: resident memory has the imports in it. A
ratio above 1 means that it grows less than the arithmetic says. With --chart it is drawn too; that needs matplotlib.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from pangu.benchmarks import harness
from pangu.benchmarks.harness import of_ways
from pangu.benchmarks.workers import Way, on_cpu, take_turns
from pangu.errors import InputError

BASE = {"sequence": 256, "batch": 4, "layers": 4, "hidden": 256, "vocab": 8192}
"""The sizes and their base."""
HEAD_SIZE = 64
PEER = "arithmetic"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this task."""
    harness.add_counts(parser, {name: (default, "of the base shape") for name, default in BASE.items()})
    harness.add_counts(parser, {"doublings": (2, "of each size"), "repeats": (5, "steps of each shape, after two")})
    harness.add_threads(parser)
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw it into a .png, .svg or .pdf")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps of each shape.

    Raises:
        InputError: if an option is impossible, a process ends early, or the chart cannot be written.
    """
    base = harness.check_counts(arguments, *BASE)
    harness.check_counts(arguments, "doublings", "repeats", "threads")
    if arguments.hidden % HEAD_SIZE:
        raise InputError(f"--hidden {arguments.hidden}: a multiple of {HEAD_SIZE} expected, the size of a head.")
    if arguments.chart:
        _figure()  # refused now and not after minutes
    shapes = {"base": base} | {
        f"{name} {base[name] * 2**power}": base | {name: base[name] * 2**power}
        for name in base
        for power in range(1, arguments.doublings + 1)
    }
    threads = arguments.threads or harness.cores()
    measured: dict[str, tuple[float, int]] = {}
    for name, shape in shapes.items():
        (course,) = take_turns([Way(name, settings(shape), threads=threads)], arguments.repeats).values()
        measured[name] = statistics.median(course.seconds), course.peak_bytes
    expected = {name: expect(shape) for name, shape in shapes.items()}
    ours, theirs = (_growth(side) for side in (measured, expected))
    for name in ours:
        theirs[name]["step_seconds"] *= measured["base"][0] / expected["base"][0]  # from operations
    ratios = {metric: value / max(of_ways(ours)[metric], 1e-9) for metric, value in of_ways(theirs).items()}
    result = {
        "model": {"base": base, "shapes": list(ours), "threads": threads, "repeats": arguments.repeats},
        "ours": {"step_seconds": measured["base"][0], "peak_bytes": measured["base"][1], **of_ways(ours)},
        "peers": {PEER: of_ways(theirs)},
        "ratios": {PEER: ratios},
    }
    if arguments.chart:
        draw(result, arguments.chart)
    return result


def settings(shape: dict[str, int]) -> dict[str, Any]:
    """A run of this shape."""
    heads = shape["hidden"] // HEAD_SIZE
    return harness.run_settings(shape | {"heads": heads}, shape["batch"], zero_stage=0)


def expect(shape: dict[str, int]) -> tuple[float, int]:
    """Operations of a step, and bytes that a process needs."""
    from pangu.config import Config
    from pangu.config.layout import resolve
    from pangu.config.sizes import flops_per_token
    from pangu.planner.memory import ACCELERATOR, CPU
    from pangu.training.overview import stage_reports

    config = Config.model_validate(settings(shape))
    (stage,) = stage_reports(config, resolve(config, 1), CPU if on_cpu() else ACCELERATOR)
    return flops_per_token(config.model, config.train.sequence_length) * shape["batch"] * shape["sequence"], stage.memory.peak


def _growth(side: dict[str, tuple[float, int]]) -> dict[str, dict[str, float]]:
    """Seconds, or what stands for them, and bytes over the base's, of each shape but the base."""
    base = side["base"][1]
    return {name: {"step_seconds": time, "added_bytes": peak - base} for name, (time, peak) in side.items() if name != "base"}


def exponent(result: dict[str, Any], name: str, side: dict[str, Any]) -> float:
    """p of "time grows with the size to the power of p", from the base to this shape."""
    size, _, value = name.partition(" ")
    return math.log(side[f"step_seconds, {name}"] / result["ours"]["step_seconds"]) / math.log(int(value) / result["model"]["base"][size])


def table(result: dict[str, Any]) -> Table:
    """The result for people: a row for each shape."""
    model, ours, theirs, ratios = result["model"], result["ours"], result["peers"][PEER], result["ratios"][PEER]
    table = harness.new_table(
        f"base: {', '.join(f'{name} {value}' for name, value in model['base'].items())}: "
        f"{ours['step_seconds']:.3f} s, {ours['peak_bytes'] / 1e6:,.0f} MB",
        f"{result['device']}; {model['threads']} threads; medians of {model['repeats']} steps",
        *("", "step s", "expected", "ratio", "n^", "expected", "MB more", "expected", "ratio"),
    )
    for name in model["shapes"]:
        table.add_row(
            name,
            f"{ours[f'step_seconds, {name}']:.3f}",
            f"{theirs[f'step_seconds, {name}']:.3f}",
            f"{ratios[f'step_seconds, {name}']:.2f}",
            f"{exponent(result, name, ours):.2f}",
            f"{exponent(result, name, theirs):.2f}",
            f"{ours[f'added_bytes, {name}'] / 1e6:,.0f}",
            f"{theirs[f'added_bytes, {name}'] / 1e6:,.0f}",
            f"{ratios[f'added_bytes, {name}']:.2f}",
        )
    return table


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--chart needs matplotlib, part of the extra [monitor]: pip install matplotlib.") from None
    return Figure(figsize=(11, 5), layout="constrained")


def draw(result: dict[str, Any], path: Path) -> None:
    """Growth of time and of memory over the factor by which a size grew; dashed is what arithmetic expects.

    Raises:
        InputError: if the file cannot be written, or its suffix says no format.
    """
    figure, model, ours = _figure(), result["model"], result["ours"]
    left, right = figure.subplots(1, 2)
    for size, first in model["base"].items():
        names = [name for name in model["shapes"] if name.startswith(f"{size} ")]
        factors = [int(name.split()[1]) / first for name in names]
        seconds = ours["step_seconds"]
        for axes, metric, base, unit in ((left, "step_seconds", seconds, seconds), (right, "added_bytes", 0, 1e6)):
            color = None
            for side, style in ((ours, "o-"), (result["peers"][PEER], "--")):
                values = [base / unit, *(side[f"{metric}, {name}"] / unit for name in names)]
                (line,) = axes.plot([1, *factors], values, style, color=color, label=size if color is None else None)
                color = line.get_color()
    left.set(xlabel="size over its base", ylabel="step time over its base", xscale="log", yscale="log")
    right.set(xlabel="size over its base", ylabel="MB more than the base", xscale="log")
    left.legend(title="dashed: arithmetic")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(f"--chart {path}: cannot be written ({error}). Name a .png, .svg or .pdf in a folder you may write to.") from None
