"""A cluster as the planner sees it: one kind of device, and the network between devices in levels.

Sizes are powers of ten for rates (GB/s, TFLOP/s) and powers of two for memory (GiB).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pangu.config import Count, Section

Positive = Annotated[float, Field(gt=0.0)]


class Figure(Section):
    """A number and where it is from."""

    value: Positive
    mark: Literal["vendor", "measured", "memory"]
    """`memory`: nobody has looked it up; check before relying on it."""
    source: str
    """Data sheet, paper, or the command that measured it."""


class Device(Section):
    """One accelerator, or one process's share of a host."""

    name: str
    memory_gib: Figure
    memory_bandwidth: Figure
    """GB/s."""
    peak_tflops: dict[Literal["fp32", "bf16", "fp16"], Figure]
    """Dense matrix products in each precision the device has."""


class Level(Section):
    """Devices that reach each other at the same speed, from the innermost (a group on one board) to the whole cluster."""

    name: str
    """`group`, `server`, `rack`, `cluster`."""
    devices: Count
    """How many devices one unit of this level has."""
    bandwidth: Figure
    """GB/s that each device can send to others of its unit outside its inner unit, one way, while all devices do."""
    latency_us: Figure
    """Microseconds of one message."""


class Cluster(Section):
    """What a plan runs on."""

    name: str
    device: Device
    levels: Annotated[list[Level], Field(min_length=1)]
    """Innermost first; each has a multiple of the devices of the one before. The last is the whole cluster."""

    @property
    def num_devices(self) -> int:
        """Devices of the whole cluster."""
        return self.levels[-1].devices
