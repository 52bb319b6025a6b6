"""Collectives against times computed by hand: one gigabyte, no latency unless said."""

import pytest
from helpers.small_cluster import IDEAL, cluster

from pangu.planner.network import Network
from pangu.planner.profile import MeasuredLink

GB = 1e9


def network(latency_us: float = 1e-9) -> Network:
    return Network(cluster(latency_us), IDEAL)


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [
        (1, 1, []),
        (4, 1, [("group", 4)]),
        (2, 2, [("group", 2)]),
        (8, 1, [("group", 4), ("server", 2)]),
        (16, 1, [("group", 4), ("server", 2), ("cluster", 2)]),
        (2, 8, [("cluster", 2)]),  # one rank a server
        (2, 4, [("server", 2)]),  # one rank a group
        (4, 4, [("server", 2), ("cluster", 2)]),
        (6, 1, [("cluster", 6)]),  # servers cut such groups in different places: the slowest link for all
    ],
)
def test_the_levels_that_a_group_spans(size: int, stride: int, expected: list[tuple[str, int]]) -> None:
    assert [(hop.level.name, hop.ranks) for hop in network().hops(size, stride)] == expected


def test_collectives_by_hand() -> None:
    inside = 3 / 4 / 100  # seconds to scatter a gigabyte over a group
    across = 1 / 2 / 4 / 20  # a quarter of it between the groups of a server
    assert network().all_reduce(GB, 4, 1) == pytest.approx(2 * inside)
    assert network().gather(GB, 8, 1) == pytest.approx(inside + across)
    assert network().all_reduce(GB, 16, 1) == pytest.approx(2 * (inside + across + 1 / 2 / 8 / 10))
    assert network().flat_gather(GB, 16, 1) == pytest.approx(15 / 16 / 10)  # one ring at the speed of its slowest link
    assert network().all_reduce(GB, 1, 1) == network().flat_gather(GB, 1, 1) == network().send(GB, 1, 1) == 0


def test_each_step_of_a_ring_waits() -> None:
    slow = network(latency_us=1000.0)
    assert slow.all_reduce(0.0, 4, 1) == pytest.approx(2 * 3 * 1e-3)
    assert slow.all_reduce(0.0, 16, 1) == pytest.approx(2 * (3 + 1 + 1) * 1e-3)
    assert slow.send(0.0, 2, 1) == pytest.approx(1e-3)


def test_a_pipeline_waits_for_its_slowest_hop() -> None:
    assert network().send(GB, 4, 1) == pytest.approx(1 / 100)
    assert network().send(GB, 8, 1) == pytest.approx(1 / 20)
    assert network().send(GB, 2, 8) == pytest.approx(1 / 10)


def test_a_measured_link_replaces_the_data_sheet() -> None:
    links = tuple(MeasuredLink(level="group", ranks=ranks, bandwidth=bandwidth, latency_us=1e-9) for ranks, bandwidth in ((2, 50), (4, 30)))
    measured = Network(cluster(), IDEAL.model_copy(update={"links": links}))
    assert measured.gather(GB, 4, 1) == pytest.approx(3 / 4 / 30)
    assert measured.gather(GB, 2, 1) == pytest.approx(1 / 2 / 50)
    assert measured.gather(GB, 2, 4) == pytest.approx(1 / 2 / 20)  # that level was not measured
