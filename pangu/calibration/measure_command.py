"""Train some steps of plans that differ as much as possible, on this machine, and compare their times with the predictions.

The data are random tokens. The fastest of all plans that fit is chosen first, and then always the one that differs most from those chosen.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pangu.calibration.calibrate_command import CPU_CLUSTER
from pangu.calibration.trial import try_plan
from pangu.config import parse_config
from pangu.errors import InputError
from pangu.planner.plan import Plan
from pangu.planner.plan_command import add_model_arguments, open_search
from pangu.planner.recipe import recipe
from pangu.planner.search import Candidate
from pangu.planner.tables import in_words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `measure`."""
    add_model_arguments(parser)
    parser.add_argument("--cluster", type=Path, default=CPU_CLUSTER, metavar="YAML", help="this machine (default: cpu_gloo.yaml)")
    parser.add_argument("--processes", type=int, metavar="N", help="devices of this machine to use (default: all of the cluster)")
    parser.add_argument("--profile", type=Path, metavar="YAML", help="profile that `calibrate` measured (default: the built-in constants)")
    parser.add_argument("--plans", type=int, default=10, metavar="N", help="number of plans (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=5, metavar="N", help="measured steps per plan, after three warm-up steps (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Choose, train, print.

    Raises:
        InputError: an option or a file is refused, no plan fits, or a process fails.
    """
    if arguments.plans < 2 or arguments.steps < 1:
        raise InputError(f"--plans {arguments.plans} --steps {arguments.steps}: expected 2 or more plans and 1 or more steps.")
    base, overrides, search, _ = open_search(arguments, arguments.processes)
    cluster, workload = search.cluster, search.workload
    chosen = spread([one for one in search.run().candidates if not one.plan.offload_optimizer], arguments.plans)
    if len(chosen) < 2:
        raise InputError(f"{len(chosen)} plans fit on {cluster.num_devices} x {cluster.device.name}: there is nothing to compare.")
    measured = []
    for one in chosen:
        path = Path("recipe.yaml")  # never written
        values = recipe(path, base, overrides, workload, one.plan)
        measured.append(try_plan(parse_config(values, path), cluster.num_devices, arguments.steps))
        print(f"{len(measured)} of {len(chosen)}: {in_words(one.plan)}: {measured[-1]:.3f} s", file=sys.stderr, flush=True)
    predicted = [one.time.total for one in chosen]
    correlation = rank_correlation(predicted, measured)
    if arguments.json:
        rows = [
            {"plan": in_words(one.plan), "predicted_step_seconds": one.time.total, "measured_step_seconds": seconds}
            for one, seconds in zip(chosen, measured, strict=True)
        ]
        print(json.dumps({"plans": rows, "rank_correlation": correlation}))
        return
    table = Table("plan", "predicted s", "measured s", box=None)
    for one, seconds in sorted(zip(chosen, measured, strict=True), key=lambda pair: pair[1]):
        table.add_row(in_words(one.plan), f"{one.time.total:.3f}", f"{seconds:.3f}")
    Console(soft_wrap=True, highlight=False).print(table)
    print(f"rank correlation (Spearman) {correlation:.2f}")


def spread(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """The first candidate, and then repeatedly the one farthest from all chosen ones; among equally far ones the fastest."""
    taken = [*candidates[:1]]
    distances = [math.inf] * len(candidates)
    while len(taken) < min(count, len(candidates)):
        distances = [min(known, _distance(one.plan, taken[-1].plan)) for known, one in zip(distances, candidates, strict=True)]
        taken.append(candidates[distances.index(max(distances))])
    return taken


def _distance(one: Plan, other: Plan) -> float:
    """Distance between two plans: the number of settings that differ; sizes count by the difference of their logarithms."""

    def apart(a: int, b: int) -> float:
        return abs(math.log2(a / b))

    return (
        apart(one.layout.tensor, other.layout.tensor)
        + apart(one.layout.pipeline, other.layout.pipeline)
        + 0.5 * apart(one.micro_batch_size, other.micro_batch_size)
        + 0.5 * abs(one.zero_stage - other.zero_stage)
        + (one.recompute != other.recompute)
        + (one.sequence_parallel != other.sequence_parallel)
    )


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation of two sequences of equal length."""
    places = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(places[0], places[1])[0, 1])
