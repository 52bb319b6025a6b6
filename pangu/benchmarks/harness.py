"""What the benchmarks share: options, a folder to work in, sides that take turns, results and tables."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from pangu.errors import InputError

Counts = Mapping[str, tuple[int, str]]
"""Options that are whole numbers of 1 or more, by name: the default, and what it counts."""


def add_counts(parser: argparse.ArgumentParser, counts: Counts) -> None:
    """Options that are whole numbers."""
    for name, (default, meaning) in counts.items():
        parser.add_argument(_option(name), type=int, default=default, metavar="N", help=f"{meaning} (default: %(default)s)")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """`--threads`."""
    parser.add_argument("--threads", type=int, metavar="N", help="default: one a core that this process may use")


def add_workdir(parser: argparse.ArgumentParser, purpose: str) -> None:
    """`--workdir`, for `working_folder`."""
    parser.add_argument("--workdir", type=Path, default=Path(), metavar="DIR", help=f"{purpose} (default: this directory)")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_counts(arguments: argparse.Namespace, *names: str) -> dict[str, int]:
    """The values of options that are whole numbers; one that is not given may be None.

    Raises:
        InputError: if one is less than 1.
    """
    values = {name: getattr(arguments, name) for name in names}
    for name, value in values.items():
        if value is not None and value < 1:
            raise InputError(f"{_option(name)} {value}: expected 1 or more.")
    return values


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def model_settings(shape: Mapping[str, Any], dropout: float = 0.0) -> dict[str, Any]:
    """The `model` section of a run, from options: layers, hidden, heads, vocab and sequence."""
    return {
        "num_layers": shape["layers"],
        "hidden_size": shape["hidden"],
        "num_heads": shape["heads"],
        "vocab_size": shape["vocab"],
        "max_positions": shape["sequence"],
        "hidden_dropout": dropout,
        "attention_dropout": dropout,
    }


def run_settings(
    shape: Mapping[str, Any], batch: int, *, micro_batch: int | None = None, dropout: float = 0.0, **parallel: int
) -> dict[str, Any]:
    """A run as pangu.train would be told it, on batches of `batch` random samples that never lie on a disk."""
    return {
        "model": model_settings(shape, dropout),
        "parallel": parallel,
        "train": {"micro_batch_size": micro_batch or batch, "global_batch_size": batch, "steps": 1000},
        "data": {"train": ["synthetic"]},
        "run": {"dir": "unused"},
    }


@contextmanager
def working_folder(arguments: argparse.Namespace) -> Iterator[Path]:
    """A new folder in `--workdir`, removed afterwards whatever happens.

    Raises:
        InputError: if that directory does not exist.
    """
    if not arguments.workdir.is_dir():
        raise InputError(f"--workdir {arguments.workdir}: no such directory. Name one that exists.")
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=arguments.workdir) as name:
        yield Path(name)


def say(line: str) -> None:
    """Tell what is being done, on standard error."""
    print(line, file=sys.stderr, flush=True)


def take_turns(
    sides: Mapping[str, Callable[[], float]], repeats: int, *, warm_up: int = 0, label: str = "turn", unit: str = "s"
) -> dict[str, list[float]]:
    """Let each side do its work once a turn; every other turn goes backwards.

    Args:
        sides: what to call, by name; it returns what it measured.
        repeats: turns that count.
        warm_up: turns before them that do not.
        label: what a turn is called in the lines that tell of it.
        unit: of what is measured.

    Returns:
        The values of each side, one a turn that counts.
    """
    values: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warm_up + repeats):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            value = sides[name]()
            if turn >= warm_up:
                values[name].append(value)
                say(f"{label} {turn - warm_up + 1} of {repeats}: {name} {value:,.{3 if value < 100 else 0}f} {unit}")
    return values


def of_ways(ways: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics of several ways to do a job side by side, each named `metric, way`."""
    return {f"{metric}, {way}": value for way, metrics in ways.items() for metric, value in metrics.items()}


def way_of(metrics: Mapping[str, Any], way: str) -> dict[str, Any]:
    """The metrics of one of several ways, under their own names."""
    return {name.removesuffix(f", {way}"): value for name, value in metrics.items() if name.endswith(f", {way}")}


def median_and_all(metric: str, values: Sequence[float]) -> dict[str, Any]:
    """A metric that was measured several times: its median, and `all_METRIC`."""
    return {metric: statistics.median(values), f"all_{metric}": list(values)}


def quotients(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Each value over the other of the same turn."""
    return [value / other for value, other in zip(values, others, strict=True)]


def paired(all_ratios: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """`ratios` and `all_ratios` of turns: {peer: {metric: ratios, one a turn}}; the ratio is their median."""
    medians = {peer: {metric: statistics.median(values) for metric, values in metrics.items()} for peer, metrics in all_ratios.items()}
    return {"ratios": medians, "all_ratios": all_ratios}


def new_table(title: str, caption: str, *headings: str, no_wrap: bool = True) -> Table:
    """A table whose first column names the row and whose others are numbers."""
    table = Table(title=title, caption=caption)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=no_wrap)
    return table


def span(values: Sequence[float], form: str, unit: float = 1) -> str:
    """The least and the greatest of what was measured."""
    return f"{min(values) / unit:{form}} .. {max(values) / unit:{form}}"


def times(ratios: Sequence[float]) -> tuple[str, str]:
    """Two cells: how many times as good, and the span of it; empty where nothing was compared."""
    return (f"{statistics.median(ratios):.2f}x", span(ratios, ".2f")) if ratios else ("", "")


def speed_table(result: Mapping[str, Any], title: str, caption: str, metric: str, heading: str, form: str, unit: float = 1) -> Table:
    """A speed of each way and of the one peer, and how many times as fast as the peer ours are: a row for each."""
    table = new_table(title, caption, "", heading, "range", "speed-up", "range")
    for peer, metrics in {"": result["ours"], **result["peers"]}.items():
        for name in (name for name in metrics if name.startswith(metric)):
            label = ", ".join(filter(None, [peer, name.removeprefix(metric).removeprefix(", ")])) or "ours"
            ratios = [] if peer else next(iter(result["all_ratios"].values()))[name]
            table.add_row(label, f"{metrics[name] / unit:{form}}", span(metrics[f"all_{name}"], form, unit), *times(ratios))
    return table
