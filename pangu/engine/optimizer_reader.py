"""Reads the optimizer states of this project's training checkpoints, by canonical name, whatever layout and ZeRO stage saved them.

    mp_rank_TT_model_states.pt                            no ZeRO: each parameter's states, parameters that decay first
    [bf16_]zero_pp_rank_D_mp_rank_RR_optim_states.pt      ZeRO: data rank D's part of the states of model rank RR = stage x T + tensor rank

ZeRO-1 and 2 cut a group's flat buffer into D parts, so that a parameter may lie on several ranks, and say which piece of it a rank has.
ZeRO-3 cuts each parameter into D equal parts, rounded up. Nothing is read before it is asked for, and then only what covers it: a rank that
resumes on another layout opens the files of the stages and tensor ranks whose parameters it needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.errors import LayoutError
from megatron_ext.sharding import ShardSpec
from pangu.config import ModelConfig
from pangu.config.stages import balanced_layers, stage_bounds
from pangu.engine.checkpoint_reader import (
    Checkpoint,
    Flat,
    flat_buffers,
    load_optimizer,
    model_parameters,
    open_checkpoint,
    pipeline_parameters,
    section,
)
from pangu.errors import InputError
from pangu.tensor_files.lazy_tensor import LazyTensor, merged
from pangu.tensor_files.torch_file import StoredTensor
from pangu.tensor_files.torch_pickle import Opaque

STATES = ("fp32", "exp_avg", "exp_avg_sq")
"""The states of every parameter: its weights in fp32, and Adam's running means of the gradient and of its square."""


@dataclass(frozen=True)
class OptimizerState:
    """The saved state of an optimizer."""

    tensors: Mapping[str, Mapping[str, LazyTensor]]
    """Full tensors in fp32, by state and canonical name."""
    step: float
    """Adam's step count."""
    loss_scaler: Mapping[str, float | bool]
    """The state of DeepSpeed's loss scaler, by attribute; empty without ZeRO."""


@dataclass(frozen=True)
class _Place:
    """Where a parameter is in the checkpoint."""

    name: str
    """DeepSpeed's."""
    stage: int
    spec: ShardSpec


@dataclass(frozen=True)
class _Shard:
    """One rank's file: its buffers by state, and which piece of which parameter lies where."""

    buffers: Mapping[str, list[Flat]]
    """Without Adam's as long as no step was applied; its means are zero then."""
    pieces: Mapping[str, tuple[int, int, int]]
    """Buffer, beginning and number of elements, by DeepSpeed's name."""
    step: float
    loss_scaler: Mapping[str, float | bool]


def read_optimizer(path: Path) -> OptimizerState:
    """Read the optimizer states of a checkpoint, or of the newest checkpoint in a directory.

    Raises:
        InputError: naming the file that is missing, damaged or is not what the manifest says; when a tensor is read, also one that lacks a
            part of it.
    """
    checkpoint = open_checkpoint(path)
    try:
        return _without_zero(checkpoint) if checkpoint.layout["zero"] == 0 else _sharded(checkpoint)
    except LayoutError as error:
        raise InputError(f"{checkpoint.folder}: its manifest describes an impossible layout: {error}") from None


def _without_zero(checkpoint: Checkpoint) -> OptimizerState:
    ranks = range(checkpoint.layout["tensor"])
    names = [f"mp_rank_{rank:02d}_model_states.pt" for rank in ranks]
    roots = [checkpoint.load(name) for name in names]
    modules = [section(checkpoint, name, root, "module") for name, root in zip(names, roots, strict=True)]
    specs = model_parameters(checkpoint, len(modules[0]))
    states = [
        section(checkpoint, name, section(checkpoint, name, root, "optimizer"), "state") for name, root in zip(names, roots, strict=True)
    ]
    # The optimizer numbers them so: see pangu.engine.optimizer.decay_groups.
    order = sorted(specs, key=lambda key: len(specs[key].shape) == 1)

    def stored(rank: int, state: str, key: str) -> LazyTensor:
        own = states[rank].get(order.index(key), {})
        value = modules[rank].get(key) if state == "fp32" else own.get(state) if isinstance(own, dict) else None
        shape = specs[key].local_shape(len(ranks))
        if not isinstance(value, StoredTensor) or value.shape != shape or value.dtype != torch.float32:
            raise InputError(f"{checkpoint.folder / names[rank]}: has no {state} of {specs[key].name} in fp32, shape {list(shape)}.")
        return LazyTensor(value.shape, value.dtype, value.read)

    tensors = {
        state: {spec.name: merged([stored(rank, state, key) for rank in ranks], spec.split_dim, spec.shape) for key, spec in specs.items()}
        for state in STATES
    }
    optimizer = section(checkpoint, names[0], roots[0], "optimizer")
    return OptimizerState(tensors, _step(checkpoint, names[0], states[0], optimizer.get("param_groups")), {})


