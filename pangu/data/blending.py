"""Mixes sources by weight, as PanGu-α's training data is (arXiv 2104.12369, Table 4), in an order that needs no history.

The order is periodic. In a period of PERIOD samples, source j gets its share c_j; its sample n is due at (n + 1/2) * PERIOD / c_j, and the
samples are read as they fall due. So every stretch of the stream has about the right mix, and sample i of the blend is found in O(1):
place `i % PERIOD` of the pattern says which source, and how many of its samples came before it in the period.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pangu.data.packing import PackedDataset
from pangu.errors import InputError

# Shares are rounded to 1 / PERIOD: exact for a decimal fraction of up to five places.
PERIOD = 100_000


class BlendedDataset:
    """Samples from several sources; `dataset[i]` is defined for every i >= 0. The samples of each source are read in that source's order.

    Args:
        sources: one or more data sets.
        weights: relative share of the samples from each source; positive, with any sum. Each source has at least one sample per period.

    Raises:
        InputError: if `weights` does not have one positive number per source.
    """

    def __init__(self, sources: Sequence[PackedDataset], weights: Sequence[float]) -> None:
        counts = _counts(weights, len(sources))
        self.sources = sources
        self._counts = counts
        due = np.concatenate([(np.arange(count) + 0.5) * PERIOD / count for count in counts])
        order = np.argsort(due, kind="stable")  # stable: of samples due at once, the earlier source's comes first
        self._source = np.repeat(np.arange(len(counts), dtype=np.int32), counts)[order]
        self._index = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])[order]

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of all sources together, each counted once."""
        return sum(source.tokens_per_epoch for source in self.sources)

    def locate(self, index: int) -> tuple[int, int]:
        """Index of the source, and of the sample within that source, for sample `index` of the blend."""
        period, place = divmod(index, PERIOD)
        source = int(self._source[place])
        return source, period * int(self._counts[source]) + int(self._index[place])

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Sample `index`: int64[seq_length + 1]."""
        source, sample = self.locate(index)
        return self.sources[source][sample]


def _counts(weights: Sequence[float], num_sources: int) -> NDArray[np.int64]:
    """Number of samples of each source per period: at least 1, rounded by largest remainder; they sum to PERIOD."""
    if len(weights) != num_sources:
        raise InputError(f"data.weights: {len(weights)} weights found, {num_sources} expected, one for each entry of data.train.")
    for number, weight in enumerate(weights):
        if not (np.isfinite(weight) and weight > 0):
            raise InputError(
                f"data.weights: weight {number} is {weight}, a positive number expected. Or leave its source out of data.train."
            )
    shares = np.array(weights, np.float64) / np.sum(weights) * PERIOD
    # A share that is a whole number but for rounding error counts as that number.
    counts = np.maximum(np.floor(shares + 1e-6), 1).astype(np.int64)
    missing = PERIOD - int(counts.sum())
    if missing < 0:  # shares were raised to 1
        counts[counts.argmax()] += missing
    else:
        counts[np.argsort(counts - shares, kind="stable")[:missing]] += 1
    return counts
