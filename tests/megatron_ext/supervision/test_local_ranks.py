"""Worlds of local processes: results in rank order, and what is told when a rank fails, dies or never ends."""

from __future__ import annotations

import os
import time

import pytest
from helpers.harness import PRELOAD

from megatron_ext.supervision.local_ranks import RankError, run_ranks

TIMEOUT = 60.0


def place(prefix: str) -> tuple[str, str, str]:
    return prefix + os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_PORT"]


def fail_on_the_second() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("planted")
    time.sleep(TIMEOUT)


def die_on_the_second() -> None:
    if os.environ["RANK"] == "1":
        os._exit(7)
    time.sleep(TIMEOUT)


def wait_for_nobody() -> None:
    time.sleep(TIMEOUT)


def test_results_come_in_rank_order_and_all_ranks_meet_at_one_port() -> None:
    results = run_ranks(place, 3, "rank ", timeout=TIMEOUT, preload=PRELOAD)
    assert [result[0] for result in results] == ["rank 0", "rank 1", "rank 2"]
    assert {result[1] for result in results} == {"3"} and len({result[2] for result in results}) == 1


def test_a_rank_that_fails_ends_the_others_and_says_why() -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 failed:\nTraceback") as error:
        run_ranks(fail_on_the_second, 2, timeout=TIMEOUT, preload=PRELOAD)
    assert (error.value.rank, error.value.reason) == (1, "ValueError: planted")
    assert time.monotonic() - began < TIMEOUT / 2


def test_a_rank_that_dies_is_named_with_its_exit_code() -> None:
    with pytest.raises(RankError, match="rank 1 died with exit code 7") as error:
        run_ranks(die_on_the_second, 2, timeout=TIMEOUT, preload=PRELOAD)
    assert (error.value.rank, error.value.reason) == (1, "")


def test_a_world_that_does_not_end_shows_where_every_rank_is() -> None:
    with pytest.raises(RankError, match=r"no end after 8 s; ranks \[0, 1\] still run") as error:
        run_ranks(wait_for_nobody, 2, timeout=8.0, preload=PRELOAD)
    assert error.value.rank is None and str(error.value).count("in wait_for_nobody") == 2
