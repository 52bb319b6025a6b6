"""Writes the weights of a running model as a canonical directory (pangu.conversion.huggingface), with all its ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from megatron_ext.collectives import all_gather, together
from megatron_ext.sharding import ShardSpec
from megatron_ext.topology import Group, Groups
from pangu.config import ModelConfig
from pangu.conversion import huggingface
from pangu.errors import InputError
from pangu.files import publish, remove_leftovers, work_path
from pangu.tensor_files.lazy_tensor import LazyTensor


def write_weights(
    path: Path,
    config: ModelConfig,
    groups: Groups,
    parameters: Iterable[tuple[ShardSpec, Callable[[], Any]]],
    *,
    tokenizer: Path | None = None,
) -> None:
    """Write the weights of a running model as a canonical directory, which appears complete or not at all. Every rank must call this.

    Each pipeline stage writes its own files, one parameter at a time: its slices are gathered over the tensor-parallel group, and the first
    rank of the stage holds at most one file's worth of tensors.

    Args:
        path: the directory; an existing one is replaced once the new one is complete.
        config: the model's configuration.
        groups: this rank's process groups.
        parameters: this rank's parameters, in the same order on every rank of a stage: the spec, and a context manager that yields the
            slice.
        tokenizer: a `vocab.model` to copy into the directory, or the directory that holds it.
    """

    def prepare() -> Path:
        partial = work_path(path)
        if groups.world.rank == 0:
            remove_leftovers(path)
            partial.mkdir(parents=True)
        return partial

    partial = _together(prepare, groups.world, path)[0]
    is_writer = groups.data.rank == 0 and groups.tensor.rank == 0
    stage, last = groups.coordinates.pipe, groups.topology.pipeline - 1
    writer = huggingface.FileWriter(partial, stage=stage)
    dtype = torch.float32
    failure: OSError | None = None
    for spec, whole in parameters:
        with whole() as local:
            if stage == last > 0 and spec.name == "transformer.wte.weight":
                continue  # tied: the first stage writes it
            full = spec.merge([all_gather(local, groups.tensor, spec.split_dim)] if spec.split_dim is not None else [local])
            if is_writer and failure is None:
                dtype = full.dtype
                kept = full.detach().to("cpu", copy=True).contiguous()
                try:
                    writer.add(spec.name, LazyTensor(tuple(kept.shape), kept.dtype, kept.detach))
                except OSError as error:
                    failure = error  # told at the end: until then the other ranks need this one for gathering

    def written() -> list[huggingface.WrittenFile]:
        if failure is not None:
            raise failure
        writer.flush()
        return writer.files

    files = [file for files in _together(written, groups.world, path) for file in files]

    def commit() -> None:
        if groups.world.rank == 0:
            huggingface.finish(partial, files, config, dtype, tokenizer)
            publish(partial, path)

    _together(commit, groups.world, path)


def _together(action: Callable[[], Any], world: Group, path: Path) -> list[Any]:
    try:
        return together(action, world)
    except OSError as error:
        raise InputError(f"{path}: the weights could not be written ({error}). Free some space or fix the directory.") from None
