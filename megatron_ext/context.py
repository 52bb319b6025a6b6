"""What a layer must be told about where it runs. It is passed in: no layer asks a global."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ext.random import RngStreams
from megatron_ext.sharding import ShardSpec
from megatron_ext.topology import SINGLE, Coordinates, Group

ParamInit = Callable[[Tensor, ShardSpec, int, int], None]
"""Writes initial values into one rank's slice: (slice, spec, tensor-parallel rank, tensor-parallel size)."""


@dataclass(frozen=True)
class ParallelContext:
    """Where a layer runs and how it is split.

    The default is one process on the CPU.
    """

    tensor: Group = SINGLE
    """The tensor-parallel group."""
    sequence_parallel: bool = False
    """Split the sequence over the tensor-parallel group between the parallel linear layers (arXiv 2205.05198, section 4.2.2)."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where parameters are made. `meta` allocates nothing: shapes and counts only."""
    dtype: torch.dtype = torch.float32
    """Type of the parameters. Training makes them in fp32 and leaves 16 bits to the engine."""
    fill: ParamInit | None = None
    """Where initial weights come from: drawn from a seed (`initialize.random_weights`) or read from files. None leaves them unset."""
    rng: RngStreams = field(default_factory=lambda: RngStreams(None, Coordinates(0, 0, 0)))
    """The streams that drive dropout."""

    @property
    def splits_sequence(self) -> bool:
        """Whether activations between the parallel linear layers are split along the sequence."""
        return self.sequence_parallel and self.tensor.size > 1
