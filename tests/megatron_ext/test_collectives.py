"""Each collective and its gradient against a formula that knows every rank's tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.harness import run_distributed
from torch import Tensor

from megatron_ext import collectives
from megatron_ext.supervision import rendezvous
from megatron_ext.topology import SINGLE, Group, Groups, Topology

T = 2
SHAPE = (4, 6, 3)  # both split dimensions divide by T, and no two sizes are equal


def rank_tensors(shape: torch.Size | tuple[int, ...], seed: int, dtype: torch.dtype) -> list[Tensor]:
    """One tensor a rank, known to all ranks. Small integers: sums are exact in every dtype, so that equal means equal."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-8, 9, tuple(shape), generator=generator).to(dtype) for _ in range(T)]


def laid_out(x: Tensor, contiguous: bool) -> Tensor:
    """A copy; the same values in another order of memory if not `contiguous`."""
    return x.clone() if contiguous else x.transpose(0, 2).contiguous().transpose(0, 2)


Formula = Callable[[list[Tensor], int, int], Tensor]
"""(every rank's tensor, this rank, dim) -> what this rank must get."""


def total(xs: list[Tensor]) -> Tensor:
    return torch.stack(xs).sum(0)


def part(x: Tensor, rank: int, dim: int) -> Tensor:
    width = x.shape[dim] // T
    return x.index_select(dim, torch.arange(rank * width, (rank + 1) * width))


# name: forward, backward (of every rank's upstream gradient), takes a dim
DIFFERENTIABLE: dict[str, tuple[Formula, Formula, bool]] = {
    "copy_to_tensor_parallel": (lambda xs, r, d: xs[r], lambda gs, r, d: total(gs), False),
    "reduce_from_tensor_parallel": (lambda xs, r, d: total(xs), lambda gs, r, d: gs[r], False),
    "scatter_to_sequence_parallel": (lambda xs, r, d: part(xs[r], r, d), lambda gs, r, d: torch.cat(gs, d), True),
    "gather_from_sequence_parallel": (lambda xs, r, d: torch.cat(xs, d), lambda gs, r, d: part(total(gs), r, d), True),
    "reduce_scatter_to_sequence_parallel": (lambda xs, r, d: part(total(xs), r, d), lambda gs, r, d: torch.cat(gs, d), True),
}


def demand_contiguous_tensors() -> None:
    """As NCCL and HCCL do; gloo takes any."""

    def strict(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*tensors: Any, **arguments: Any) -> Any:
            assert all(tensor.is_contiguous() for tensor in tensors if isinstance(tensor, Tensor))
            return original(*tensors, **arguments)

        return call

    for module, name in ((collectives.dist, "all_reduce"), (collectives, "_all_gather_into"), (collectives, "_reduce_scatter_into")):
        setattr(module, name, strict(getattr(module, name)))


def check_formulas(group: Group) -> int:
    checked = 0
    for name, (forward, backward, has_dim) in DIFFERENTIABLE.items():
        for dim in (0, 1, -2) if has_dim else (0,):
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                for contiguous in (True, False):
                    case = f"{name} dim {dim} {dtype} contiguous {contiguous}"
                    xs = rank_tensors(SHAPE, checked, dtype)
                    x = laid_out(xs[group.rank], contiguous).requires_grad_()
                    y = getattr(collectives, name)(x, group, *([dim] if has_dim else []))
                    expected = forward(xs, group.rank, dim)
                    assert y.dtype == dtype and torch.equal(y, expected), case
                    gs = rank_tensors(expected.shape, 1000 + checked, dtype)
                    g = laid_out(gs[group.rank], contiguous)
                    (grad,) = torch.autograd.grad(y, x, g)
                    assert grad.dtype == dtype and torch.equal(grad, backward(gs, group.rank, dim)), case
                    # Neither the input nor a gradient that others may hold is written to.
                    assert torch.equal(x.detach(), xs[group.rank]) and torch.equal(g, gs[group.rank]), case
                    checked += 1
    return checked


