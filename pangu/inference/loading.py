"""Loads a model and its tokenizer from weights of any format, distributed over the running processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ext import accelerator
from megatron_ext.context import ParallelContext
from megatron_ext.supervision import rendezvous
from megatron_ext.topology import Groups, Topology
from pangu.conversion.formats import open_weights
from pangu.errors import InputError
from pangu.inference.cpu_weights import arrange_for_cpu, quantize
from pangu.model.model import PanguModel
from pangu.text.tokenizer import PanguTokenizer

COLLECTIVE_TIMEOUT_SECONDS = 1800.0
"""Timeout of collectives in seconds: the first one waits for the slowest rank to read its weights."""


@dataclass(frozen=True)
class Loaded:
    """A loaded model, or this rank's slice of it, with its tokenizer and process groups."""

    model: PanguModel
    tokenizer: PanguTokenizer
    groups: Groups
    """Ranks of a tensor-parallel group share one copy of the model; each data-parallel rank has a copy of its own."""


def load(path: Path, tensor_parallel: int | None = None, *, int8: bool = False) -> Loaded:
    """Load a model. Weights keep their dtype on an accelerator; on a CPU, where 16 bits are slow, they become fp32 in a faster memory
    layout.

    Args:
        path: weights of any format with the `vocab.model` beside them.
        tensor_parallel: number of processes that share a copy of the model; None: all.
        int8: compute with 8-bit weights, slightly less exact; needs one process per copy, on a CPU (`quantize`).

    Raises:
        InputError: if the weights or their tokenizer are not usable, the heads do not divide, or `int8` is asked of an accelerator or of
            several processes.
        LayoutError: if the number of processes is not a multiple of `tensor_parallel`.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    tensor_parallel = num_ranks if tensor_parallel is None else tensor_parallel
    if int8 and (tensor_parallel > 1 or accelerator.device().type != "cpu"):
        place = f"{tensor_parallel} processes" if tensor_parallel > 1 else accelerator.device().type
        raise InputError(f"int8 works in one process on a CPU; found {place}. Leave it out, or start one process without accelerators.")
    weights = open_weights(path)
    if weights.tokenizer is None:
        raise InputError(f"{path}: no vocab.model lies beside the weights. Put the one there that the model was trained with.")
    tokenizer = PanguTokenizer(weights.tokenizer)
    if tensor_parallel < 1 or weights.config.num_heads % tensor_parallel:
        raise InputError(
            f"{tensor_parallel} processes do not divide the {weights.config.num_heads} attention heads of {path}. "
            "Choose a number that does."
        )
    topology = Topology.from_world_size(num_ranks, tensor=tensor_parallel, pipeline=1)
    if num_ranks > 1:
        rendezvous.initialize(COLLECTIVE_TIMEOUT_SECONDS)
        groups = Groups.create(topology, COLLECTIVE_TIMEOUT_SECONDS)
    else:
        groups = Groups.from_topology(topology, 0)
    device = accelerator.device()
    dtype = torch.float32 if device.type == "cpu" or weights.dtype == torch.float64 else weights.dtype
    context = ParallelContext(tensor=groups.tensor, device=device, dtype=dtype, fill=weights.fill)
    model = PanguModel(weights.config, context).eval()
    if int8:
        quantize(model)
    elif device.type == "cpu":
        arrange_for_cpu(model)
    return Loaded(model, tokenizer, groups)
