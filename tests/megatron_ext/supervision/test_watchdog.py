"""The watchdog's judgement: where a thread is, who is to blame, and that a slow run is no hang. Whole runs: tests/faults."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.harness import RankError, run_distributed

from megatron_ext import collectives
from megatron_ext.supervision import rendezvous
from megatron_ext.supervision.thread_location import ThreadLocation, thread_location
from megatron_ext.supervision.watchdog import Watchdog, tell_hang
from megatron_ext.topology import Groups, Topology

PAIRS = Topology(tensor=2, pipeline=1, data=2)


def place_during(action: Callable[[], Any], groups: Groups) -> ThreadLocation:
    """Where this thread is half a second into an action, as another thread sees it."""
    main, seen = threading.get_ident(), []

    def look() -> None:
        time.sleep(0.5)
        seen.append(thread_location(sys._current_frames()[main], groups))

    observer = threading.Thread(target=look)
    observer.start()
    action()
    observer.join()
    return seen[0]


def places_of_collectives() -> list[ThreadLocation]:
    """Rank 3 comes a second late to everything."""
    rendezvous.initialize(60)
    groups = Groups.create(PAIRS)
    x = torch.ones(2, requires_grad=True)
    y = collectives.copy_to_tensor_parallel(x, groups.tensor).sum()
    foreign = torch.distributed.new_group([1, 3])
    actions: list[Callable[[], Any]] = [
        lambda: collectives.all_reduce(torch.ones(1), groups.tensor),
        y.backward,
        lambda: collectives.all_gather_objects("x", groups.world),
        lambda: torch.distributed.all_reduce(torch.ones(1)),
        lambda: torch.distributed.barrier(group=groups.data.handle),
        lambda: torch.distributed.all_gather_object([None, None], "x", group=foreign) if groups.world.rank in (1, 3) else None,
        lambda: torch.distributed.recv(torch.ones(1), 3) if groups.world.rank == 2 else None,
        lambda: torch.distributed.all_reduce(torch.ones(1), async_op=True).wait(),
    ]
    seen = []
    for number, action in enumerate(actions):
        if groups.world.rank == 3:
            time.sleep(1.0)
            torch.distributed.send(torch.ones(1), 2) if number == 6 else action()
        else:
            seen.append(place_during(action, groups))
    return seen


def test_a_waiting_thread_is_seen_in_its_collective() -> None:
    _, rank1, rank2, _ = run_distributed(places_of_collectives, 4)
    assert rank2[0] == ThreadLocation(True, "all_reduce(tensor group 2,3)")
    assert rank2[1] == ThreadLocation(True, "all_reduce(tensor group 2,3)")  # in a backward pass
    assert rank2[2] == ThreadLocation(True, "all_gather_objects(all ranks)")
    assert rank2[3] == ThreadLocation(True, "all_reduce(all ranks)")  # somebody else's call
    assert rank1[4] == ThreadLocation(True, "barrier(data group 1,3)")
    assert rank1[5] == ThreadLocation(True, "all_gather_object(data group 1,3)")  # a group we did not make
    assert rank2[6] == ThreadLocation(True, "recv(from rank 3)")
    assert rank2[7].waiting and rank2[7].text.startswith("<lambda> (megatron_ext/supervision/test_watchdog.py:")


def test_a_working_thread_is_seen_at_its_line() -> None:
    groups = Groups.from_topology(PAIRS, 0)
    place = place_during(lambda: time.sleep(0.7), groups)
    assert not place.waiting and place.text.startswith("<lambda> (megatron_ext/supervision/test_watchdog.py:")
    assert thread_location(None, groups) == ThreadLocation(False, "no Python code")


IN_A, IN_B, WORKING = (
    ThreadLocation(True, "all_reduce(tensor group 0,1)"),
    ThreadLocation(True, "barrier(all ranks)"),
    ThreadLocation(False, "read (data.py:3)"),
)


@pytest.mark.parametrize(
    ("places", "silent", "told"),
    [
        (
            {0: IN_A, 2: IN_B},
            {1: "is stopped"},
            "R1 has made no progress in S for 9 s; it is stopped, rank 0 waits in A, rank 2 waits in B",
        ),
        ({0: IN_A, 1: WORKING, 2: IN_A}, {}, "R1 has made no progress in S for 9 s; it is in W, ranks 0,2 wait in A"),
        ({0: IN_A, 1: IN_A, 2: IN_B}, {}, "R0 and R1 and R2 have made no progress in S for 9 s; ranks 0,1 wait in A, rank 2 waits in B"),
        ({0: WORKING, 1: WORKING}, {}, "R0 and R1 have made no progress in S for 9 s; ranks 0,1 are in W"),
        (
            {4: IN_A},
            {0: "is x", 1: "is y", 2: "is x", 3: "is x"},
            "ranks 0-3 have made no progress in S for 9 s; rank 0 is x, rank 1 is y, ",
        ),
        ({0: WORKING}, {}, "R0 has made no progress in S for 9 s; it is in W"),
    ],
)
def test_who_is_to_blame(places: dict[int, ThreadLocation], silent: dict[int, str], told: str) -> None:
    line = tell_hang(places, silent, lambda rank: f"R{rank}", "S", 9.0)
    for letter, place in (("A", IN_A), ("B", IN_B), ("W", WORKING)):
        line = line.replace(place.text, letter)
    assert line.startswith(told)


def waits_for_another(folder: Path, beating: bool) -> str:
    meeting = rendezvous.initialize(60)
    groups = Groups.create(Topology(tensor=1, pipeline=1, data=2))
    with Watchdog(meeting, groups, folder, 1.5, lambda error: (str(error), 1)) as watchdog:
        if meeting.rank == 1:
            for _ in watchdog.each(range(8)) if beating else range(8):
                time.sleep(0.5)
        collectives.barrier(groups.world)
    return "ended"


def test_a_rank_may_wait_while_another_gets_on(tmp_path: Path) -> None:
    assert run_distributed(waits_for_another, 2, tmp_path, True) == ["ended", "ended"]
    assert not list(tmp_path.iterdir())


def test_it_may_not_while_none_does(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="died with exit code 75"):
        run_distributed(waits_for_another, 2, tmp_path, False)
    assert (tmp_path / "hang-0/rank_00000.txt").exists()


def test_a_beat_costs_nothing_worth_naming(tmp_path: Path) -> None:
    watchdog = Watchdog(
        rendezvous.Rendezvous(0, torch.distributed.HashStore, (("", 1),), ""), Groups.from_topology(PAIRS, 0), tmp_path, 1.0, repr
    )
    began = time.perf_counter()
    for step in range(10_000):
        watchdog.beat(step, "training")
    assert (time.perf_counter() - began) / 10_000 < 20e-6
