"""ShardSpec: how one parameter is split over the tensor-parallel group. The one source for initialisation, saving, conversion and checks.

Every parameter of the model carries its spec as `parameter.shard_spec`; nothing else in the project lists parameter names to split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from megatron_ext.errors import LayoutError


@dataclass(frozen=True)
class Init:
    """Distribution of a parameter's initial values: constant, normal, or normal truncated at two standard deviations."""

    kind: Literal["constant", "normal", "truncated_normal"]
    value: float
    """The constant, or the standard deviation."""


ZEROS = Init("constant", 0.0)
ONES = Init("constant", 1.0)


@dataclass(frozen=True)
class ShardSpec:
    """One parameter of the full model and its split.

    A parameter that two pipeline stages hold (the tied word embedding) has the same name on both: equal names mean equal values.
    """

    name: str
    """Canonical name, whatever module or pipeline layer holds the parameter."""
    shape: tuple[int, ...]
    """Shape in the full model, without padding."""
    init: Init
    split_dim: int | None = None
    """The dimension that is cut into equal consecutive slices, one per tensor-parallel rank; None: every rank holds the whole parameter."""
    padded: bool = False
    """Whether `split_dim` is padded with zeros to a multiple of the tensor-parallel size, as for the vocabulary; without, it must be
    one."""

    def padded_shape(self, size: int) -> tuple[int, ...]:
        """Shape of the full tensor as `size` ranks hold it.

        Raises:
            LayoutError: if the split dimension is not divisible by `size` and may not be padded.
        """
        if self.split_dim is None or self.shape[self.split_dim] % size == 0:
            return self.shape
        if not self.padded:
            raise LayoutError(
                f"{self.name}: dimension {self.split_dim} of {list(self.shape)} does not divide by tensor-parallel size {size}."
            )
        shape = list(self.shape)
        shape[self.split_dim] = -(-shape[self.split_dim] // size) * size
        return tuple(shape)

    def local_shape(self, size: int) -> tuple[int, ...]:
        """Shape of one rank's slice."""
        shape = list(self.padded_shape(size))
        if self.split_dim is not None:
            shape[self.split_dim] //= size
        return tuple(shape)

    def offset(self, rank: int, size: int) -> int:
        """Index along `split_dim` at which the rank's slice begins; 0 for a replicated parameter."""
        return 0 if self.split_dim is None else rank * self.local_shape(size)[self.split_dim]

    def slice(self, full: Tensor, rank: int, size: int) -> Tensor:
        """The rank's slice of the full tensor: a view where nothing is padded, else a copy with zeros in the padding."""
        self.check(full.shape)
        if self.split_dim is None:
            return full
        begin, width = self.offset(rank, size), self.local_shape(size)[self.split_dim]
        real = max(0, min(width, self.shape[self.split_dim] - begin))
        part = full.narrow(self.split_dim, min(begin, self.shape[self.split_dim]), real)
        if real == width:
            return part
        padded = full.new_zeros(self.local_shape(size))
        padded.narrow(self.split_dim, 0, real).copy_(part)
        return padded

    def merge(self, slices: Sequence[Tensor]) -> Tensor:
        """The full tensor from every rank's slice, in rank order, padding dropped. A replicated parameter is taken from the first rank."""
        if self.split_dim is None:
            full = slices[0]
        else:
            full = slices[0] if len(slices) == 1 else torch.cat(list(slices), dim=self.split_dim)
            full = full.narrow(self.split_dim, 0, min(full.shape[self.split_dim], self.shape[self.split_dim]))
        self.check(full.shape)
        return full

    def check(self, shape: Sequence[int]) -> None:
        """Refuse a full tensor of another shape.

        Raises:
            LayoutError: names the parameter, the shape found and the shape expected.
        """
        if tuple(shape) != self.shape:
            raise LayoutError(f"{self.name}: found shape {list(shape)}, expected {list(self.shape)}.")


def spec_of(parameter: nn.Parameter) -> ShardSpec:
    """The spec of a parameter that `make_parameter` created."""
    spec: ShardSpec = parameter.shard_spec  # type: ignore[attr-defined]
    return spec


def canonical_parameters(module: nn.Module) -> Iterator[tuple[ShardSpec, nn.Parameter]]:
    """Yield each parameter of a model or a pipeline stage once, with its spec, in the order of `module.parameters()`."""
    for parameter in module.parameters():
        yield spec_of(parameter), parameter
