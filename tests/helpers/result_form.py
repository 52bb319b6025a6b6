"""The form of a benchmark's result, as tools/benchmark.py describes it."""

from __future__ import annotations

import json
from typing import Any


def check_form(result: dict[str, Any]) -> None:
    """Hold that a result has the form {"ours": {metric: value}, "peers": {peer: {metric: value}}, "ratios": {peer: {metric: value}}}."""
    assert json.loads(json.dumps(result)) == result, "not what JSON can say"
    for metrics in (result["ours"], *result["peers"].values()):
        assert metrics
        for metric, value in metrics.items():
            values = value if metric.startswith("all_") else [value]
            assert values and all(type(one) in (int, float) for one in values), f"{metric}: {value}"
    assert result["ratios"].keys() <= result["peers"].keys()
    for peer, ratios in result["ratios"].items():
        assert ratios
        for metric, value in ratios.items():
            theirs = result["peers"][peer]
            assert type(value) is float and value > 0, f"{metric}: {value}"
            assert metric in result["ours"] and (metric in theirs or metric.partition(", ")[0] in theirs), metric
    for peer, ratios in result.get("all_ratios", {}).items():
        for metric, values in ratios.items():
            assert min(values) <= result["ratios"][peer][metric] <= max(values)
