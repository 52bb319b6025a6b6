"""Measures a profile on this machine: matrix products, memory, the launch of an operator, all-reduces, shared cores, engines.

    torchrun --nproc-per-node 4 -m pangu.calibration.measurement --cluster ds_configs/clusters/cpu_gloo.yaml --output profile.yaml

All ranks measure at once, as all devices of a server work at once in training; the results of the first rank are written. `plan_parallel.py
calibrate` starts the ranks, and adds the overhead of DeepSpeed's engines (`measure_training`): for that it trains a tiny model in a few
layouts.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from megatron_ext import accelerator, collectives
from megatron_ext.context import ParallelContext
from megatron_ext.initialize import random_weights
from megatron_ext.matmul import product
from megatron_ext.supervision import rendezvous
from megatron_ext.topology import Group, Groups, Topology
from pangu.calibration.trial import try_plan
from pangu.config import Config, ModelConfig, parse_config
from pangu.config.recipes import RECIPES
from pangu.config.stages import balanced_layers
from pangu.errors import InputError, exit_code
from pangu.model.block import Block, RunOptions
from pangu.planner.hardware import Cluster, load_cluster
from pangu.planner.plan import Plan, workload_of
from pangu.planner.profile import Kind, MeasuredEngine, MeasuredLink, MeasuredMatmul, Profile, save_profile
from pangu.planner.time import OPERATORS, TimeModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENS = (64, 256, 1024, 4096)
WIDTHS = (64, 256, 1024, 4096)
"""Sides of the products: M of the first, N and K of the second; the largest that fit in the time are left out."""
MESSAGE_BYTES = (1 << 12, 1 << 16, 1 << 20, 1 << 23)
REPEATS = 5
ROUNDS = 8
WINDOWS, WINDOW_SECONDS = 3, 0.04
"""Each longer than a scheduler lets a process run in one go."""
SEQUENCE_SUMS = 6
"""Under sequence parallelism a layer sums the gradients of its LayerNorms and of the biases behind its reductions one by one."""
PROBE = ModelConfig(num_layers=4, hidden_size=64, num_heads=4, vocab_size=512, max_positions=64, hidden_dropout=0.0, attention_dropout=0.0)
"""What engines are measured with: so small that it costs them less than they cost it."""
PROBE_STEPS = 8
SOLUTIONS = 10
"""Number of rounds in which the latency of collectives and the overhead of engines are separated."""
PROBE_FEW, PROBE_MANY = 2, 8
"""Number of micro-batches per step in the two runs of a trial."""
TIMEOUT_SECONDS = 120.0


def seconds_of(work: Callable[[], object], at_least: float = WINDOW_SECONDS) -> float:
    """Seconds per run: the mean over as many runs as fill a window, after a warm-up run; the median of three windows.

    Not the shortest run, nor the median of single ones: where ranks share cores, what counts is what the others leave in the long run.
    """
    work()
    accelerator.synchronize()
    means = list[float]()
    for _ in range(WINDOWS):
        count, spent, start = 0, 0.0, time.perf_counter()
        while spent < at_least:
            for _ in range(max(1, count // 4)):  # grows, so that looking at the clock costs nothing
                work()
            accelerator.synchronize()
            count += max(1, count // 4)
            spent = time.perf_counter() - start
        means.append(spent / count)
    return float(np.median(means))


def measure_matmuls(dtype: torch.dtype, budget: float, world: Group) -> tuple[MeasuredMatmul, ...]:
    """Products from the smallest up, until the time is spent.

    Args:
        dtype: dtype of the matrices.
        budget: time limit in seconds, by the clock of the first rank.
        world: all ranks. They go through the products together: one that is ahead would leave its cores to the others.
    """
    device, end, found = accelerator.device(), time.monotonic() + budget, []
    for m, n, k in sorted(itertools.product(TOKENS, WIDTHS, WIDTHS), key=lambda sides: sides[0] * sides[1] * sides[2]):
        if collectives.broadcast_object(time.monotonic() > end, world):
            break
        a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b) -> object:
            return product(a, b)  # by the library that training uses

        found.append(MeasuredMatmul(m=m, n=n, k=k, tflops=2e-12 * m * n * k / seconds_of(multiply)))
    return tuple(found)


def measure_memory() -> float:
    """Memory bandwidth in GB/s, from adding two large tensors."""
    large = torch.ones(3, 1 << 24, device=accelerator.device())
    return large.nbytes / 1e9 / seconds_of(lambda: torch.add(large[0], large[1], out=large[2]))


def measure_operator() -> float:
    """Microseconds to launch an operator: the time of a layer with almost nothing to compute, forward and backward, per operator."""
    device = accelerator.device()
    layer = Block(PROBE, ParallelContext(device=device, fill=random_weights(0)), RunOptions(reset_at_document=True), index=0)
    x_BSH = torch.zeros(1, 4, PROBE.hidden_size, device=device, requires_grad=True)
    positions_BS = torch.arange(4, device=device).unsqueeze(0)
    return 1e6 * seconds_of(lambda: layer(x_BSH, positions_BS).sum().backward()) / (3 * OPERATORS)


def measure_sharing(world: Group) -> float:
    """Speed of one rank while the others wait, relative to its speed while all compute."""
    a = torch.randn(256, 256, device=accelerator.device())
    collectives.barrier(world)
    together = seconds_of(lambda: product(a, a), at_least=0.4)
    collectives.barrier(world)
    alone = seconds_of(lambda: product(a, a), at_least=0.4) if world.rank == 0 else together
    collectives.barrier(world)
    return max(1.0, together / alone)


def measure_link(group: Group, world: Group, level: str) -> MeasuredLink:
    """Fit a line to the times of all-reduces of several sizes: 2 (n - 1) latency + 2 (n - 1) / n bytes / bandwidth.

    Between them the ranks compute, as in training: what counts is what an all-reduce adds. Ranks that share cores are woken up late.

    Args:
        group: this rank's group; all groups of its kind communicate at once.
        world: all ranks.
        level: name of the level that the group spans.
    """
    device = accelerator.device()
    a = torch.randn(256, 256, device=device)

    def rounds(message: torch.Tensor | None) -> float:
        """Seconds of one of several rounds: a product, and an all-reduce behind it."""
        collectives.barrier(world)
        accelerator.synchronize()
        start = time.perf_counter()
        for _ in range(ROUNDS):
            product(a, a)
            if message is not None:
                collectives.all_reduce(message.fill_(1.0), group)
        accelerator.synchronize()
        collectives.barrier(world)
        return (time.perf_counter() - start) / ROUNDS

    times = []
    for bytes_ in MESSAGE_BYTES:
        message = torch.ones(bytes_ // 4, device=device)
        rounds(message)  # the first one connects
        added = [rounds(message) - rounds(None) for _ in range(REPEATS)]
        times.append(max(1e-6, float(np.median(added))))
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
        cluster: the cluster; efficiencies are fractions of its figures.
        precision: precision of the matrix products.
        budget: seconds to spend on the matrix products.
        world_size: number of ranks.

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
    world = Groups.create(Topology(1, 1, world_size), TIMEOUT_SECONDS).world
    sharing = measure_sharing(world)
    bandwidth, overhead = measure_memory(), measure_operator()
    matmuls = measure_matmuls(DTYPES[precision], budget, world)
    peak = cluster.device.peak_tflops[precision].value
    return Profile(
        matmul_efficiency=min(1.0, max(product.tflops for product in matmuls) / peak),
        memory_efficiency=min(1.0, bandwidth / cluster.device.memory_bandwidth.value),
        overhead_us=overhead,
        sharing=sharing,
        sequence_sums=SEQUENCE_SUMS,
        matmuls=matmuls,
        links=tuple(links),
    )


def measure_training(profile: Profile, cluster: Cluster, precision: str, world_size: int) -> Profile:
    """Add the time that training a tiny model takes beyond the prediction: the overhead of DeepSpeed's engines and of collectives in a
    step.

    Args:
        profile: the profile measured so far.
        cluster: this machine's cluster file.
        precision: precision of the training.
        world_size: number of processes that train.
    """
    layouts: dict[Kind, tuple[Topology, int]] = {
        "zero1": (Topology(1, 1, world_size), 1),
        "zero2": (Topology(1, 1, world_size), 2),
        "zero3": (Topology(1, 1, world_size), 3),
    }
    if precision == "fp32":
        layouts["zero0"] = (Topology(1, 1, world_size), 0)
    if world_size % 2 == 0:
        layouts["pipeline"] = (Topology(1, 2, world_size // 2), 1)

    def trial(layout: Topology, zero_stage: int, micro_batches: int) -> Trial:
        config = _probe(layout, zero_stage, micro_batches, precision)
        return Trial(config, layout, try_plan(config, world_size, PROBE_STEPS))

    of_engines = {kind: (trial(*layout, PROBE_FEW), trial(*layout, PROBE_MANY)) for kind, layout in layouts.items()}
    of_links = {
        link: trial(Topology(link.ranks, 1, world_size // link.ranks), 1, PROBE_FEW)
        for link in profile.links
        if PROBE.num_heads % link.ranks == 0
    }
    latencies = {link: link.latency_us for link in of_links}
    for _ in range(SOLUTIONS):  # engines wait for collectives, and steps with many collectives have an engine
        links = tuple(link.model_copy(update={"latency_us": latencies.get(link, link.latency_us)}) for link in profile.links)
        without = profile.model_copy(update={"links": links})
        engines = tuple(_engine(kind, *trials, without, cluster) for kind, trials in of_engines.items())
        found = without.model_copy(update={"engines": engines})
        for link, one in of_links.items():
            slower = tuple(other.model_copy(update={"latency_us": other.latency_us + (other.ranks == link.ranks)}) for other in found.links)
            each = one.predicted(found.model_copy(update={"links": slower}), cluster) - one.predicted(found, cluster)
            more = (one.seconds - one.predicted(found, cluster)) / each
            latencies[link] = max(0.1 * link.latency_us, latencies[link] + more)
    return found


class Trial(NamedTuple):
    """A run of the tiny model, with the time of its steps."""

    config: Config
    layout: Topology
    seconds: float

    def predicted(self, profile: Profile, cluster: Cluster) -> float:
        """Seconds per step that the time model predicts."""
        config = self.config
        plan = Plan(
            self.layout,
            config.train.micro_batch_size,
            balanced_layers(config.model, self.layout.pipeline),
            zero_stage=config.parallel.zero_stage,
        )
        return TimeModel(workload_of(config), cluster.with_devices(self.layout.world_size), profile).step(plan).total


def _engine(kind: Kind, few: Trial, many: Trial, profile: Profile, cluster: Cluster) -> MeasuredEngine:
    """Overhead of an engine: the time of trials with few and with many micro-batches beyond the prediction."""
    beyond_few, beyond_many = (one.seconds - one.predicted(profile, cluster) for one in (few, many))
    each = max(0.0, (beyond_many - beyond_few) / (PROBE_MANY - PROBE_FEW))
    step = max(0.0, beyond_few - PROBE_FEW * each)
    count = 1 if kind == "pipeline" else PROBE.num_layers
    ranks = few.layout.world_size
    return MeasuredEngine(kind=kind, ranks=ranks, step_us=1e6 * step / count, micro_batch_us=1e6 * each / count)


def _probe(layout: Topology, zero_stage: int, micro_batches: int, precision: str) -> Config:
    """A run of the tiny model, with the DeepSpeed configuration that planned recipes have."""
    values = {
        "model": PROBE.model_dump(),
        "parallel": {"tensor": layout.tensor, "pipeline": layout.pipeline, "zero_stage": zero_stage},
        "train": {"micro_batch_size": 1, "global_batch_size": layout.data * micro_batches, "steps": 1000, "precision": precision},
        "data": {"train": ["synthetic"]},
        "run": {"dir": "unused"},
        "deepspeed": f"zero{zero_stage}.json",
    }
    return parse_config(values, RECIPES / "probe.yaml")


def excess(cluster: Cluster, profile: Profile) -> list[str]:
    """Messages about figures of a cluster file that the machine exceeds: the time model cannot go beyond them."""
    found = []
    if profile.memory_efficiency == 1.0:
        found.append(f"the device moves more than device.memory_bandwidth = {cluster.device.memory_bandwidth.value:g} GB/s")
    if profile.matmul_efficiency == 1.0:
        found.append(f"the device computes more than device.peak_tflops, {max(product.tflops for product in profile.matmuls):.3g}")
    return found


@exit_code
def main() -> None:
    """Measure on this rank; the first rank writes the profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--cluster", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32")
    parser.add_argument("--seconds", type=float, default=30.0)
    arguments = parser.parse_args()
    cluster = load_cluster(arguments.cluster)
    found = rendezvous.initialize(TIMEOUT_SECONDS)
    profile = measure(cluster, arguments.precision, arguments.seconds, len(found.members))
    if found.rank == 0:
        for text in excess(cluster, profile):
            print(f"{arguments.cluster}: {text}: correct the file and calibrate again", file=sys.stderr)
        save_profile(profile, arguments.output)
    collectives.shutdown()


if __name__ == "__main__":
    main()
