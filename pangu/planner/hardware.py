"""Description of a cluster for the planner: one kind of device, and the network between devices in levels.

Sizes are powers of ten for rates (GB/s, TFLOP/s) and powers of two for memory (GiB).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pangu.config import Count, Section
from pangu.config.parsing import read_model
from pangu.config.recipes import find_cluster
from pangu.errors import InputError

Positive = Annotated[float, Field(gt=0.0)]


class Figure(Section):
    """A number and its source."""

    value: Positive
    mark: Literal["vendor", "measured", "memory"]
    """Origin of the number. `memory`: written from memory, not looked up; check before relying on it."""
    source: str
    """Where the number is from: data sheet, paper, or the command that measured it."""


class Device(Section):
    """One accelerator, or one process's share of a host."""

    name: str
    kind: Literal["accelerator", "cpu"] = "accelerator"
    """Kind of device; what a training step keeps in memory differs between the two."""
    memory_gib: Figure
    memory_bandwidth: Figure
    """Bandwidth of the device's memory, GB/s."""
    host_bandwidth: Figure
    """GB/s between the device and host memory, one way, while all devices of a server transfer; used for offloading."""
    host_memory_gib: Figure
    """A device's share of its server's host memory, GiB, which offloading may use."""
    peak_tflops: Annotated[dict[Literal["fp32", "bf16", "fp16"], Figure], Field(min_length=1)]
    """Peak TFLOP/s of dense matrix products, in each precision that the device has."""


class Level(Section):
    """Devices that reach each other at the same speed, from the innermost (a group on one board) to the whole cluster."""

    name: Literal["group", "server", "rack", "cluster"]
    """`group` and `server` are links inside a server, `rack` and `cluster` the network between servers."""
    devices: Count
    """Number of devices in one unit of this level."""
    bandwidth: Figure
    """GB/s that each device can send to others of its unit outside its inner unit, one way, while all devices send."""
    latency_us: Figure
    """Latency of one message, in microseconds."""


class Cluster(Section):
    """A cluster: its devices and the levels of its network."""

    name: str
    device: Device
    levels: Annotated[list[Level], Field(min_length=1)]
    """Innermost first; each has a multiple of the devices of the one before. The last is the whole cluster."""

    @model_validator(mode="after")
    def _check(self) -> Cluster:
        order = ["group", "server", "rack", "cluster"]
        for inner, outer in zip(self.levels, self.levels[1:], strict=False):
            if order.index(inner.name) >= order.index(outer.name):
                raise ValueError(f"level {outer.name!r} comes after {inner.name!r}; levels go from the innermost out: {', '.join(order)}.")
            if outer.devices % inner.devices or outer.devices == inner.devices:
                raise ValueError(
                    f"a {outer.name} of {outer.devices} devices cannot be made of {inner.name}s of {inner.devices}: "
                    f"give {outer.name} a larger multiple of {inner.devices}, or leave out one of the two levels."
                )
        return self

    @property
    def num_devices(self) -> int:
        """Number of devices of the whole cluster."""
        return self.levels[-1].devices

    def with_devices(self, count: int) -> Cluster:
        """The same kind of cluster with another number of devices: its outermost level grows, or levels that are not filled are removed.

        Raises:
            InputError: if the devices do not fill whole units of the level below.
        """
        if count < 1:
            raise InputError(f"{count} devices: expected 1 or more.")
        kept = [level for level in self.levels[:-1] if level.devices < count]
        if kept and count % kept[-1].devices:
            below = count // kept[-1].devices * kept[-1].devices
            raise InputError(
                f"{count} devices do not fill whole {kept[-1].name}s of {kept[-1].devices} (cluster {self.name}). "
                f"Choose {below} or {below + kept[-1].devices}."
            )
        outermost = self.levels[len(kept)].model_copy(update={"devices": count})
        return self.model_copy(update={"levels": [*kept, outermost]})


def load_cluster(path: Path | str) -> Cluster:
    """Read a cluster file, such as those in ds_configs/clusters.

    Raises:
        InputError: names the file, the key, what was found and what is expected.
    """
    return read_model(find_cluster(path), Cluster)
