"""Ranks and places: the same grid as DeepSpeed's, groups that really connect their members, and refusals that show the arithmetic."""

from __future__ import annotations

import pytest
import torch
from helpers.harness import run_distributed

from megatron_ext.collectives import all_gather_objects, all_reduce
from megatron_ext.errors import LayoutError, ranks_in_words
from megatron_ext.supervision import rendezvous
from megatron_ext.topology import SINGLE, Group, Groups, Order, Topology

LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 3, 1), (1, 1, 4), (2, 3, 1), (2, 1, 4), (1, 3, 2), (2, 3, 4), (8, 4, 2), (3, 5, 7)]


@pytest.mark.parametrize("order", ["tp-dp-pp", "tp-pp-dp"])
@pytest.mark.parametrize(("tensor", "pipeline", "data"), LAYOUTS)
def test_ranks_and_groups_are_deepspeeds(tensor: int, pipeline: int, data: int, order: Order) -> None:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology, ProcessTopology

    ours = Topology(tensor=tensor, pipeline=pipeline, data=data, order=order)
    if order == "tp-dp-pp":
        theirs = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data)
    else:
        theirs = ProcessTopology(axes=["data", "pipe", "model"], dims=[data, pipeline, tensor])
    assert ours.world_size == theirs.world_size() == tensor * pipeline * data
    for rank in range(ours.world_size):
        place = ours.coordinates(rank)
        assert theirs.get_rank(pipe=place.pipe, data=place.data, model=place.tensor) == rank
        assert ours.rank(*place) == rank
    for axis, groups in (("model", ours.tensor_groups()), ("data", ours.data_groups()), ("pipe", ours.pipeline_groups())):
        # DeepSpeed lists no groups along an axis of one.
        expected = theirs.get_axis_comm_lists(axis) if len(groups[0]) > 1 else [[rank] for rank in range(ours.world_size)]
        assert sorted(groups) == sorted(map(tuple, expected))


def test_tensor_neighbours_are_consecutive_ranks() -> None:
    """Written out once by hand, so that not everything rests on DeepSpeed: 2 stages of 2 replicas of 2 slices."""
    topology = Topology(tensor=2, pipeline=2, data=2)
    assert topology.tensor_groups() == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert topology.data_groups() == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert topology.pipeline_groups() == [(0, 4), (1, 5), (2, 6), (3, 7)]
    groups = Groups.from_topology(topology, 6)
    assert (groups.tensor, groups.data, groups.pipeline) == (Group((6, 7), 0), Group((4, 6), 1), Group((2, 6), 1))
    assert groups.world == Group(tuple(range(8)), 6)
    assert groups.coordinates == (1, 1, 0)


def test_stages_of_a_pipeline_are_neighbours_in_the_papers_order() -> None:
    topology = Topology(tensor=2, pipeline=2, data=2, order="tp-pp-dp")
    assert topology.tensor_groups() == [(0, 1), (4, 5), (2, 3), (6, 7)]
    assert topology.data_groups() == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert topology.pipeline_groups() == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert topology.coordinates(6) == (1, 1, 0)


def test_data_axis_takes_what_remains() -> None:
    assert Topology.from_world_size(24, tensor=2, pipeline=3) == Topology(tensor=2, pipeline=3, data=4)


@pytest.mark.parametrize(
    ("world_size", "tensor", "pipeline", "shown"),
    [
        (6, 4, 1, "6 is not a multiple of 4 x 1 = 4"),
        (8, 2, 3, "8 is not a multiple of 2 x 3 = 6"),
        (1, 1, 2, "1 is not a multiple of 1 x 2"),
    ],
)
def test_a_world_that_does_not_divide_is_refused_with_the_arithmetic(world_size: int, tensor: int, pipeline: int, shown: str) -> None:
    with pytest.raises(LayoutError) as error:
        Topology.from_world_size(world_size, tensor=tensor, pipeline=pipeline)
    message = str(error.value)
    assert shown in message
    assert f"Start a multiple of {tensor * pipeline} processes" in message
    assert "\n" not in message


@pytest.mark.parametrize("axis", ["tensor", "pipeline", "data"])
def test_an_axis_of_no_ranks_is_refused_by_name(axis: str) -> None:
    with pytest.raises(LayoutError, match=f"the {axis}-parallel size is 0"):
        Topology(**{"tensor": 1, "pipeline": 1, "data": 1, axis: 0})


def test_a_rank_outside_the_layout_is_refused() -> None:
    for rank in (-1, 4):
        with pytest.raises(LayoutError, match=rf"rank {rank} is outside a layout of 4 processes"):
            Topology(tensor=2, pipeline=2, data=1).coordinates(rank)


def test_a_group_of_one_needs_no_processes() -> None:
    assert (SINGLE.size, SINGLE.rank, SINGLE.handle) == (1, 0, None)


FOUR = [(2, 2, 1), (2, 1, 2), (1, 2, 2), (4, 1, 1), (1, 1, 4)]


def members() -> list[tuple[Groups, dict[str, tuple[int, ...]]]]:
    """What `create` says of this rank's groups, without handles, and which ranks a sum over each group really reaches."""
    rendezvous.initialize(60)
    found = []
    for tensor, pipeline, data in FOUR:
        topology = Topology(tensor=tensor, pipeline=pipeline, data=data)
        groups = Groups.create(topology)
        reached = {}
        for axis in ("tensor", "pipeline", "data"):
            ones = torch.zeros(4)
            ones[groups.world.rank] = 1.0
            reached[axis] = tuple(all_reduce(ones, getattr(groups, axis)).nonzero().flatten().tolist())
        assert all_gather_objects(groups.world.rank, groups.world) == [0, 1, 2, 3]
        bare = [Group(group.ranks, group.rank) for group in (groups.tensor, groups.pipeline, groups.data, groups.world)]
        found.append((Groups(topology, groups.coordinates, *bare), reached))
    with pytest.raises(LayoutError, match=r"4 processes run, but the layout .* is for 2"):
        Groups.create(Topology(tensor=2, pipeline=1, data=1))
    return found


def test_created_groups_are_the_described_ones_and_connect_their_members() -> None:
    for rank, found in enumerate(run_distributed(members, 4)):
        for layout, (created, reached) in zip(FOUR, found, strict=True):
            tensor, pipeline, data = layout
            described = Groups.from_topology(Topology(tensor=tensor, pipeline=pipeline, data=data), rank)
            assert created == described
            assert reached == {axis: getattr(described, axis).ranks for axis in ("tensor", "pipeline", "data")}


@pytest.mark.parametrize(
    ("ranks", "words"), [([3], "rank 3"), ([1, 0], "ranks 0,1"), ([0, 1, 2, 5], "ranks 0-2,5"), ([7, 3, 9, 8], "ranks 3,7-9")]
)
def test_ranks_in_words(ranks: list[int], words: str) -> None:
    assert ranks_in_words(ranks) == words
