"""Time of communication: collectives over the levels of a cluster that a group actually spans.

A group is `size` ranks, `stride` apart. Where several of them share a unit of a level, a collective is hierarchical: it reduces among
them first, and each continues with its part. So every device uses its own share of the uplink, and all groups of a layout communicate at
once; the bandwidths of a cluster file are those a device has while all others send too. Ring algorithms: a step sends one part to the
neighbour.

    reduce-scatter or all-gather of S bytes over n ranks: (n - 1) / n S / bandwidth + (n - 1) latency; an all-reduce is both.
"""

from __future__ import annotations

from typing import NamedTuple

from pangu.planner.hardware import Cluster, Level
from pangu.planner.profile import Profile


class Hop(NamedTuple):
    """The part of a collective that runs within one level."""

    level: Level
    ranks: int
    """Number of participants; each stands for the ranks below it that it has reduced or gathered."""


class Network:
    """Times of collectives in seconds, for sizes in bytes. Results are cached."""

    def __init__(self, cluster: Cluster, profile: Profile) -> None:
        self.levels = cluster.levels
        self.profile = profile
        self._rates: dict[tuple[str, int], tuple[float, float]] = {}
        self._hops: dict[tuple[int, int], list[Hop]] = {}

    def hops(self, size: int, stride: int) -> list[Hop]:
        """The levels that a group spans, innermost first; the numbers of ranks multiply to its size."""
        key = (size, stride)
        if key not in self._hops:
            self._hops[key] = self._split(size, stride)
        return self._hops[key]

    def _split(self, size: int, stride: int) -> list[Hop]:
        hops, inside = [], 1
        for level in self.levels:
            unit = level.devices
            if level is self.levels[-1] or unit % (size * stride) == 0:
                together = size
            elif unit % stride == 0 and size % (unit // stride) == 0:
                together = unit // stride
            else:  # one rank in a unit, or units that cut groups in different places: those talk over the next level
                together = inside
            if together > inside and together % inside == 0:
                hops.append(Hop(level, together // inside))
                inside = together
        return hops

    def rate(self, level: Level, ranks: int) -> tuple[float, float]:
        """Bytes per second that each rank sends, and the latency of one step in seconds."""
        key = (level.name, ranks)
        if key not in self._rates:
            if measured := self.profile.link(level.name, ranks):
                self._rates[key] = measured.bandwidth * 1e9, measured.latency_us * 1e-6
            else:
                in_server = level.name in ("group", "server")
                efficiency = self.profile.server_efficiency if in_server else self.profile.network_efficiency
                self._rates[key] = level.bandwidth.value * 1e9 * efficiency, level.latency_us.value * 1e-6
        return self._rates[key]

    def gather(self, bytes_: float, size: int, stride: int) -> float:
        """Seconds of an all-gather that leaves `bytes_` on each rank, or of a reduce-scatter of `bytes_`."""
        seconds = 0.0
        for level, ranks in self.hops(size, stride):
            bandwidth, latency = self.rate(level, ranks)
            seconds += (ranks - 1) * (bytes_ / ranks / bandwidth + latency)
            bytes_ /= ranks
        return seconds

    def all_reduce(self, bytes_: float, size: int, stride: int) -> float:
        """Seconds of an all-reduce of `bytes_` on each rank."""
        return 2 * self.gather(bytes_, size, stride)

    def flat_gather(self, bytes_: float, size: int, stride: int) -> float:
        """Seconds of an all-gather around one ring through all ranks, at the speed of its slowest link, as many small gathers run."""
        rates = [self.rate(*hop) for hop in self.hops(size, stride)]
        return max(((size - 1) * (bytes_ / size / bandwidth + latency) for bandwidth, latency in rates), default=0.0)

    def send(self, bytes_: float, size: int, stride: int) -> float:
        """Seconds to send `bytes_` from one rank of a group to the next, over the outermost level between any two neighbours."""
        hops = self.hops(size, stride)
        if not hops:
            return 0.0
        bandwidth, latency = self.rate(hops[-1].level, 2)
        return bytes_ / bandwidth + latency
