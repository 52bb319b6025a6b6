"""The bytes of a tensor in the form of a file: in C order, with the file's dtype, one block at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 16 * 2**20
"""Number of bytes that are converted to another dtype at once."""


def blocks(tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """The bytes of a tensor in C order, converted block by block.

    A transposed tensor is copied once as a whole: block by block that would take three times as long.
    """
    rows = tensor.contiguous().view(tensor.shape or (1,))
    row_bytes = math.prod(rows.shape[1:]) * dtype.itemsize
    for block in rows.split(max(1, BLOCK_BYTES // max(1, row_bytes))):
        yield block.to(dtype).view(-1).view(torch.uint8).numpy().data
