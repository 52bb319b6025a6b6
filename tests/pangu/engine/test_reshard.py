"""Which elements of a full tensor a rank takes for its piece; into whole layouts: tests/distributed/test_resume_matrix.py."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.sharding import ZEROS, ShardSpec
from pangu.engine.reshard import _read_piece, _Slot
from pangu.tensor_files.lazy_tensor import LazyTensor


@pytest.mark.parametrize("can_read_parts", [True, False])
@pytest.mark.parametrize(
    "spec",
    [
        ShardSpec("whole", (6, 5), ZEROS),
        ShardSpec("bias", (12,), ZEROS, split_dim=0),
        ShardSpec("rows", (12, 5), ZEROS, split_dim=0),
        ShardSpec("columns", (5, 12), ZEROS, split_dim=1),
        ShardSpec("padded", (7, 5), ZEROS, split_dim=0, padded=True),
    ],
    ids=lambda spec: spec.name,
)
def test_every_piece_of_every_slice(spec: ShardSpec, can_read_parts: bool) -> None:
    """All begins and lengths, beyond the end too, which ZeRO's last rank pads: the flattened slice is cut, and the rest is zeros."""
    full = torch.arange(1.0, 1.0 + torch.Size(spec.shape).numel()).view(spec.shape)
    reads: list[int] = []

    def part(dim: int, begin: int, end: int) -> torch.Tensor:
        assert 0 <= begin < end <= spec.shape[dim]
        reads.append(end - begin)
        return full.narrow(dim, begin, end - begin)

    lazy = LazyTensor(spec.shape, full.dtype, lambda: full, part if can_read_parts else None)
    for size in (1, 2, 3):
        if spec.split_dim is None and size > 1:
            continue
        for rank in range(size):
            flat = spec.slice(full, rank, size).reshape(-1)
            padded = torch.cat([flat, torch.zeros(4)])
            width = spec.local_shape(size)[1] if len(spec.shape) > 1 else 1
            for begin in range(len(flat)):
                for count in range(1, len(padded) - begin + 1):
                    reads.clear()
                    piece = _read_piece(lazy, _Slot(spec, begin, {}), rank, size, count)
                    assert torch.equal(piece, padded[begin : begin + count]), (size, rank, begin, count)
                    assert sum(reads) <= count // width + 2  # no more rows than the piece touches