def _sharded(checkpoint: Checkpoint) -> OptimizerState:
    layout, config = checkpoint.layout, checkpoint.config
    places = _places(checkpoint, config)

    @cache
    def shard(data_rank: int, model_rank: int) -> _Shard:
        if layout["zero"] == 3:
            return _partitioned_shard(checkpoint, data_rank, model_rank, {place.name: place.spec for place in places.values()})
        return _cut_shard(checkpoint, data_rank, model_rank)

    def read_local(state: str, place: _Place, model_rank: int) -> Tensor:
        shape = place.spec.local_shape(layout["tensor"])
        whole, at = torch.empty(math.prod(shape), dtype=torch.float32), 0
        for data_rank in range(layout["data"]):
            part = shard(data_rank, model_rank)
            buffer, begin, count = part.pieces.get(place.name, (0, 0, 0))
            if count:
                if at + count > whole.numel():
                    raise InputError(
                        f"{checkpoint.folder}: {place.spec.name}: its ranks hold more of it than its {whole.numel():,} elements."
                    )
                if state in part.buffers:
                    part.buffers[state][buffer].copy_to(whole[at : at + count], begin)
                else:
                    whole[at : at + count].zero_()
                at += count
        if at != whole.numel():
            raise InputError(f"{checkpoint.folder}: {place.spec.name}: {at:,} of its {whole.numel():,} elements are there ({state}).")
        return whole.view(shape)

    def full(state: str, place: _Place) -> LazyTensor:
        size = layout["tensor"]
        local = place.spec.local_shape(size)
        pieces = [LazyTensor(local, torch.float32, partial(read_local, state, place, place.stage * size + rank)) for rank in range(size)]
        return merged(pieces, place.spec.split_dim, place.spec.shape)

    first = shard(0, 0)
    tensors = {state: {name: full(state, place) for name, place in places.items()} for state in STATES}
    return OptimizerState(tensors, first.step, first.loss_scaler)


def _places(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, _Place]:
    """Every parameter by its canonical name; of a tied one, the place on the first stage."""
    if checkpoint.layout["pipeline"] == 1:
        file = f"{'zero_pp_rank_0_' if checkpoint.layout['zero'] == 3 else ''}mp_rank_00_model_states.pt"
        specs = model_parameters(checkpoint, len(section(checkpoint, file, checkpoint.load(file), "module")))
        return {spec.name: _Place(name, 0, spec) for name, spec in specs.items()}
    if config.num_layers > len(checkpoint.sizes):
        raise InputError(f"{checkpoint.folder}: {config.num_layers} layers, but just {len(checkpoint.sizes)} files.")
    bounds = stage_bounds(config, _stage_layers(checkpoint, config))
    places: dict[str, _Place] = {}
    for index, specs in enumerate(pipeline_parameters(config)):
        stage = next(stage for stage in range(len(bounds) - 1) if index < bounds[stage + 1])
        for name, spec in specs.items():
            places.setdefault(spec.name, _Place(f"tied_modules.words.{name}" if index == 0 else f"{index}.{name}", stage, spec))
    return places


def _stage_layers(checkpoint: Checkpoint, config: ModelConfig) -> Sequence[int]:
    """Transformer layers of each stage of the pipeline that saved the checkpoint."""
    num_stages, layers = checkpoint.layout["pipeline"], checkpoint.stage_layers
    if num_stages > config.num_layers:
        raise InputError(f"{checkpoint.folder}: {num_stages} pipeline stages in its manifest for {config.num_layers} layers.")
    if layers is None:
        return balanced_layers(config, num_stages)
    well_formed = type(layers) is list and len(layers) == num_stages and all(type(count) is int and count > 0 for count in layers)
    if not well_formed or sum(layers) != config.num_layers:
        raise InputError(
            f"{checkpoint.folder}: its manifest's parallel.stage_layers = {str(layers)[:80]}, but {num_stages} stages with "
            f"{config.num_layers} layers in all were expected."
        )
    return list(layers)


