"""A tensor in a file that is read lazily, and one that is merged from slices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LazyTensor:
    """A full tensor in the canonical layout that is read lazily."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Reads the tensor. The result may be a view of a memory-mapped file: do not write into it, and drop it before reading the next."""
    read_part: Callable[[int, int, int], Tensor] | None = None
    """Reads [begin, end) along a dimension, given (dimension, begin, end); None if the format cannot do that without reading all."""
    copies: Callable[[], Iterable[tuple[str, LazyTensor]]] = tuple
    """Other places in which the source holds the same tensor, which are used only for verification: (description, stored tensor)."""

    def part(self, dimension: int, begin: int, end: int) -> Tensor:
        """Read [begin, end) along a dimension, and no more than that if the format allows it."""
        return self.read_part(dimension, begin, end) if self.read_part else self.read().narrow(dimension, begin, end - begin)


def merged(pieces: Sequence[LazyTensor], split_dim: int | None, shape: tuple[int, ...]) -> LazyTensor:
    """The full tensor merged from its slices like `ShardSpec.merge`, with one slice mapped at a time.

    Args:
        pieces: the slices in rank order, all of one shape and dtype. For a replicated tensor the first is read, the others are copies.
        split_dim: the dimension that is split; None for a replicated tensor.
        shape: shape of the full tensor; if the slices are larger together, the rest is padding and dropped.
    """

    def part(dim: int, begin: int, end: int) -> Tensor:
        if split_dim is None or len(pieces) == 1:
            whole = pieces[0].read()
            if split_dim is not None:
                whole = whole.narrow(split_dim, 0, shape[split_dim])
            return whole.narrow(dim, begin, end - begin)
        extents = list(shape)
        extents[dim] = end - begin
        result = torch.empty(extents, dtype=pieces[0].dtype)
        low, high = (begin, end) if dim == split_dim else (0, shape[split_dim])
        width = pieces[0].shape[split_dim]
        for number, piece in enumerate(pieces):
            first, last = max(low, number * width), min(high, (number + 1) * width)
            if first < last:
                values = piece.read().narrow(split_dim, first - number * width, last - first)
                if dim != split_dim:
                    values = values.narrow(dim, begin, end - begin)
                result.narrow(split_dim, first - low, last - first).copy_(values)
        return result

    if split_dim is None:
        copies = [(f"tensor rank {rank}", piece) for rank, piece in enumerate(pieces[1:], start=1)]
        return LazyTensor(shape, pieces[0].dtype, pieces[0].read, part, lambda: copies)
    return LazyTensor(shape, pieces[0].dtype, lambda: part(0, 0, shape[0]), part)
