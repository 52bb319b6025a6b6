"""Initial weights: the same under every split, drawn from the right distribution, in bounded memory."""

from __future__ import annotations

import math
import tracemalloc

import pytest
import torch
from torch import Tensor

from megatron_ext import initialize
from megatron_ext.context import ParallelContext
from megatron_ext.initialize import make_parameter, random_weights
from megatron_ext.sharding import ONES, Init, ShardSpec
from megatron_ext.topology import Group

NORMAL = Init("normal", 0.02)
TRUNCATED = Init("truncated_normal", 0.02)


def draw(spec: ShardSpec, rank: int = 0, size: int = 1, *, seed: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    local = torch.full(spec.local_shape(size), math.nan, dtype=dtype)  # what is not written shows
    random_weights(seed)(local, spec, rank, size)
    return local


SPLITS = {
    "rows": ShardSpec("w", (96, 40), NORMAL, split_dim=0),
    "columns": ShardSpec("w", (40, 96), NORMAL, split_dim=1),
    "truncated rows": ShardSpec("w", (96, 40), TRUNCATED, split_dim=0),
    "vector": ShardSpec("w", (96,), NORMAL, split_dim=0),
    "ones": ShardSpec("w", (96,), ONES, split_dim=0),
    "vocabulary": ShardSpec("w", (50, 40), NORMAL, split_dim=0, padded=True),
    "vocabulary of few": ShardSpec("w", (5, 40), NORMAL, split_dim=0, padded=True),
    "vocabulary of one more": ShardSpec("w", (9, 40), NORMAL, split_dim=0, padded=True),
    "replicated": ShardSpec("w", (33, 40), NORMAL),
}


@pytest.mark.parametrize("tile", [1024, 16, 7])
@pytest.mark.parametrize("split", SPLITS)
def test_every_split_holds_the_same_weights(split: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialize, "TILE", tile)
    spec = SPLITS[split]
    whole = draw(spec)
    assert torch.isfinite(whole).all() and (whole != 0).all()
    for size in (2, 4, 8):
        slices = [draw(spec, rank, size) for rank in range(size)]
        if spec.split_dim is None:
            assert all(torch.equal(mine, whole) for mine in slices)
            continue
        padded = torch.cat(slices, spec.split_dim)
        real = spec.shape[spec.split_dim]
        assert torch.equal(padded.narrow(spec.split_dim, 0, real), whole), size
        assert (padded.narrow(spec.split_dim, real, padded.shape[spec.split_dim] - real) == 0).all(), size


def test_a_slice_draws_just_the_tiles_it_touches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialize, "TILE", 16)
    shapes: list[tuple[int, ...]] = []
    original = initialize._draw

    def counting(init: Init, shape: tuple[int, ...], key: int) -> object:
        shapes.append(shape)
        return original(init, shape, key)

    monkeypatch.setattr(initialize, "_draw", counting)
    spec = ShardSpec("w", (100, 40), NORMAL, split_dim=0)
    draw(spec, 1, 4)  # rows 25 to 49 lie in tile rows 1, 2 and 3; 40 columns in three tiles, the last 8 wide
    assert sorted(shapes) == sorted([(16, 16), (16, 16), (16, 8)] * 3)
    shapes.clear()
    draw(ShardSpec("w", (9, 40), NORMAL, split_dim=0, padded=True), 7, 8)  # nothing but padding
    assert shapes == []


def test_a_rank_never_holds_a_full_matrix() -> None:
    """A column slice of 64 MiB touches every row of tiles; beside it there may be a tile of 4 MiB and what its drawing takes."""
    spec = ShardSpec("w", (8192, 2048), TRUNCATED, split_dim=1)
    local = torch.empty(spec.local_shape(64))
    tracemalloc.start()
    try:
        random_weights(1)(local, spec, 5, 64)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    tile = 4 * 1024 * 1024
    assert tile < peak < 4 * tile


