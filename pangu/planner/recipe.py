"""Writes a plan as a recipe that `pangu.train` runs unchanged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from pangu.config import parse_config
from pangu.config.layout import resolve
from pangu.config.parsing import apply_override, read_yaml
from pangu.config.recipes import RECIPES
from pangu.config.stages import balanced_layers
from pangu.errors import InputError
from pangu.files import write_durably
from pangu.planner.plan import Plan, Workload


def deepspeed_json(zero_stage: int, offload: bool) -> Path:
    """Path of the DeepSpeed JSON for a plan."""
    return RECIPES / f"zero{zero_stage}{'-offload' if offload else ''}.json"


def recipe(path: Path, base: Path, overrides: list[str], workload: Workload, plan: Plan) -> dict[str, Any]:
    """The sections of a recipe with a plan's layout.

    Args:
        path: path of the new recipe, to which `deepspeed` is relative.
        base: the recipe with everything except the layout: model, data, optimizer, schedule.
        overrides: `section.key=value` overrides of the base recipe.
        workload: batch size and precision.
        plan: the layout.
    """
    values = read_yaml(base)
    for override in overrides:
        apply_override(values, override)
    parallel: dict[str, Any] = {
        "tensor": plan.layout.tensor,
        "pipeline": plan.layout.pipeline,
        "order": plan.layout.order,
        "sequence": plan.sequence_parallel,
        "zero_stage": plan.zero_stage,
        "recompute": plan.recompute,
    }
    if plan.stage_layers != balanced_layers(workload.model, plan.layout.pipeline):
        parallel["stage_layers"] = [*plan.stage_layers]
    train = {
        "micro_batch_size": plan.micro_batch_size,
        "global_batch_size": workload.global_batch_size,
        "precision": workload.precision,
    }
    deepspeed = os.path.relpath(deepspeed_json(plan.zero_stage, plan.offload_optimizer), path.parent.resolve())
    return {**values, "parallel": parallel, "train": {**(values.get("train") or {}), **train}, "deepspeed": deepspeed}


def write_recipe(path: Path, values: dict[str, Any], remarks: list[str], world_size: int) -> None:
    """Write the sections of a recipe below comment lines; the file appears complete or not at all.

    Raises:
        InputError: if `pangu.train` would refuse the recipe on `world_size` processes, or the file cannot be written.
    """
    resolve(parse_config(values, path), world_size)
    comment = "".join(f"# {remark}".rstrip() + "\n" for remark in remarks)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, f"{comment}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}). Name another file.") from None
