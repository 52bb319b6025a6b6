"""Where a rank sits in the grid of pipeline, data and tensor parallelism, and the process groups along each axis.

The tensor axis varies fastest, so that tensor-parallel neighbours share a server, as in the paper (arXiv 2104.12369, section 4.2). Of the
other two the order says which is nearer, in Megatron-LM's names:

    tp-dp-pp    rank = (pipe * data_size + data) * tensor_size + tensor, as DeepSpeed's `PipeModelDataParallelTopology` numbers ranks
    tp-pp-dp    rank = (data * pipe_size + pipe) * tensor_size + tensor, the paper's: the stages of a pipeline are neighbours
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, NamedTuple

from megatron_ext.errors import LayoutError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


Order = Literal["tp-dp-pp", "tp-pp-dp"]
"""The axes of the grid of processes, the fastest-varying first."""


class Coordinates(NamedTuple):
    """A rank's coordinate on each axis."""

    pipe: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Topology:
    """Sizes of the three axes of the grid of processes, and their order."""

    tensor: int
    pipeline: int
    data: int
    order: Order = "tp-dp-pp"

    def __post_init__(self) -> None:
        for axis in ("tensor", "pipeline", "data"):
            if getattr(self, axis) < 1:
                raise LayoutError(f"the {axis}-parallel size is {getattr(self, axis)}; it must be 1 or more.")

    @classmethod
    def from_world_size(cls, world_size: int, *, tensor: int, pipeline: int, order: Order = "tp-dp-pp") -> Topology:
        """The grid of `world_size` processes; the data-parallel size is what remains.

        Raises:
            LayoutError: if tensor × pipeline does not divide the number of processes.
        """
        if tensor < 1 or pipeline < 1 or world_size % (tensor * pipeline):
            raise LayoutError(
                f"{world_size} processes cannot be arranged as tensor {tensor} x pipeline {pipeline} x data: "
                f"{world_size} is not a multiple of {tensor} x {pipeline} = {tensor * pipeline}. "
                f"Start a multiple of {tensor * pipeline} processes, or change the tensor- or pipeline-parallel size."
            )
        return cls(tensor=tensor, pipeline=pipeline, data=world_size // (tensor * pipeline), order=order)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tensor * self.pipeline * self.data

    def coordinates(self, rank: int) -> Coordinates:
        """The coordinates of a global rank.

        Raises:
            LayoutError: if the rank is outside the topology.
        """
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"rank {rank} is outside a layout of {self.world_size} processes.")
        rest, tensor = divmod(rank, self.tensor)
        if self.order == "tp-dp-pp":
            pipe, data = divmod(rest, self.data)
        else:
            data, pipe = divmod(rest, self.pipeline)
        return Coordinates(pipe=pipe, data=data, tensor=tensor)

    def rank(self, pipe: int, data: int, tensor: int) -> int:
        """The global rank at the given coordinates."""
        outer = pipe * self.data + data if self.order == "tp-dp-pp" else data * self.pipeline + pipe
        return outer * self.tensor + tensor

    def tensor_groups(self) -> list[tuple[int, ...]]:
        """Global ranks of every tensor-parallel group: its ranks hold slices of the same layers and read the same samples."""
        return [tuple(self.rank(pipe, data, t) for t in range(self.tensor)) for pipe in range(self.pipeline) for data in range(self.data)]

    def data_groups(self) -> list[tuple[int, ...]]:
        """Global ranks of every data-parallel group: its ranks hold equal parameters and read different samples."""
        return [
            tuple(self.rank(pipe, d, tensor) for d in range(self.data)) for pipe in range(self.pipeline) for tensor in range(self.tensor)
        ]

    def pipeline_groups(self) -> list[tuple[int, ...]]:
        """Global ranks of every pipeline, in stage order: together they hold all layers of one tensor-parallel slice."""
        return [
            tuple(self.rank(p, data, tensor) for p in range(self.pipeline)) for data in range(self.data) for tensor in range(self.tensor)
        ]


@dataclass(frozen=True)
class Group:
    """A process group as one rank sees it.

    `ranks` are global ranks, `rank` is this rank's index among them. `handle` is None in a world of one process, and for groups that exist
    only as arithmetic (a dry run). Collectives over a group of one do nothing.
    """

    ranks: tuple[int, ...]
    rank: int
    handle: ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        return len(self.ranks)


SINGLE = Group(ranks=(0,), rank=0)
"""The group of a process that runs alone."""


@dataclass(frozen=True)
class Groups:
    """This rank's group along each axis of the topology.

    `world` is for control: barriers, votes and small Python objects of all ranks, over a backend for host memory.
    """

    topology: Topology
    coordinates: Coordinates
    tensor: Group
    pipeline: Group
    data: Group
    world: Group

    @classmethod
    def from_topology(cls, topology: Topology, rank: int) -> Groups:
        """The groups of `rank` by arithmetic alone: no process is needed, and no collective can run over them."""
        place = topology.coordinates(rank)

        def mine(groups: list[tuple[int, ...]]) -> Group:
            ranks = next(ranks for ranks in groups if rank in ranks)
            return Group(ranks, ranks.index(rank))

        return cls(
            topology,
            place,
            tensor=mine(topology.tensor_groups()),
            pipeline=mine(topology.pipeline_groups()),
            data=mine(topology.data_groups()),
            world=Group(tuple(range(topology.world_size)), rank),
        )

    @classmethod
    def create(cls, topology: Topology, timeout_seconds: float = 1800.0) -> Groups:
        """Create the process groups. Every rank must call this, after torch.distributed has been initialised.

        Args:
            topology: the grid of all running processes.
            timeout_seconds: a collective fails if some rank has not joined it after this time. New groups do not inherit the world's
                timeout.

        Raises:
            LayoutError: if the number of running processes is not the topology's.
        """
        import torch.distributed as dist

        from megatron_ext.accelerator import CONTROL_BACKEND

        if dist.get_world_size() != topology.world_size:
            raise LayoutError(f"{dist.get_world_size()} processes run, but the layout {topology} is for {topology.world_size}.")
        rank, timeout = dist.get_rank(), timedelta(seconds=timeout_seconds)

        def create_axis(groups: list[tuple[int, ...]]) -> Group:
            found: Group | None = None
            for ranks in groups:  # every rank takes part in the creation of every group, in the same order
                handle = dist.new_group(list(ranks), timeout=timeout) if topology.world_size > 1 else None
                if rank in ranks:
                    found = Group(ranks, ranks.index(rank), handle)
            assert found is not None
            return found

        everyone = dist.new_group(backend=CONTROL_BACKEND, timeout=timeout) if topology.world_size > 1 else None
        return cls(
            topology,
            topology.coordinates(rank),
            world=Group(tuple(range(topology.world_size)), rank, everyone),
            tensor=create_axis(topology.tensor_groups()),
            pipeline=create_axis(topology.pipeline_groups()),
            data=create_axis(topology.data_groups()),
        )
