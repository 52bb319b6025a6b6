"""Finds the ranks that slow the others down: a device that computes more slowly than the rest, or a rank that waits longer for its data.

In a step all ranks wait for the slowest, and devices work behind the host's back, so a rank's own step time says nothing. Two things are
measured that mean the same on every backend: how long one and the same matrix product takes on each device, and how long each rank has
waited for its samples.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from megatron_ext import accelerator
from megatron_ext.collectives import all_gather_objects
from megatron_ext.topology import Groups

Item = TypeVar("Item")

FACTOR = 1.25
"""A rank is slow if its time is above this multiple of the median of all ranks."""
MIN_WAIT_SECONDS = 0.002
"""For data, a rank is slow only if it also waits this many seconds longer than the median: less does not slow the others down."""
REPORTS = 3
"""A rank is reported when it is slow this many times in a row: once is noise."""
_PRODUCTS = 5
_WIDTH_ON_CPU, _WIDTH = 256, 4096


class StragglerReport:
    """Compares the speed of the ranks of a run. Every rank creates one and calls it at the same steps."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._waited, self._items = 0.0, 0
        self._in_a_row: Counter[tuple[int, str]] = Counter()

    def timed(self, items: Iterator[Item]) -> Iterator[Item]:
        """Pass the items through, counting the time spent waiting for them."""
        while True:
            began = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            self._waited += time.perf_counter() - began
            self._items += 1
            yield item

    def __call__(self) -> list[str]:
        """One line for each rank that has just become slow, the same on every rank. Every rank must call this."""
        own = (self._product(), self._waited / max(1, self._items))
        self._waited, self._items = 0.0, 0
        products, waits = zip(*all_gather_objects(own, self._groups.world), strict=True)
        median = statistics.median(products)
        return [
            *self._told(
                "device", slow_ranks(products), [f"its device takes {s / median:.1f} times the median to compute" for s in products]
            ),
            *self._told("data", slow_ranks(waits, MIN_WAIT_SECONDS), [f"it waits {1000 * s:.0f} ms for each micro-batch" for s in waits]),
        ]

    def _told(self, kind: str, slow: Sequence[int], words: Sequence[str]) -> list[str]:
        for rank in range(len(words)):
            self._in_a_row[rank, kind] = self._in_a_row[rank, kind] + 1 if rank in slow else 0
        return [f"rank {rank} is slow: {words[rank]}" for rank in slow if self._in_a_row[rank, kind] == REPORTS]

    def _product(self) -> float:
        """Seconds of one product, the fastest of a few."""
        fastest, matrix = float("inf"), _matrix()  # not kept: on an accelerator it is 64 MB
        for _ in range(_PRODUCTS):
            accelerator.synchronize()
            began = time.perf_counter()
            matrix @ matrix
            accelerator.synchronize()
            fastest = min(fastest, time.perf_counter() - began)
        return fastest


def _matrix() -> Tensor:
    """A matrix that is the same on every rank: a pattern and not random numbers, so that no random stream advances."""
    width = _WIDTH_ON_CPU if accelerator.device().type == "cpu" else _WIDTH
    return torch.arange(width * width, device=accelerator.device(), dtype=torch.float32).view(width, width).sin_()


def slow_ranks(seconds: Sequence[float], least: float = 0.0) -> list[int]:
    """Ranks whose time is above `FACTOR` times the median and more than `least` seconds above it."""
    median = statistics.median(seconds)
    return [rank for rank, own in enumerate(seconds) if own > FACTOR * median and own - median > least]
