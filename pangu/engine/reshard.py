"""Resumes on another layout: loads weights and optimizer of a checkpoint, saved on any layout, into the ranks that run now.

Every rank reads what it will hold, straight from DeepSpeed's files (pangu.engine.optimizer_reader), one tensor at a time, and writes
it to where DeepSpeed keeps it. Nothing is converted on disk, so there is no half-converted state, and every ZeRO stage and pipeline can be
resumed on every other. DeepSpeed's own way, its universal format, needs a second copy of the checkpoint on disk, and can neither leave nor
enter a run without ZeRO, nor enter ZeRO-3 with tensor parallelism or a padded vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.sharding import ShardSpec, canonical_parameters
from pangu.engine.engine import TrainingEngine
from pangu.engine.optimizer import start_states
from pangu.engine.optimizer_reader import STATES, read_optimizer
from pangu.errors import InputError
from pangu.tensor_files.lazy_tensor import LazyTensor


@dataclass(frozen=True)
class _Slot:
    """A place in which this rank keeps a piece of a parameter."""

    spec: ShardSpec
    begin: int
    """First element of the piece in the flattened slice of this tensor rank."""
    targets: Mapping[str, Tensor]
    """The one-dimensional buffers to fill, by state, all of the same length."""


def load_resharded(engine: TrainingEngine, path: Path) -> None:
    """Fill an engine from a checkpoint of any layout: weights, fp32 weights, Adam's states and step count, loss scale.

    Args:
        engine: a new engine for the checkpoint's model.
        path: the checkpoint's directory.

    Raises:
        InputError: if the checkpoint lacks a part, or the optimizer's states lie where they cannot be filled.
    """
    state = read_optimizer(path)
    tensor, optimizer = engine.groups.tensor, engine.engine.optimizer
    slots, finish = _SLOTS[engine.config.parallel.zero_stage](engine, state.step)
    for slot in slots:
        for name, target in slot.targets.items():
            piece = _read_piece(state.tensors[name][slot.spec.name], slot, tensor.rank, tensor.size, target.numel())
            target.copy_(piece)
    finish()
    scaler = getattr(optimizer, "loss_scaler", None)
    if engine.config.train.precision == "fp16" and scaler is not None:
        for key, value in state.loss_scaler.items():
            if key in vars(scaler):
                setattr(scaler, key, value)


Slots = tuple[Iterator[_Slot], Callable[[], Any]]
"""The slots, and a function to call once all are filled."""


def _without_zero(engine: TrainingEngine, step: float) -> Slots:
    optimizer = engine.engine.optimizer

    def slots() -> Iterator[_Slot]:
        for spec, parameter in canonical_parameters(engine.module):
            moments = start_states(optimizer, parameter, step)
            targets = {"fp32": parameter.detach(), **moments}
            yield _Slot(spec, 0, {name: target.view(-1) for name, target in targets.items()})

    return slots(), lambda: None


def _cut(engine: TrainingEngine, step: float) -> Slots:
    """ZeRO-1 and 2: one flat buffer per group, cut over the data-parallel ranks; the weights are gathered from the pieces."""
    optimizer = engine.engine.optimizer
    base = optimizer.optimizer
    moments = [start_states(base, group["params"][0], step) for group in base.param_groups]

    def slots() -> Iterator[_Slot]:
        for spec, parameter in canonical_parameters(engine.module):
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                at = mapping.hp_fragment_address
                own = {name: value.narrow(0, at.start, at.numel) for name, value in moments[mapping.param_group_index].items()}
                yield _Slot(spec, mapping.lp_fragment_address.start, {"fp32": mapping.hp_fragment.detach(), **own})

    return slots(), optimizer.update_lp_params


def _partitioned(engine: TrainingEngine, step: float) -> Slots:
    """ZeRO-3: every parameter cut over the data-parallel ranks, several to a flat buffer."""
    optimizer, data = engine.engine.optimizer, engine.groups.data
    if optimizer.swap_optimizer:
        raise InputError("optimizer states on NVMe cannot be filled from another layout. Resume with offload_optimizer to cpu, or none.")
    optimizer.checkpoint_event_prologue()
    flats = optimizer.fp32_partitioned_groups_flat
    for number, flat in enumerate(flats):
        start_states(optimizer.optimizer, flat, step, group=optimizer.sub_group_to_group_id[number])

    def slots() -> Iterator[_Slot]:
        for spec, parameter in canonical_parameters(engine.module):
            number, begin, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
            own = {name: optimizer.optimizer.state[flats[number]][name] for name in STATES[1:]}
            targets = {name: value.detach().narrow(0, begin, count) for name, value in {"fp32": flats[number], **own}.items()}
            yield _Slot(spec, data.rank * count, targets)

    def finish() -> None:
        for weights, flat in zip(optimizer.fp16_partitioned_groups_flat, flats, strict=True):
            weights.data.copy_(flat.data)
        optimizer.checkpoint_event_epilogue()

    return slots(), finish


_SLOTS: dict[int, Callable[[TrainingEngine, float], Slots]] = {0: _without_zero, 1: _cut, 2: _cut, 3: _partitioned}


def _read_piece(full: LazyTensor, slot: _Slot, rank: int, size: int, count: int) -> Tensor:
    """`count` elements of this tensor rank's flattened slice, padding as zeros; of the file just the rows that hold them."""
    spec, shape = slot.spec, slot.spec.local_shape(size)
    piece = torch.zeros(count, dtype=torch.float32)
    width = math.prod(shape[1:])
    first, last = slot.begin // width, min(-(-(slot.begin + count) // width), shape[0])
    offset = spec.offset(rank, size)
    shift = offset if spec.split_dim == 0 else 0
    low, high = first + shift, min(last + shift, spec.shape[0])
    if low >= high:
        return piece  # nothing but padding
    rows = full.part(0, low, high)
    if spec.split_dim == 1:
        rows = rows.narrow(1, offset, shape[1])
    values = rows.reshape(-1)[slot.begin - first * width :][:count]
    piece[: values.numel()].copy_(values)
    return piece
