"""Every communication this project does itself: the autograd-aware collectives of tensor and sequence parallelism, and a few plain ones.

Each differentiable function is named for what it does forward; its gradient does the conjugate (Megatron-LM, arXiv 1909.08053, section 3;
sequence parallelism: arXiv 2205.05198, section 4.2.2):

| forward | backward |
|---|---|
| copy_to_tensor_parallel: nothing | all-reduce |
| reduce_from_tensor_parallel: all-reduce | nothing |
| scatter_to_sequence_parallel: split | all-gather |
| gather_from_sequence_parallel: all-gather | reduce-scatter |
| reduce_scatter_to_sequence_parallel: reduce-scatter | all-gather |

Only sums are asked of a backend, never averages, `gather` or float64: HCCL has none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.topology import Group

# torch 2.13 renamed the pair and warns about the old names; 2.6 has only those.
_all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Sum over the group, in place."""
    if group.size > 1:
        dist.all_reduce(x, group=group.handle)
    return x


def all_reduce_max(x: Tensor, group: Group) -> Tensor:
    """Maximum over the group, in place."""
    if group.size > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group.handle)
    return x


def all_gather(x: Tensor, group: Group, dim: int) -> Tensor:
    """Concatenate every rank's `x` along `dim`, in rank order."""
    if group.size == 1:
        return x
    gathered = x.new_empty((group.size * x.shape[0], *x.shape[1:]))
    _all_gather_into(gathered, x.contiguous(), group=group.handle)
    return gathered if dim % x.dim() == 0 else torch.cat(gathered.chunk(group.size), dim=dim)


def reduce_scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    """Sum over the group; each rank keeps its slice of `dim`, which must divide by the group's size."""
    if group.size == 1:
        return x
    stacked = x if dim % x.dim() == 0 else torch.cat(x.chunk(group.size, dim=dim))
    scattered = x.new_empty((stacked.shape[0] // group.size, *stacked.shape[1:]))
    _reduce_scatter_into(scattered, stacked.contiguous(), group=group.handle)
    return scattered


def split(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's slice of `x` along `dim`, which must divide by the group's size."""
    if group.size == 1:
        return x
    width = x.shape[dim] // group.size
    return x.narrow(dim, group.rank * width, width).contiguous()


def _sum(x: Tensor, group: Group, dim: int) -> Tensor:
    return all_reduce(x.contiguous().clone(), group)  # a copy: others may hold an input or a gradient


def _same(x: Tensor, group: Group, dim: int) -> Tensor:
    return x  # autograd makes a view of an input that comes back as it is


_Collective = Callable[[Tensor, Group, int], Tensor]


class _Conjugate(torch.autograd.Function):
    """One collective forward, and on the gradient the one that is conjugate to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: _Collective, backward: _Collective, group: Group, dim: int) -> Tensor:
        ctx.collective, ctx.group, ctx.dim = backward, group, dim
        return forward(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return ctx.collective(grad, ctx.group, ctx.dim), None, None, None, None


def _conjugate(x: Tensor, forward: _Collective, backward: _Collective, group: Group, dim: int = 0) -> Tensor:
    return _Conjugate.apply(x, forward, backward, group, dim) if group.size > 1 else x  # type: ignore[no-untyped-call]


def copy_to_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    """A replicated `x` enters computations that each rank does a part of; the gradient is the sum of the parts."""
    return _conjugate(x, _same, _sum, group)


def reduce_from_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    """The sum of every rank's part; the gradient is the same on all ranks and passes through."""
    return _conjugate(x, _sum, _same, group)


def scatter_to_sequence_parallel(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's slice along `dim` of a replicated `x`."""
    return _conjugate(x, split, all_gather, group, dim)


def gather_from_sequence_parallel(x: Tensor, group: Group, dim: int) -> Tensor:
    """All ranks' slices along `dim`, entering computations that each rank does a part of; the gradient's parts are summed and split."""
    return _conjugate(x, all_gather, reduce_scatter, group, dim)


def reduce_scatter_to_sequence_parallel(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's slice along `dim` of the sum of every rank's part."""
    return _conjugate(x, reduce_scatter, all_gather, group, dim)


def is_initialized() -> bool:
    """Whether this process belongs to a world of processes."""
    return dist.is_available() and dist.is_initialized()


def world_rank() -> int:
    """This process's global rank; 0 for a process that works alone."""
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 for a process that works alone."""
    return dist.get_world_size() if is_initialized() else 1


def ranks_of(handle: Any) -> tuple[int, ...]:
    """Global ranks of a process group, whoever made it; None is the whole world."""
    return tuple(dist.get_process_group_ranks(handle)) if handle is not None else tuple(range(world_size()))


def barrier(group: Group) -> None:
    """Wait for every rank of the group."""
    if group.size > 1:
        dist.barrier(group=group.handle)


def broadcast_object(value: Any, group: Group) -> Any:
    """The value of the group's first rank, on every rank. For small Python objects of our own making."""
    if group.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=group.ranks[0], group=group.handle)
    return box[0]


def all_gather_objects(value: Any, group: Group) -> list[Any]:
    """Every rank's value, in the group's order."""
    if group.size == 1:
        return [value]
    values: list[Any] = [None] * group.size
    dist.all_gather_object(values, value, group=group.handle)
    return values


def together(action: Callable[[], Any], group: Group) -> list[Any]:
    """Run an action that reads or writes files on every rank, and gather the results in the group's order.

    Raises:
        OSError: on every rank, if the action raised one on any: the first, with its rank.
    """
    error: str | None = None
    result = None
    try:
        result = action()
    except OSError as caught:
        error = f"rank {group.rank}: {caught}"
    outcomes = all_gather_objects((error, result), group)
    for message, _ in outcomes:
        if message:
            raise OSError(message)
    return [value for _, value in outcomes]


def broadcast(x: Tensor, group: Group, source: int) -> Tensor:
    """The tensor of the group's rank `source` (counted within the group), in place on every rank."""
    if group.size > 1:
        dist.broadcast(x, src=group.ranks[source], group=group.handle)
    return x


def shutdown() -> None:
    """Leave the world of processes."""
    if is_initialized():
        dist.destroy_process_group()
