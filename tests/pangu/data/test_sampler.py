"""Where a sample is in the global batch does not depend on the layout."""

from __future__ import annotations

from itertools import islice

import pytest

from pangu.data.sampler import Sampler


def global_batch(step: int, micro: int, ranks: int, consumed: int = 0) -> list[int]:
    """The samples of one step, by rank and micro-batch."""
    samples: list[int] = []
    for rank in range(ranks):
        sampler = Sampler(24, micro, ranks, rank)
        count = sampler.micro_batches_per_step
        for indices in islice(sampler.micro_batches(consumed), step * count, (step + 1) * count):
            assert len(indices) == micro
            samples += indices
    return samples


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (24, 1), (2, 1), (1, 4), (2, 3), (3, 8), (6, 2), (1, 24)])
def test_every_layout_reads_the_same(micro: int, ranks: int) -> None:
    for step in range(3):
        assert global_batch(step, micro, ranks) == list(range(step * 24, (step + 1) * 24))


@pytest.mark.parametrize(("micro", "ranks"), [(2, 1), (2, 3), (3, 4)])
def test_resume_continues(micro: int, ranks: int) -> None:
    for step in range(3):
        assert global_batch(0, micro, ranks, consumed=step * 24) == global_batch(step, micro, ranks)


def test_resume_with_another_global_batch_size() -> None:
    assert next(Sampler(8, 4).micro_batches(36)) == range(36, 40)
