"""Weights of a running model, written by all its ranks as a canonical directory (pangu.conversion.huggingface)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_ext.collectives import all_gather, together
from megatron_ext.sharding import ShardSpec
from megatron_ext.topology import Group, Groups
from pangu.config import ModelConfig
from pangu.conversion import huggingface
from pangu.errors import InputError
from pangu.files import publish, remove


def write_weights(
    path: Path,
    config: ModelConfig,
    groups: Groups,
    parameters: Iterable[tuple[ShardSpec, Callable[[], Any]]],
    *,
    tokenizer: Path | None = None,
) -> None:
    """Write the weights of a running model as a canonical directory, whole or not at all. Every rank must call this.

    Each pipeline stage writes its own files, one parameter at a time: its slices are gathered over the tensor-parallel group, and the first
    rank of the stage holds at most one file's worth of tensors.

    Args:
        path: the directory; one that exists is replaced once the new one is complete.
        config: the model.
        groups: this rank's groups.
        parameters: this rank's, in the same order on every rank of a stage: the spec, and a context manager that gives the rank's slice.
        tokenizer: a `vocab.model` to put beside the weights, or the directory that holds it.
    """
    partial = path.with_name(path.name + ".partial")

    def prepare() -> None:
        if groups.world.rank == 0:
            remove(partial)
            partial.mkdir(parents=True)

    _together(prepare, groups.world, path)
    is_writer = groups.data.rank == 0 and groups.tensor.rank == 0
    stage, last = groups.coordinates.pipe, groups.topology.pipeline - 1
    files: list[tuple[str, dict[str, int]]] = []  # temporary name, bytes of each tensor
    pending: dict[str, Tensor] = {}
    dtype = torch.float32

    failure: OSError | None = None

    def flush() -> None:
        """Write a file. A failure is told at the end: until then the other ranks need this one for gathering."""
        nonlocal failure
        if pending and failure is None:
            name = f"stage{stage:03d}-{len(files):05d}.safetensors"
            try:
                save_file(pending, partial / name, metadata={"format": "pt"})
                os.chmod(partial / name, 0o644)  # safetensors makes files that only their owner can read
            except (OSError, SafetensorError) as error:
                failure = OSError(str(error))
            files.append((name, {key: tensor.nbytes for key, tensor in pending.items()}))
        pending.clear()

    for spec, whole in parameters:
        with whole() as local:
            if stage == last > 0 and spec.name == "transformer.wte.weight":
                continue  # tied: the first stage writes it
            full = spec.merge([all_gather(local, groups.tensor, spec.split_dim)] if spec.split_dim is not None else [local])
            if is_writer:
                dtype = full.dtype
                pending[spec.name] = full.detach().to("cpu", copy=True).contiguous()
                if sum(tensor.nbytes for tensor in pending.values()) >= huggingface.SHARD_BYTES:
                    flush()
    if is_writer:
        flush()

    def written() -> list[tuple[str, dict[str, int]]]:
        if failure is not None:
            raise failure
        return files

    everything = [entry for entries in _together(written, groups.world, path) for entry in entries]

    def commit() -> None:
        if groups.world.rank != 0:
            return
        weight_map: dict[str, str] = {}
        total_size = sum(sum(sizes.values()) for _, sizes in everything)
        for number, (temporary, names) in enumerate(everything, start=1):
            final = huggingface.file_name(number, len(everything))
            os.rename(partial / temporary, partial / final)
            weight_map.update(dict.fromkeys(names, final))
        huggingface.write_index(partial, weight_map, total_size)
        huggingface.write_companions(partial, config, dtype, tokenizer)
        publish(partial, path)

    _together(commit, groups.world, path)


def _together(action: Callable[[], Any], world: Group, path: Path) -> list[Any]:
    try:
        return together(action, world)
    except OSError as error:
        raise InputError(f"{path}: the weights could not be written ({error}). Free some space or mend the directory.") from None