def _cut_shard(checkpoint: Checkpoint, data_rank: int, model_rank: int) -> _Shard:
    """ZeRO-1 and 2: a buffer a group."""
    name, state = load_optimizer(checkpoint, data_rank, model_rank)
    base = section(checkpoint, name, state, "base_optimizer_state")
    weights = flat_buffers(checkpoint, name, state.get("single_partition_of_fp32_groups"))
    buffers = {"fp32": [Flat([buffer]) for buffer in weights]}
    buffers |= {key: [Flat([buffer]) for buffer in own] for key, own in _moments(checkpoint, name, base, len(weights)).items()}
    mappings = state.get("param_slice_mappings")
    if type(mappings) is not list or len(mappings) != len(weights) or not all(isinstance(mapping, dict) for mapping in mappings):
        raise InputError(f"{checkpoint.folder / name}: does not say which parameters it holds.")
    pieces = {}
    for number, mapping in enumerate(mappings):
        for parameter, address in mapping.items():
            fields = address.state if isinstance(address, Opaque) and isinstance(address.state, dict) else {}
            begin, count = fields.get("start"), fields.get("numel")
            end = min(buffer[number].numel for buffer in buffers.values())
            if type(begin) is not int or type(count) is not int or not 0 <= begin <= begin + count <= end:
                raise InputError(f"{checkpoint.folder / name}: says that a parameter lies where its buffer of {end:,} elements is not.")
            pieces[parameter] = (number, begin, count)
    return _Shard(buffers, pieces, _step(checkpoint, name, base.get("state"), base.get("param_groups")), _loss_scaler(state))


def _partitioned_shard(checkpoint: Checkpoint, data_rank: int, model_rank: int, specs: Mapping[str, ShardSpec]) -> _Shard:
    """ZeRO-3: buffers that lie one after the other, parameters in the order that the model file has."""
    name, state = load_optimizer(checkpoint, data_rank, model_rank)
    base = section(checkpoint, name, state, "optimizer_state_dict")
    weights = flat_buffers(checkpoint, name, state.get("fp32_flat_groups"))
    buffers = {"fp32": [Flat(weights)]}
    buffers |= {key: [Flat(own)] for key, own in _moments(checkpoint, name, base, len(weights)).items()}
    model_file = f"zero_pp_rank_0_mp_rank_{model_rank:02d}_model_states.pt"
    groups = checkpoint.load(model_file).get("param_shapes")
    if type(groups) is not list or not all(isinstance(group, dict) for group in groups):
        raise InputError(f"{checkpoint.folder / model_file}: does not contain the order of its parameters.")
    pieces, begin = {}, 0
    for parameter in [key for group in groups for key in group]:
        if parameter not in specs:
            raise InputError(f"{checkpoint.folder / model_file}: parameter {str(parameter)[:80]!r} is unknown.")
        numel = math.prod(specs[parameter].local_shape(checkpoint.layout["tensor"]))
        share = -(-numel // checkpoint.layout["data"])
        pieces[parameter] = (0, begin, max(0, min(share, numel - data_rank * share)))  # what the last ranks have too much is padding
        begin += share
    if any(buffer.numel != begin for (buffer,) in buffers.values()):
        raise InputError(f"{checkpoint.folder / name}: its buffers are not as long as its parameters need, {begin:,} elements.")
    return _Shard(buffers, pieces, _step(checkpoint, name, base.get("state"), base.get("param_groups")), _loss_scaler(state))


def _moments(checkpoint: Checkpoint, name: str, base: dict[Any, Any], count: int) -> dict[str, list[StoredTensor]]:
    states = section(checkpoint, name, base, "state")
    if not any(states.values()):
        return {}
    own = [state if isinstance(state := states.get(number), dict) else {} for number in range(count)]
    return {key: flat_buffers(checkpoint, name, [state.get(key) for state in own]) for key in STATES[1:]}


def _step(checkpoint: Checkpoint, name: str, states: Any, groups: Any) -> float:
    """Adam's count, 0 before its first step. torch keeps one with each state, other fused kernels one with each group."""
    if isinstance(states, dict) and not any(states.values()):
        return 0.0
    state = states.get(0) if isinstance(states, dict) else None
    step = state.get("step") if isinstance(state, dict) else None
    if step is None and type(groups) is list and groups and isinstance(groups[0], dict):
        step = groups[0].get("step")
    if isinstance(step, StoredTensor) and math.prod(step.shape) == 1:
        step = step.read().item()
    if not isinstance(step, (int, float)) or not math.isfinite(step):
        raise InputError(f"{checkpoint.folder / name}: does not say how many steps its optimizer has taken.")
    return float(step)


def _loss_scaler(state: dict[Any, Any]) -> dict[str, float | bool]:
    scaler = state.get("loss_scaler")
    fields = scaler.state if isinstance(scaler, Opaque) and isinstance(scaler.state, dict) else {}
    return {key: value for key, value in fields.items() if type(key) is str and type(value) in (int, float, bool)}
