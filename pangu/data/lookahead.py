"""Computes items ahead of their use, in order and in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(executor: Executor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """Yield `function(item)` for every item, in the items' order, with at most `ahead` of them being computed or waiting to be consumed.

    `Executor.map` would read all items at once. An exception of the function is raised in place of its result.
    """
    remaining = iter(items)
    pending: deque[Future[Result]] = deque(executor.submit(function, item) for item in islice(remaining, ahead))
    while pending:
        result = pending.popleft().result()
        for item in islice(remaining, 1):
            pending.append(executor.submit(function, item))
        yield result
