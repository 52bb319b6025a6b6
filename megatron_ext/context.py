"""What a layer needs to know about where it runs. It is passed to the layer: no layer reads a global."""

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
    """Where a layer runs and how it is split. The default is one process on the CPU."""

    tensor: Group = SINGLE
    """The tensor-parallel group."""
    sequence_parallel: bool = False
    """Split the sequence over the tensor-parallel group between the parallel linear layers (arXiv 2205.05198, section 4.2.2)."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Device on which parameters are created. `meta` allocates nothing: only shapes and counts."""
    dtype: torch.dtype = torch.float32
    """Dtype of the parameters. Training creates them in fp32 and leaves the conversion to 16 bits to the engine."""
    fill: ParamInit | None = None
    """Writes the initial weights: drawn from a seed (`initialize.random_weights`) or read from files. None leaves them uninitialized."""
    rng: RngStreams = field(default_factory=lambda: RngStreams(None, Coordinates(0, 0, 0)))
    """The random streams that dropout draws from."""

    @property
    def splits_sequence(self) -> bool:
        """Whether activations between the parallel linear layers are split along the sequence."""
        return self.sequence_parallel and self.tensor.size > 1
