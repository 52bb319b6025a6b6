"""Measure what a profile holds on the machine at hand: matrix products, memory bandwidth, the start of an operator, all-reduces.

    torchrun --nproc-per-node 4 -m pangu.planner.calibration --cluster ds_configs/clusters/cpu_gloo.yaml --output profile.yaml

Every rank measures at once, as all devices of a server work at once in training; what the first one finds is written. `plan_parallel.py
calibrate` starts the ranks.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_ext import accelerator, collectives
from megatron_ext.topology import Group, Groups, Topology
from pangu.errors import InputError, exit_code
from pangu.planner.hardware import Cluster, load_cluster
from pangu.planner.profile import MeasuredLink, MeasuredMatmul, Profile

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENS = (64, 256, 1024, 4096)
WIDTHS = (64, 256, 1024, 4096)
"""Sides of the products: M of the first, N and K of the second; the largest that fit in the time are left out."""
MESSAGE_BYTES = (1 << 12, 1 << 16, 1 << 20, 1 << 24)
REPEATS = 7
TIMEOUT_SECONDS = 120.0


def seconds_of(work: Callable[[], object], at_least: float = 0.01) -> float:
    """The median of several runs, after one that warms up; runs too short for the clock are repeated.

    Not the shortest: the other ranks work at the same time, and what counts is the speed that they leave.
    """
    work()
    accelerator.synchronize()
    count, times = 1, list[float]()
    while len(times) < REPEATS:
        start = time.perf_counter()
        for _ in range(count):
            work()
        accelerator.synchronize()
        spent = time.perf_counter() - start
        if spent < at_least and count < 1000:
            count *= 4
            continue
        times.append(spent / count)
        if spent > 0.5:
            break
    return float(np.median(times))


def measure_matmuls(dtype: torch.dtype, budget: float) -> tuple[MeasuredMatmul, ...]:
    """Products from the smallest up, until the time is spent.

    Args:
        dtype: of the matrices.
        budget: seconds.
    """
    device, end, found = accelerator.device(), time.monotonic() + budget, []
    for m, n, k in sorted(itertools.product(TOKENS, WIDTHS, WIDTHS), key=lambda sides: sides[0] * sides[1] * sides[2]):
        if time.monotonic() > end:
            break
        a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
        result = torch.empty(m, n, device=device, dtype=dtype)

        def product(a: torch.Tensor = a, b: torch.Tensor = b, result: torch.Tensor = result) -> object:
            return torch.mm(a, b, out=result)

        found.append(MeasuredMatmul(m=m, n=n, k=k, tflops=2e-12 * m * n * k / seconds_of(product)))
    return tuple(found)


def measure_memory() -> tuple[float, float]:
    """GB/s of a sum of two large tensors, and microseconds of one of two small tensors."""
    device = accelerator.device()
    large = torch.ones(3, 1 << 24, device=device)
    small = torch.ones(3, 1, device=device)
    bandwidth = large.nbytes / 1e9 / seconds_of(lambda: torch.add(large[0], large[1], out=large[2]))
    return bandwidth, 1e6 * seconds_of(lambda: torch.add(small[0], small[1], out=small[2]))


def measure_link(group: Group, world: Group, level: str) -> MeasuredLink:
    """A line through the times of all-reduces of several sizes: 2 (n - 1) latency + 2 (n - 1) / n bytes / bandwidth.

    Args:
        group: this rank's; all groups of its kind talk at once.
        world: all ranks.
        level: that the group lies in.
    """
    times = []
    for bytes_ in MESSAGE_BYTES:
        message = torch.ones(bytes_ // 4, device=accelerator.device())
        runs = []
        for _ in range(REPEATS + 1):
            message.fill_(1.0)
            collectives.barrier(world)
            accelerator.synchronize()
            start = time.perf_counter()
            collectives.all_reduce(message, group)
            accelerator.synchronize()
            runs.append(time.perf_counter() - start)
        times.append(float(np.median(runs[1:])))  # the first one connects
    sizes, seconds = np.array(MESSAGE_BYTES, dtype=float), np.array(times)
    # Relative errors count, so that the small messages decide the latency and the large ones the bandwidth.
    columns = np.stack([np.ones_like(sizes), sizes], axis=1) / seconds[:, None]
    start_up, per_byte = np.linalg.lstsq(columns, np.ones_like(seconds), rcond=None)[0]
    steps, ranks = 2 * (group.size - 1), group.size
    start_up = max(float(start_up), 0.1 * float(seconds.min()))
    per_byte = max(float(per_byte), 0.1 * float(seconds[-1]) / float(sizes[-1]))
    return MeasuredLink(
        level=level,  # type: ignore[arg-type]
        ranks=ranks,
        bandwidth=steps / ranks / per_byte / 1e9,
        latency_us=start_up / steps * 1e6,
    )


def measure(cluster: Cluster, precision: str, budget: float, world_size: int) -> Profile:
    """A profile of this machine.

    Args:
        cluster: whose figures the efficiencies are shares of.
        precision: of the matrix products.
        budget: seconds for them.
        world_size: ranks that were started.

    Raises:
        InputError: the cluster file has no peak for the precision.
    """
    if precision not in cluster.device.peak_tflops:
        raise InputError(f"cluster {cluster.name} has no device.peak_tflops.{precision}: choose another --precision, or add it.")
    links = []
    for ranks in (size for size in range(2, world_size + 1) if world_size % size == 0):
        groups = Groups.create(Topology(tensor=ranks, pipeline=1, data=world_size // ranks), TIMEOUT_SECONDS)
        level = next((level for level in cluster.levels if level.devices >= ranks), cluster.levels[-1])
        links.append(measure_link(groups.tensor, groups.world, level.name))
    bandwidth, overhead = measure_memory()
    matmuls = measure_matmuls(DTYPES[precision], budget)
    peak = cluster.device.peak_tflops[precision].value
    return Profile(
        matmul_efficiency=min(1.0, max(product.tflops for product in matmuls) / peak),
        memory_efficiency=min(1.0, bandwidth / cluster.device.memory_bandwidth.value),
        overhead_us=overhead,
        matmuls=matmuls,
        links=tuple(links),
    )


def excess(cluster: Cluster, profile: Profile) -> list[str]:
    """Figures of a cluster file that the machine beats, in words: the time model cannot go beyond them."""
    found = []
    if profile.memory_efficiency == 1.0:
        found.append(f"the device moves more than device.memory_bandwidth = {cluster.device.memory_bandwidth.value:g} GB/s")
    if profile.matmul_efficiency == 1.0:
        found.append(f"the device computes more than device.peak_tflops, {max(product.tflops for product in profile.matmuls):.3g}")
    return found


@exit_code
def main() -> None:
    """One rank: measure; the first writes the profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--cluster", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32")
    parser.add_argument("--seconds", type=float, default=30.0)
    arguments = parser.parse_args()
    cluster = load_cluster(arguments.cluster)
    meeting = accelerator.initialize(TIMEOUT_SECONDS)
    profile = measure(cluster, arguments.precision, arguments.seconds, len(meeting.members))
    if meeting.rank == 0:
        for text in excess(cluster, profile):
            print(f"{arguments.cluster}: {text}: correct the file and calibrate again", file=sys.stderr)
        try:
            arguments.output.write_text(profile.to_yaml(), encoding="utf-8")
        except OSError as error:
            raise InputError(f"{arguments.output}: cannot be written ({error.strerror}).") from None
    collectives.shutdown()


if __name__ == "__main__":
    main()
