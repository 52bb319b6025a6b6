"""Programs that do the same job take turns in one process, so that what else the machine does bears on all alike."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any


def take_turns(runs: dict[str, Callable[[], Any]], repeats: int, num_tokens: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Tokens a second of each, one number a turn. The first turn warms up and is not counted; every other turn goes backwards."""
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            began = clock()
            runs[name]()
            speed = num_tokens / (clock() - began)
            if turn:
                speeds[name].append(speed)
                print(f"turn {turn} of {repeats}: {name} {speed:.1f} tokens/s", file=sys.stderr, flush=True)
    return speeds


def summary(speeds: list[float]) -> dict[str, Any]:
    """The median speed and all of them."""
    return {"tokens_per_second": statistics.median(speeds), "all_tokens_per_second": speeds}
