"""Tensor-parallel groups of every size in one world, and what a rank holds of a tensor, worked out apart from the code under test."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.supervision import rendezvous
from megatron_ext.topology import SINGLE, Group, Groups, Topology


def tensor_groups() -> list[Group]:
    """This rank's groups of 1, 2 and 4 in a world of four. Two pairs stand side by side: a rank in its group is not its global rank."""
    rendezvous.initialize(60)
    pairs, all_four = Topology(tensor=2, pipeline=1, data=2), Topology(tensor=4, pipeline=1, data=1)
    return [SINGLE, Groups.create(pairs).tensor, Groups.create(all_four).tensor]


def share(x: Tensor, rank: int, size: int, dim: int, padding: float = 0.0) -> Tensor:
    """A rank's part of `dim`: equal widths, rounded up; `padding` where nothing is left."""
    width = -(-x.shape[dim] // size)
    missing = list(x.shape)
    missing[dim] = width * size - x.shape[dim]
    return torch.cat([x, x.new_full(missing, padding)], dim).split(width, dim)[rank]
