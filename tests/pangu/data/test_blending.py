"""Proportions, determinism and O(1) access of the blend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pangu.data.blending import PERIOD, BlendedDataset
from pangu.errors import InputError

# Table 4 of the paper, per cent of the samples: public datasets, encyclopedia, e-books, Common Crawl, news.
TABLE_4 = [27.99, 18.0, 5.6, 10.0, 38.41]


class Source:
    """Stands for a PackedDataset: its samples say where they come from."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __getitem__(self, index: int) -> np.ndarray:
        return np.array([self.number, index])


def blend(weights: list[float]) -> BlendedDataset:
    sources: list[Any] = [Source(number) for number in range(len(weights))]
    return BlendedDataset(sources, weights)


@pytest.mark.parametrize("weights", [TABLE_4, [1.0], [1, 1], [0.7, 0.3], [1, 1, 1], [100, 1, 1e-3], [3] * 70])
def test_every_stretch_has_the_mix(weights: list[float]) -> None:
    dataset = blend(weights)
    shares = np.array(weights) / sum(weights)
    sources = np.array([dataset.locate(index)[0] for index in range(PERIOD)])
    counts = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    wanted = np.arange(1, PERIOD + 1)[:, None] * shares
    # Half a sample, the sources that are due at the same time, and the rounding of shares to 1 / PERIOD.
    assert np.abs(counts - wanted).max() <= 0.5 + len(weights) / 2 + 1
    assert (np.abs(counts[-1] - wanted[-1]) < 1).all() and (counts[-1] > 0).all()


def test_equal_weights_take_turns() -> None:
    dataset = blend([1, 1])
    assert [dataset.locate(index)[0] for index in range(PERIOD)] == [0, 1] * (PERIOD // 2)


def test_each_source_is_read_in_its_order_across_periods() -> None:
    dataset = blend(TABLE_4)
    seen = [0] * len(TABLE_4)
    for index in range(PERIOD + 5000):
        source, sample = dataset.locate(index)
        assert sample == seen[source]
        seen[source] += 1


def test_any_sample_without_those_before() -> None:
    # The counts are exact, so far into a run the arithmetic can be done by hand.
    dataset = blend([0.75, 0.25])
    assert [dataset.locate(4 * 10**12 + place) for place in range(4)] == [
        (0, 3 * 10**12),
        (0, 3 * 10**12 + 1),
        (1, 10**12),
        (0, 3 * 10**12 + 2),
    ]
    assert dataset[4 * 10**12 + 2].tolist() == [1, 10**12]


def test_a_tiny_share_is_rounded_up() -> None:
    dataset = blend([1e-9, 1.0, 1e-9])
    assert sorted(dataset.locate(index)[0] for index in range(PERIOD)).count(0) == 1


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_must_be_positive(weight: float) -> None:
    with pytest.raises(InputError, match=rf"data\.weights: weight 1 is {weight}, a positive number expected"):
        blend([1.0, weight])


def test_one_weight_a_source() -> None:
    sources: list[Any] = [Source(0), Source(1)]
    with pytest.raises(InputError, match="3 weights found, 2 expected"):
        BlendedDataset(sources, [1, 2, 3])
