"""Choose a layout: which layouts fit, how long a step takes, and why.

It tries every combination of tensor, pipeline and data parallelism, ZeRO stage, sequence parallelism, recomputation, micro-batch size, cut
into stages and placement of the axes, and prints the fastest that fit. Keys of the recipe may be changed as for pangu.train, such as
`train.sequence_length=512`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_ext.topology import Topology
from pangu.config import Config, load_config, parse_config
from pangu.config.layout import resolve
from pangu.config.parsing import parse_yaml
from pangu.config.presets import MODEL_PRESETS
from pangu.config.recipes import find_recipe
from pangu.config.sizes import num_parameters
from pangu.errors import InputError
from pangu.planner.hardware import Cluster, load_cluster
from pangu.planner.memory import ACCELERATOR, CPU, GIB
from pangu.planner.plan import Plan, workload_of
from pangu.planner.profile import Profile, load_profile
from pangu.planner.recipe import recipe, write_recipe
from pangu.planner.search import KEYS, Candidate, Outcome, Search, server_devices, smallest_cluster
from pangu.planner.tables import as_json, comparison_table, draw, in_words, left_out_table, plan_tables

PRECISIONS = ("bf16", "fp16", "fp32")
"""Precisions in order of preference: the first that the device has is used if it does not have the recipe's."""

