"""What a configuration means on a number of processes: the layout, the batch arithmetic, and DeepSpeed's settings.

config = load_config("ds_configs/2.6B.yaml")
layout = resolve(config, world_size=16)     # once per run; refuses what cannot run, before any process communicates
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.errors import LayoutError
from megatron_ext.topology import Topology
from pangu.config.parsing import read_json
from pangu.config.presets import MODEL_PRESETS
from pangu.config.schema import Config, ModelConfig
from pangu.config.sizes import num_parameters
from pangu.config.stages import balanced_layers
from pangu.errors import InputError


@dataclass(frozen=True)
class RunLayout:
    """How a run is distributed over its processes: everything that follows from the configuration and the number of processes together."""

    topology: Topology
    """Sizes of the tensor-, pipeline- and data-parallel axes."""
    deepspeed: dict[str, Any]
    """The DeepSpeed JSON, completed from the configuration. Pass a copy of it to DeepSpeed."""
    micro_batches: int
    """Micro-batches that a data-parallel rank computes for one optimizer step."""
    stage_layers: tuple[int, ...]
    """Transformer layers of each pipeline stage, the query layer included."""


def resolve(config: Config, world_size: int) -> RunLayout:
    """Work out how a run is distributed over `world_size` processes. Needs no process group.

    Raises:
        InputError: if a key's value does not fit the others, the DeepSpeed JSON or the number of processes, or the combination would train
            with wrong numbers.
    """
    model, parallel, train = config.model, config.parallel, config.train
    for key, size in (("num_heads", model.num_heads), ("ffn_hidden_size", model.ffn_hidden_size)):
        if size % parallel.tensor:
            raise InputError(
                f"parallel.tensor = {parallel.tensor} does not divide model.{key} = {size}{_preset_note(model, key)}. "
                f"Choose {_alternatives(_common_divisors(model.num_heads, model.ffn_hidden_size))}."
            )
    if parallel.sequence and train.sequence_length % parallel.tensor:
        raise InputError(
            f"parallel.sequence splits a sequence over the tensor-parallel ranks, but parallel.tensor = {parallel.tensor} does not divide "
            f"train.sequence_length = {train.sequence_length}. Change the length, or set parallel.sequence=false."
        )
    if parallel.pipeline > model.num_layers:
        raise InputError(
            f"parallel.pipeline = {parallel.pipeline} is more stages than model.num_layers = {model.num_layers}"
            f"{_preset_note(model, 'num_layers')}. Choose {model.num_layers} or fewer."
        )
    if (counts := parallel.stage_layers) is not None:
        given = f"parallel.stage_layers = {counts}"
        if len(counts) != parallel.pipeline:
            raise InputError(f"{given} has {len(counts)} stages, but parallel.pipeline = {parallel.pipeline}. Make the two agree.")
        if sum(counts) != model.num_layers:
            raise InputError(
                f"{given} has {sum(counts)} layers, but model.num_layers = {model.num_layers}{_preset_note(model, 'num_layers')}. "
                "The query layer counts; make the two agree."
            )
    if parallel.pipeline > 1 and parallel.zero_stage != 1:
        reason = (
            "DeepSpeed without ZeRO leaves the later stages out of the gradient norm"
            if parallel.zero_stage == 0
            else "ZeRO-2 and ZeRO-3 shard what a pipeline accumulates over its micro-batches"
        )
        raise InputError(
            f"parallel.zero_stage = {parallel.zero_stage} does not work with parallel.pipeline = {parallel.pipeline}: {reason}. "
            "Set parallel.zero_stage=1, or parallel.pipeline=1."
        )
    if parallel.zero_stage == 0 and train.precision != "fp32":
        raise InputError(
            f"parallel.zero_stage = 0 does not work with train.precision = {train.precision}: DeepSpeed's 16-bit optimizer without ZeRO "
            "clips by each rank's own gradient norm. Set parallel.zero_stage=1, or train.precision=fp32."
        )
    try:
        topology = Topology.from_world_size(world_size, tensor=parallel.tensor, pipeline=parallel.pipeline, order=parallel.order)
    except LayoutError as error:
        raise InputError(f"{error} The sizes are parallel.tensor and parallel.pipeline.") from None
    deepspeed = _deepspeed_settings(config, topology)
    layers = tuple(parallel.stage_layers or balanced_layers(model, parallel.pipeline))
    return RunLayout(topology, deepspeed, deepspeed["gradient_accumulation_steps"], layers)


def _gradient_accumulation_steps(config: Config, layout: Topology) -> int:
    """Number of micro-batches that a data-parallel rank computes per optimizer step.

    Raises:
        InputError: if the global batch size is not a multiple of micro-batch size x data-parallel size.
    """
    micro_batch = config.train.micro_batch_size
    samples = micro_batch * layout.data
    if config.train.global_batch_size % samples:
        below = config.train.global_batch_size // samples * samples
        raise InputError(
            f"train.global_batch_size = {config.train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size x data-parallel size = {micro_batch} x {layout.data} = {samples} (data-parallel size = "
            f"{layout.world_size} processes / (tensor {layout.tensor} x pipeline {layout.pipeline})). "
            f"Choose {f'{below} or ' if below else ''}{below + samples}."
        )
    return config.train.global_batch_size // samples


def _deepspeed_settings(config: Config, layout: Topology) -> dict[str, Any]:
    """DeepSpeed's settings: the JSON that `deepspeed` names, completed from the configuration.

    Raises:
        InputError: if the JSON contradicts the configuration or names an optimizer or scheduler.
    """
    path, precision = config.deepspeed, config.train.precision
    result = read_json(path) if path else {}
    for section, ours in (("optimizer", "optimizer"), ("scheduler", "schedule")):
        if section in result:
            raise InputError(f"{path}: {section!r} is not DeepSpeed's to build here. Remove it; use the {ours!r} section of the YAML file.")

    def settle(key: str, value: Any, source: str) -> None:
        """Write `value` under a dotted key unless the JSON already says something else."""
        *parents, last = key.split(".")
        block = result
        for parent in parents:
            block = block.setdefault(parent, {})
            if not isinstance(block, dict):
                raise InputError(f"{path}: {parent} = {block!r}, but a block of settings in braces was expected.")
        if block.get(last, "auto") not in ("auto", value):
            raise InputError(f"{path}: {key} = {json.dumps(block[last])}, but {source}. Remove it from the JSON, or make the two agree.")
        block[last] = value

    train, parallel = config.train, config.parallel
    settle("train_batch_size", train.global_batch_size, f"train.global_batch_size = {train.global_batch_size}")
    settle("train_micro_batch_size_per_gpu", train.micro_batch_size, f"train.micro_batch_size = {train.micro_batch_size}")
    accumulation = _gradient_accumulation_steps(config, layout)
    settle("gradient_accumulation_steps", accumulation, f"train.global_batch_size and the layout give {accumulation}")
    settle("gradient_clipping", config.optimizer.grad_clip, f"optimizer.grad_clip = {config.optimizer.grad_clip}")
    for name in ("fp16", "bf16"):
        if name in result or name == precision:
            settle(f"{name}.enabled", name == precision, f"train.precision = {precision}")
    settle("zero_optimization.stage", parallel.zero_stage, f"parallel.zero_stage = {parallel.zero_stage}")
    if parallel.sequence and parallel.tensor > 1 and parallel.pipeline > 1:
        # By default DeepSpeed splits what stages exchange over the tensor group, assuming that it is replicated there. It is already split.
        for key in ("pipe_partitioned", "grad_partitioned"):
            settle(f"pipeline.{key}", False, "parallel.sequence = true splits what pipeline stages exchange already")
    _check_offload(result["zero_optimization"], path)

    if precision == "fp16":
        loss_scale = {"loss_scale": 0, "initial_scale_power": 32, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
        result["fp16"] = loss_scale | result["fp16"]
    result["zero_optimization"].setdefault("reduce_bucket_size", default_bucket_size(config.model))
    ours_where_unsaid = {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offloading works with any torch optimizer; DeepSpeed's own needs a compiler
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        # DeepSpeed compares tags by reducing uint8, which HCCL cannot; ours come from the step and cannot differ.
        "checkpoint": {"tag_validation": "Ignore"},
    }
    return ours_where_unsaid | result


def default_bucket_size(model: ModelConfig) -> int:
    """Number of gradient elements that DeepSpeed reduces at once.

    Its own default of 500,000,000 is more than most stages hold, and a single bucket cannot be reduced while the rest is computed.
    """
    return min(50_000_000, num_parameters(model))


def _preset_note(model: ModelConfig, key: str) -> str:
    """` (preset 2.6B)` for a message about a size that the user never wrote."""
    return f" (preset {model.preset})" if model.preset and MODEL_PRESETS[model.preset].get(key) == getattr(model, key) else ""


def _common_divisors(first: int, second: int) -> list[int]:
    common = math.gcd(first, second)
    return [number for number in range(1, common + 1) if common % number == 0]


def _alternatives(choices: list[int]) -> str:
    *rest, last = map(str, choices)
    return f"{', '.join(rest)} or {last}" if rest else last


def _check_offload(zero: dict[str, Any], path: Path | None) -> None:
    """Refuse offloading that the ZeRO stage does not support, which DeepSpeed would ignore."""
    for key, first_stage in (("offload_optimizer", 1), ("offload_param", 3)):
        if zero.get(key) and zero["stage"] < first_stage:
            raise InputError(f"{path}: zero_optimization.{key} needs parallel.zero_stage {first_stage} or more; it is {zero['stage']}.")
