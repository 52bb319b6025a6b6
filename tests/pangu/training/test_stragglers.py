"""Slow ranks are found, by what is slow, and a single slow moment is not told."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from helpers.harness import run_distributed

from megatron_ext.supervision import rendezvous
from megatron_ext.topology import Groups, Topology
from pangu.training import stragglers
from pangu.training.stragglers import REPORTS, StragglerReport, slow_ranks


@pytest.mark.parametrize(
    ("seconds", "least", "slow"),
    [
        ([1.0], 0.0, []),
        ([1.0, 1.0, 1.0, 1.0], 0.0, []),
        ([1.0, 1.2, 1.1, 1.0], 0.0, []),
        ([1.0, 1.0, 1.4, 1.0], 0.0, [2]),
        ([1.0, 3.0], 0.0, [1]),  # of two, the median lies between them
        ([0.0, 0.0, 0.001, 0.0], 0.002, []),
        ([0.0, 0.0, 0.3, 0.0], 0.002, [2]),
        ([2.0, 1.0, 1.0, 2.0, 1.0], 0.0, [0, 3]),
    ],
)
def test_who_stands_out(seconds: list[float], least: float, slow: list[int]) -> None:
    assert slow_ranks(seconds, least) == slow


def reports_of_a_rank(slow_rank: int, slow_reports: list[bool], what: str) -> tuple[list[list[str]], bool]:
    """What is told after each report, where `slow_rank` is slow in some; and whether no random stream has moved."""
    rendezvous.initialize(60)
    groups = Groups.create(Topology(tensor=1, pipeline=1, data=2))
    state = torch.get_rng_state()
    report = StragglerReport(groups)
    is_slow = False

    def batches() -> Iterator[int]:
        while True:
            time.sleep(0.05 if is_slow and what == "data" else 0.0)
            yield 1

    class Slow(torch.Tensor):
        """A device that takes ten times as long."""

        def __matmul__(self, other: object) -> torch.Tensor:
            time.sleep(0.02 if is_slow and what == "device" else 0.0)
            return torch.zeros(())

    intact = stragglers._matrix
    stragglers._matrix = lambda: intact().as_subclass(Slow)
    items, told = report.timed(batches()), []
    for slow in slow_reports:
        is_slow = slow and groups.world.rank == slow_rank
        for _ in range(3):
            next(items)
        told.append([line for line in report() if what in ("device", "data")])
    return told, torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("what", "words"), [("data", "ms for each micro-batch"), ("device", "times the median to compute")])
def test_a_slow_rank_is_told_once_when_it_is_slow_for_long(what: str, words: str) -> None:
    pattern = [True, True, False, *[True] * (REPORTS + 2)]
    for told, stream_is_where_it_was in run_distributed(reports_of_a_rank, 2, 1, pattern, what):
        mine = [[line for line in lines if words in line] for lines in told]
        assert [len(lines) for lines in mine] == [0, 0, 0, 0, 0, 1, 0, 0]
        assert mine[5][0].startswith("rank 1 is slow: ")
        assert stream_is_where_it_was