def test_normal_weights_have_the_moments_of_a_normal() -> None:
    values = (draw(ShardSpec("w", (1500, 700), NORMAL)).double() / 0.02).flatten()
    count = values.numel()
    assert abs(values.mean()) < 4 / math.sqrt(count)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((values**3).mean()) < 4 * math.sqrt(15 / count)
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96 / count)
    assert values.abs().max() > 4  # not cut off


def test_truncated_weights_are_cut_at_two_deviations_and_normal_between() -> None:
    values = (draw(ShardSpec("w", (1500, 700), TRUNCATED)).double() / 0.02).flatten()
    count = values.numel()
    assert 1.999 < values.abs().max() <= 2.0 + 1e-6
    # Of a standard normal cut at ±2: variance 1 - 4·φ(2)/(Φ(2) - Φ(-2)).
    inside = math.erf(math.sqrt(2.0))
    variance = 1 - 4 * math.exp(-2.0) / math.sqrt(2 * math.pi) / inside
    assert abs(values.mean()) < 4 / math.sqrt(count)
    assert abs(values.var() - variance) < 4 / math.sqrt(count)
    # Drawn again, not clamped: within ±1 lies its share of the normal, and nothing gathers at the bounds.
    share = math.erf(math.sqrt(0.5)) / inside
    assert abs((values.abs() < 1).double().mean() - share) < 4 * math.sqrt(share * (1 - share) / count)
    assert (values.abs() > 1.999).double().mean() < 3e-4


def test_other_names_seeds_and_tiles_are_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialize, "TILE", 32)
    base = draw(ShardSpec("a", (128, 64), NORMAL))
    others = [
        draw(ShardSpec("b", (128, 64), NORMAL)),
        draw(ShardSpec("a", (128, 64), NORMAL), seed=8),
    ]
    tiles = [tile for matrix in (base, *others) for rows in matrix.split(32) for tile in rows.split(32, dim=1)]
    correlation = torch.corrcoef(torch.stack([tile.flatten() for tile in tiles]))
    assert (correlation - torch.eye(len(tiles))).abs().max() < 6 / math.sqrt(32 * 32)
    assert torch.equal(draw(ShardSpec("a", (128, 64), NORMAL)), base)


def test_the_default_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    draw(ShardSpec("a", (8, 8), TRUNCATED))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_the_rounded_fp32_value(dtype: torch.dtype) -> None:
    spec = ShardSpec("w", (50, 8), NORMAL, split_dim=0, padded=True)
    for rank in range(4):
        assert torch.equal(draw(spec, rank, 4, dtype=dtype), draw(spec, rank, 4).to(dtype))
    context = ParallelContext(tensor=Group((0, 1, 2, 3), 3), dtype=dtype, fill=random_weights(7))
    assert torch.equal(make_parameter(spec, context), draw(spec, 3, 4, dtype=dtype))


def test_a_parameter_carries_its_spec_and_whether_ranks_hold_different_slices() -> None:
    split, whole = ShardSpec("w", (6, 4), NORMAL, split_dim=0), ShardSpec("b", (6,), ONES)
    for size in (1, 2):
        context = ParallelContext(tensor=Group(tuple(range(size)), size - 1), fill=random_weights(3))
        parameter, replicated = make_parameter(split, context), make_parameter(whole, context)
        assert parameter.shard_spec is split and replicated.shard_spec is whole
        assert (parameter.model_parallel, replicated.model_parallel) == (size > 1, False)
        assert torch.equal(parameter.detach(), draw(split, size - 1, size, seed=3))
        assert parameter.requires_grad and torch.equal(replicated.detach(), torch.ones(6))


def test_nothing_is_filled_on_the_meta_device() -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    context = ParallelContext(device=torch.device("meta"), fill=refuse)
    assert make_parameter(ShardSpec("w", (6, 4), NORMAL), context).is_meta