EXAMPLE = Plan(Topology(tensor=8, pipeline=2, data=1), micro_batch_size=1, stage_layers=(2, 2))
"""A plan whose values have the types that --explain expects."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the search."""
    add_model_arguments(parser)
    parser.add_argument(
        "--cluster", required=True, type=Path, metavar="YAML", help="a file, or a name such as a100_80 (ds_configs/clusters)"
    )
    parser.add_argument("--devices", type=int, metavar="N", help="number of devices (default: all of the cluster)")
    parser.add_argument("--profile", type=Path, metavar="YAML", help="profile that `calibrate` measured or `validate` fitted")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="number of plans to show (default: %(default)s)")
    parser.add_argument("--explain", nargs="+", metavar="KEY=VALUE", help="explain why a plan with these values was not chosen")
    parser.add_argument("--write", type=Path, metavar="YAML", help="write the best plan (with --explain: the best of those) as a recipe")
    parser.add_argument("--chart", type=Path, metavar="PNG", help="draw all plans; needs matplotlib")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that select the model and the recipe."""
    parser.add_argument("--model", required=True, metavar="SIZE|YAML", help=f"{', '.join(MODEL_PRESETS)}, or a recipe of pangu.train")
    parser.add_argument("--global-batch-size", type=int, metavar="N", help="samples per step (default: the recipe's)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")


def run(arguments: argparse.Namespace) -> None:
    """Search and print.

    Raises:
        InputError: if an option or a file is refused, or no plan fits.
    """
    if arguments.top < 1:
        raise InputError(f"--top {arguments.top}: expected 1 or more.")
    base, overrides, search, profile = open_search(arguments, arguments.devices)
    cluster, workload = search.cluster, search.workload
    outcome = search.run()
    if not outcome.candidates:
        raise InputError(_nowhere(search, profile, outcome))
    best = chosen = outcome.candidates[0]
    if arguments.explain:
        wanted = _wanted(arguments.explain)
        found = search.explain(wanted)
        if found is None:
            reasons = "; ".join(f"{region}: {reason}" for region, reason in search.run(wanted).pruned)
            raise InputError(f"--explain {' '.join(arguments.explain)}: no plan has these values. {reasons or 'They exclude each other'}.")
        chosen = found
    path = arguments.write or Path("recipe.yaml")
    values = recipe(path, base, overrides, workload, chosen.plan)
    verdict = _verdict(search, best, chosen, values, path)
    facts = {
        "model": arguments.model,
        "parameters": num_parameters(workload.model),
        "cluster": cluster.name,
        "devices": cluster.num_devices,
        "precision": workload.precision,
        "sequence_length": workload.sequence_length,
        "global_batch_size": workload.global_batch_size,
    }
    if arguments.json:
        shown = {
            "plans": [as_json(workload, one) for one in outcome.candidates[: arguments.top]],
            "pareto": [as_json(workload, one) for one in outcome.pareto],
            "plans_that_fit": len(outcome.candidates),
            "left_out": [one._asdict() for one in outcome.pruned],
        }
        explained = {"explained": as_json(workload, chosen) | {"verdict": verdict}} if arguments.explain else {}
        print(json.dumps(facts | shown | explained))
    else:
        _print(facts, outcome, arguments.top)
        if arguments.explain:
            console = Console(soft_wrap=True, highlight=False)
            console.print(f"\n{in_words(chosen.plan)}\n{verdict}.\n", markup=False)
            console.print(comparison_table(best, chosen))
    if arguments.chart:
        draw(arguments.chart, outcome, arguments.top)
    if arguments.write:
        write_recipe(path, values, _remarks(facts, cluster, chosen), cluster.num_devices)


def open_search(arguments: argparse.Namespace, devices: int | None) -> tuple[Path, list[str], Search, Profile]:
    """Build from the options: the recipe with its overrides, the search for its plans, and the profile."""
    cluster = load_cluster(arguments.cluster)
    if devices is not None:
        cluster = cluster.with_devices(devices)
    base, overrides, config = _base_recipe(arguments, cluster)
    profile = load_profile(arguments.profile) if arguments.profile else Profile()
    platform = CPU if cluster.device.kind == "cpu" else ACCELERATOR
    return base, overrides, Search(workload_of(config), cluster, profile, platform), profile


def _base_recipe(arguments: argparse.Namespace, cluster: Cluster) -> tuple[Path, list[str], Config]:
    """The recipe that is planned, the changes to it, and what they make."""
    base = find_recipe(arguments.model)
    if not base.is_file():
        raise InputError(f"--model {arguments.model}: neither {', '.join(MODEL_PRESETS)} nor the file of a recipe.")
    overrides = list(arguments.overrides)
    if arguments.global_batch_size is not None:
        overrides.append(f"train.global_batch_size={arguments.global_batch_size}")
    config = load_config(base, overrides)
    has, named = cluster.device.peak_tflops, any(override.startswith("train.precision=") for override in overrides)
    if config.train.precision not in has and not named:
        overrides.append(f"train.precision={next(precision for precision in PRECISIONS if precision in has)}")
        config = load_config(base, overrides)
    return base, overrides, config


def _wanted(words: list[str]) -> dict[str, Any]:
    """Parse the values of --explain, by key."""
    wanted: dict[str, Any] = {}
    for word in words:
        key, _, text = word.partition("=")
        if key not in KEYS or not text:
            raise InputError(f"--explain {word}: KEY=VALUE is expected, with a key of {', '.join(KEYS)}.")
        wanted[key] = parse_yaml(text, f"--explain {word}")
        kind = type(KEYS[key](EXAMPLE))
        if type(wanted[key]) is not kind:
            raise InputError(f"--explain {word}: a value such as {KEYS[key](EXAMPLE)!r} is expected.")
    return wanted


def _verdict(search: Search, best: Candidate, chosen: Candidate, values: dict[str, Any], path: Path) -> str:
    """The reasons against a plan."""
    problems = []
    if search.share(chosen.memory) > 1.0:
        problems.append(f"does not fit: stage {chosen.stage} {search.need(chosen.memory)}")
    try:
        resolve(parse_config(values, path), search.cluster.num_devices)
    except InputError as error:
        problems.append(f"pangu.train refuses it: {str(error).rstrip('.')}")
    if problems:
        return "; ".join(problems)
    if chosen.plan == best.plan:
        return "is the best"
    return f"takes {chosen.time.total / best.time.total:.2f} times as long as the best: {in_words(best.plan)}"


def _nowhere(search: Search, profile: Profile, outcome: Outcome) -> str:
    """One line about why there is no plan and what would help."""
    device, workload = search.cluster.device.name, search.workload
    number = smallest_cluster(search, profile)
    return (
        f"{num_parameters(workload.model) / 1e9:.1f} billion parameters with a global batch of {workload.global_batch_size} have no plan "
        f"on {search.cluster.num_devices:,} x {device}. "
        + (
            f"The smallest cluster of them with a plan has {number:,} (--devices {number}). "
            if number
            else f"No number of {device} has one. "
        )
        + "; ".join(f"{region}: {reason}" for region, reason in outcome.pruned)
        + "."
    )


def _print(facts: dict[str, Any], outcome: Outcome, top: int) -> None:
    """Print the result as readable tables."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"{facts['model']}: {facts['parameters']:,} parameters on {facts['devices']:,} devices of {facts['cluster']}, "
        f"{facts['precision']}, a global batch of {facts['global_batch_size']:,} x {facts['sequence_length']:,} tokens; "
        f"{len(outcome.candidates):,} plans fit\n",
        markup=False,
    )
    tables = plan_tables(outcome.candidates[:top], "the fastest (t, p, d: tensor, pipeline, data parallel; mb: micro-batch)")
    if smaller := [one for one in outcome.pareto if one not in outcome.candidates[:top]]:
        tables += plan_tables(smaller[:top], "slower, but with less memory than every faster one")
    if outcome.pruned:
        tables.append(left_out_table(outcome))
    for table in tables:
        console.print(table)
        console.print()


def _remarks(facts: dict[str, Any], cluster: Cluster, chosen: Candidate) -> list[str]:
    """Comment lines at the head of the written recipe."""
    server = min(server_devices(cluster), cluster.num_devices)
    return [
        f"{facts['model']} on {facts['devices']} devices of {facts['cluster']}, made by tools/plan_parallel.py:",
        in_words(chosen.plan),
        f"predicted: {chosen.time.total:.3g} s per step, {chosen.memory.total / GIB:.1f} GiB per device",
        "",
        f"  torchrun --nnodes {cluster.num_devices // server} --nproc-per-node {server} ... -m pangu.train --config FILE",
    ]
