"""A model for evaluation: split over some processes, and as many copies of it as there are processes left."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ext import accelerator
from megatron_ext.collectives import world_rank, world_size
from megatron_ext.context import ParallelContext
from megatron_ext.topology import Groups, Topology
from pangu.conversion.formats import open_weights
from pangu.errors import InputError
from pangu.inference.generation import COLLECTIVE_TIMEOUT_SECONDS, TextGenerator
from pangu.model.model import PanguModel
from pangu.tokenizer import PanguTokenizer


@dataclass(frozen=True)
class Loaded:
    """This rank's part."""

    generator: TextGenerator
    """Holds model and tokenizer."""
    groups: Groups
    """Ranks of a tensor group work on the same examples, those of a data group on different ones."""


def load(path: Path, tensor_parallel: int) -> Loaded:
    """Read the weights; `tensor_parallel` processes share a copy of them.

    Raises:
        InputError: if the weights or their tokenizer are not usable, or do not divide.
        LayoutError: if the processes are no multiple of `tensor_parallel`.
    """
    weights = open_weights(path)
    if weights.tokenizer is None:
        raise InputError(f"{path}: no vocab.model lies beside the weights. Put the one there that the model was trained with.")
    if tensor_parallel < 1 or weights.config.num_heads % tensor_parallel:
        raise InputError(f"--tensor-parallel {tensor_parallel} does not divide the {weights.config.num_heads} attention heads of {path}.")
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    topology = Topology.from_world_size(num_ranks, tensor=tensor_parallel, pipeline=1)
    if num_ranks > 1:
        accelerator.initialize(COLLECTIVE_TIMEOUT_SECONDS)
        assert world_size() == num_ranks
        groups = Groups.create(topology, COLLECTIVE_TIMEOUT_SECONDS)
    else:
        groups = Groups.describe(topology, world_rank())
    device = accelerator.device()
    dtype = torch.float32 if device.type == "cpu" or weights.dtype == torch.float64 else weights.dtype
    context = ParallelContext(tensor=groups.tensor, device=device, dtype=dtype, fill=weights.fill)
    return Loaded(TextGenerator(PanguModel(weights.config, context), PanguTokenizer(weights.tokenizer)), groups)


def fingerprint(path: Path) -> str:
    """Tells whether a directory or file of weights is still the one it was: names, sizes and times, for reading 200B would take hours."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    facts = [f"{file.relative_to(path)} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()
