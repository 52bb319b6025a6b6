"""The form of a result: which names its numbers have."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def of_ways(ways: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics of several ways to do a job side by side, each named `metric, way`."""
    return {f"{metric}, {way}": value for way, metrics in ways.items() for metric, value in metrics.items()}


def median_and_all(metric: str, values: Sequence[float]) -> dict[str, Any]:
    """A metric that was measured several times: its median, and `all_METRIC`."""
    return {metric: statistics.median(values), f"all_{metric}": list(values)}


def paired(all_ratios: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """`ratios` and `all_ratios` of turns: {peer: {metric: ratios, one a turn}}; the ratio is their median."""
    medians = {peer: {metric: statistics.median(values) for metric, values in metrics.items()} for peer, metrics in all_ratios.items()}
    return {"ratios": medians, "all_ratios": all_ratios}
