"""ShardSpec: slices and merges against arithmetic done by hand."""

from __future__ import annotations

import pytest
import torch
from helpers.ranks import share
from torch import nn

from megatron_ext.context import ParallelContext
from megatron_ext.errors import LayoutError
from megatron_ext.layers import LayerNorm, VocabParallelEmbedding
from megatron_ext.sharding import ONES, ZEROS, Init, ShardSpec, canonical_parameters, spec_of

CASES = [
    ((16, 6), 0, False),
    ((6, 16), 1, False),
    ((16,), 0, False),
    ((6, 5), None, False),
    ((50, 3), 0, True),
    ((5, 3), 0, True),
    ((1, 3), 0, True),
    ((3, 50), 1, True),
    ((48, 3), 0, True),
]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize(("shape", "dim", "padded"), CASES)
def test_slices_are_consecutive_equal_and_merge_to_the_whole(shape: tuple[int, ...], dim: int | None, padded: bool, size: int) -> None:
    spec = ShardSpec("w", shape, ZEROS, split_dim=dim, padded=padded)
    full = torch.arange(1.0, torch.Size(shape).numel() + 1).reshape(shape)
    slices = [spec.slice(full, rank, size) for rank in range(size)]
    for rank, mine in enumerate(slices):
        expected = full if dim is None else share(full, rank, size, dim)
        assert torch.equal(mine, expected)
        assert tuple(mine.shape) == spec.local_shape(size)
        assert spec.offset(rank, size) == (0 if dim is None else rank * mine.shape[dim])
    assert torch.equal(spec.merge(slices), full)
    whole_padded = torch.cat(slices, dim) if dim is not None else full
    assert tuple(whole_padded.shape) == spec.padded_shape(size)
    assert torch.equal(spec.merge([whole_padded]), full)


def test_a_tiny_vocabulary_leaves_a_rank_with_padding_alone() -> None:
    spec = ShardSpec("w", (5, 2), ZEROS, split_dim=0, padded=True)
    full = torch.ones(5, 2)
    assert [int(spec.slice(full, rank, 4).sum()) // 2 for rank in range(4)] == [2, 2, 1, 0]
    assert [tuple(spec.slice(full, rank, 4).shape) for rank in range(4)] == [(2, 2)] * 4


def test_a_slice_without_padding_is_a_view() -> None:
    full = torch.zeros(8, 4)
    for dim in (0, 1):
        spec = ShardSpec("w", (8, 4), ZEROS, split_dim=dim)
        spec.slice(full, 1, 2).fill_(dim + 1.0)
    assert full[0].tolist() == [0.0, 0.0, 2.0, 2.0] and full[4].tolist() == [1.0, 1.0, 2.0, 2.0]


def test_a_padded_slice_never_writes_into_the_whole() -> None:
    full = torch.ones(5, 2)
    ShardSpec("w", (5, 2), ZEROS, split_dim=0, padded=True).slice(full, 2, 4).fill_(7.0)
    assert (full == 1).all()


def test_what_does_not_divide_and_may_not_be_padded_is_refused() -> None:
    spec = ShardSpec("transformer.h.0.mlp.c_fc.weight", (10, 4), ZEROS, split_dim=0)
    with pytest.raises(LayoutError) as error:
        spec.local_shape(4)
    assert all(part in str(error.value) for part in ("transformer.h.0.mlp.c_fc.weight", "[10, 4]", "dimension 0", "size 4"))


def test_tensors_of_another_shape_are_refused() -> None:
    spec = ShardSpec("w", (4, 2), ZEROS, split_dim=0)
    with pytest.raises(LayoutError, match=r"w: found shape \[4, 3\], expected \[4, 2\]"):
        spec.slice(torch.zeros(4, 3), 0, 2)
    for slices in ([torch.zeros(2, 3)] * 2, [torch.zeros(1, 2)] * 2, [torch.zeros(2, 2)]):
        with pytest.raises(LayoutError, match="w: found shape"):
            spec.merge(slices)


def test_a_replicated_parameter_is_the_first_ranks() -> None:
    spec = ShardSpec("w", (2,), ONES)
    assert torch.equal(spec.merge([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]), torch.tensor([1.0, 2.0]))


def test_canonical_parameters_are_each_named_once() -> None:
    context = ParallelContext(device=torch.device("meta"))
    words = VocabParallelEmbedding(7, 4, context, name="wte", init=Init("normal", 1.0))
    module = nn.ModuleList([words, LayerNorm(4, context, name="ln"), words])
    assert [spec.name for spec, _ in canonical_parameters(module)] == ["wte.weight", "ln.weight", "ln.bias"]
    assert all(spec_of(parameter) is spec for spec, parameter in canonical_parameters(module))