def check_jacobians(group: Group) -> None:
    """Finite differences through both pairs as the layers compose them: every rank perturbs the same input in lockstep."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    parts = torch.randn(T, 3, 3, generator=generator, dtype=torch.float64)

    def tensor_parallel(x: Tensor) -> Tensor:
        entered = collectives.copy_to_tensor_parallel(x, group)
        return collectives.reduce_from_tensor_parallel((entered @ parts[group.rank]).tanh(), group)

    def sequence_parallel(x: Tensor) -> Tensor:
        mine = collectives.scatter_to_sequence_parallel(x, group, 1)
        entered = collectives.gather_from_sequence_parallel(mine, group, 1)
        left = collectives.reduce_scatter_to_sequence_parallel((entered @ parts[group.rank]).tanh(), group, 1)
        mine_among_zeros = [left if rank == group.rank else torch.zeros_like(left) for rank in range(T)]
        return collectives.reduce_from_tensor_parallel(torch.cat(mine_among_zeros, 1), group)

    whole = sum((x @ part).tanh() for part in parts)
    for function in (tensor_parallel, sequence_parallel):
        torch.testing.assert_close(function(x), whole, rtol=0, atol=1e-14)
        assert torch.autograd.gradcheck(function, x)


def check_plain(group: Group) -> None:
    mine = torch.arange(6.0).reshape(2, 3) * (group.rank + 1)
    both = [torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(2, 3) * 2]
    assert collectives.all_reduce(x := mine.clone(), group) is x and torch.equal(x, both[0] * 3)
    signed = torch.tensor([1.0, -1.0]) * (group.rank + 1)
    assert torch.equal(collectives.all_reduce_max(signed, group), torch.tensor([2.0, -1.0]))
    for dim in (0, 1, -1):
        assert torch.equal(collectives.all_gather(mine, group, dim), torch.cat(both, dim))
    assert torch.equal(collectives.reduce_scatter(mine, group, 0), both[0][group.rank : group.rank + 1] * 3)
    # A source is counted within the group: the second pair's first rank is rank 2 of the world.
    for source in range(T):
        assert collectives.broadcast(torch.tensor([group.ranks[group.rank]]), group, source).item() == group.ranks[source]
    assert collectives.broadcast_object({"from": group.ranks[group.rank]}, group) == {"from": group.ranks[0]}
    assert collectives.all_gather_objects(group.ranks[group.rank], group) == list(group.ranks)
    collectives.barrier(group)


def all_checks() -> tuple[int, int, int]:
    """Two tensor-parallel pairs side by side, so that a rank in its group is not its rank in the world."""
    rendezvous.initialize(60)
    groups = Groups.create(Topology(tensor=T, pipeline=1, data=2))
    demand_contiguous_tensors()
    checked = check_formulas(groups.tensor)
    check_jacobians(groups.tensor)
    check_plain(groups.tensor)
    seen = (checked, collectives.world_rank(), collectives.world_size())
    assert collectives.is_initialized()
    collectives.shutdown()
    assert not collectives.is_initialized()
    return seen


def test_collectives_follow_their_formulas() -> None:
    cases = (3 * 3 + 2) * 3 * 2
    assert run_distributed(all_checks, 4) == [(cases, rank, 4) for rank in range(4)]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_group_of_one_does_nothing(name: str) -> None:
    x = torch.randn(3, 5, requires_grad=True)  # an odd length: nothing may be cut
    y = getattr(collectives, name)(x, SINGLE, *([1] if DIFFERENTIABLE[name][2] else []))
    assert y is x


def test_plain_collectives_of_one_do_nothing() -> None:
    x, value = torch.randn(3, 5), object()
    functions: list[Callable[..., Any]] = [collectives.all_reduce, collectives.all_reduce_max]
    assert all(function(x, SINGLE) is x for function in functions)
    assert all(function(x, SINGLE, 1) is x for function in (collectives.all_gather, collectives.reduce_scatter, collectives.split))
    assert collectives.broadcast(x, SINGLE, 0) is x
    assert collectives.broadcast_object(value, SINGLE) is value
    assert collectives.all_gather_objects(value, SINGLE) == [value]
    collectives.barrier(SINGLE)
    collectives.shutdown()
    assert (collectives.world_rank(), collectives.world_size()) == (0, 1)
