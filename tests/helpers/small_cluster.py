"""A cluster whose collectives can be computed by hand: two servers of two groups of four devices."""

from typing import Literal

from pangu.planner.hardware import Cluster, Device, Figure, Level
from pangu.planner.profile import Profile

IDEAL = Profile(
    matmul_efficiency=1.0,
    matmul_saturation=1e-9,
    token_saturation=1e-9,
    memory_efficiency=1.0,
    server_efficiency=1.0,
    network_efficiency=1.0,
    overhead_us=0.0,
)


def figure(value: float) -> Figure:
    return Figure(value=value, mark="memory", source="a test")


def level(name: Literal["group", "server", "rack", "cluster"], devices: int, bandwidth: float, latency_us: float) -> Level:
    return Level(name=name, devices=devices, bandwidth=figure(bandwidth), latency_us=figure(latency_us))


def cluster(latency_us: float = 1e-9, peak_tflops: float = 100.0, **bandwidths: float) -> Cluster:
    return Cluster(
        name="test",
        device=Device(
            name="d",
            memory_gib=figure(80),
            memory_bandwidth=figure(bandwidths.get("memory", 1000)),
            host_bandwidth=figure(10),
            host_memory_gib=figure(64),
            peak_tflops={"bf16": figure(peak_tflops), "fp32": figure(peak_tflops / 2)},
        ),
        levels=[
            level("group", 4, bandwidths.get("group", 100), latency_us),
            level("server", 8, bandwidths.get("server", 20), latency_us),
            level("cluster", 16, bandwidths.get("cluster", 10), latency_us),
        ],
    )
