"""Initial weights that are the same under every split, drawn in bounded memory.

A full matrix is divided into tiles of at most 1024 × 1024. Each tile has its own counter-based generator (Philox) keyed by the run's seed,
the parameter's canonical name and the tile's position, so a rank draws only the tiles that its slice overlaps and never holds more than
its slice and one tile. A padded row starts at zero, and the weights of the real rows do not depend on the padding.
"""

from __future__ import annotations

import hashlib
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from megatron_ext.context import ParallelContext, ParamInit
from megatron_ext.sharding import Init, ShardSpec

TILE = 1024


def make_parameter(spec: ShardSpec, context: ParallelContext) -> nn.Parameter:
    """Create this rank's slice of a parameter with its initial values; `parameter.shard_spec` is its spec.

    Values are written when the parameter is created, not later: under ZeRO-3 each module is sharded as soon as it is constructed.
    Also sets `parameter.model_parallel`, which tells DeepSpeed's gradient norm that the ranks hold different slices and not copies.
    """
    local = torch.empty(spec.local_shape(context.tensor.size), dtype=context.dtype, device=context.device)
    if context.fill is not None and not local.is_meta:
        with torch.no_grad():
            context.fill(local, spec, context.tensor.rank, context.tensor.size)
    parameter = nn.Parameter(local)
    parameter.shard_spec = spec  # type: ignore[attr-defined]
    parameter.model_parallel = spec.split_dim is not None and context.tensor.size > 1  # type: ignore[attr-defined]
    return parameter


def random_weights(seed: int) -> ParamInit:
    """An initializer that draws the same weights from a seed under every tensor-parallel split, on every device.

    They are drawn in fp32 and cast to the dtype of the slice.
    """

    def fill(local: Tensor, spec: ShardSpec, rank: int, size: int) -> None:
        if spec.init.kind == "constant":
            local.fill_(spec.init.value)
            return
        local.zero_()
        begins = [0] * len(spec.shape)
        if spec.split_dim is not None:
            begins[spec.split_dim] = spec.offset(rank, size)
        ends = [min(begin + width, whole) for begin, width, whole in zip(begins, local.shape, spec.shape, strict=True)]
        if any(begin >= end for begin, end in zip(begins, ends, strict=True)):
            return  # a rank may hold nothing but padding
        for tile in product(*(range(begin // TILE, -(-end // TILE)) for begin, end in zip(begins, ends, strict=True))):
            low = [index * TILE for index in tile]
            shape = tuple(min(TILE, whole - at) for at, whole in zip(low, spec.shape, strict=True))
            values = _draw(spec.init, shape, _key(seed, spec.name, tile))
            inside = [(max(begin, at), min(end, at + TILE)) for begin, end, at in zip(begins, ends, low, strict=True)]
            source = tuple(slice(first - at, last - at) for (first, last), at in zip(inside, low, strict=True))
            target = tuple(slice(first - begin, last - begin) for (first, last), begin in zip(inside, begins, strict=True))
            local[target] = torch.from_numpy(values[source]).to(device=local.device, dtype=local.dtype)

    return fill


def _key(seed: int, name: str, tile: tuple[int, ...]) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}/{tile}".encode(), digest_size=16).digest(), "little")


def _draw(init: Init, shape: tuple[int, ...], key: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=key))
    values = generator.standard_normal(shape, dtype=np.float32)
    if init.kind == "truncated_normal":
        while (outside := np.abs(values) > 2).any():
            values[outside] = generator.standard_normal(int(outside.sum()), dtype=np.float32)
    scaled: np.ndarray = values * np.float32(init.value)
    return scaled
