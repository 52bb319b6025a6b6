"""Order, bound and exceptions of work done ahead."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice

import pytest

from pangu.data.lookahead import ordered_map


def test_in_order_and_never_further_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in count():
            taken.append(number)
            yield number

    with ThreadPoolExecutor(4) as executor:
        results = ordered_map(executor, lambda number: number * number, items(), ahead=3)
        for number in range(10):
            assert next(results) == number * number
            assert len(taken) <= number + 1 + 3


def test_fewer_items_than_ahead() -> None:
    with ThreadPoolExecutor(2) as executor:
        assert list(ordered_map(executor, abs, [-1, -2], ahead=8)) == [1, 2]
        assert list(ordered_map(executor, abs, [], ahead=8)) == []


def test_an_exception_comes_in_its_place() -> None:
    with ThreadPoolExecutor(2) as executor:
        results = ordered_map(executor, lambda number: 6 // number, [1, 2, 0, 3], ahead=4)
        assert list(islice(results, 2)) == [6, 3]
        with pytest.raises(ZeroDivisionError):
            next(results)
