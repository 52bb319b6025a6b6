"""The constants of the time model that no data sheet gives: how much of a device's rates a software stack reaches.

The defaults are those that `plan_parallel.py validate` fits to published runs on A100 (docs/planner.md). A profile that was measured on the
machine at hand (tables of matrix products and of collectives) takes their place where it has something to say.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field

from pangu.config import Count, Section
from pangu.config.parsing import read_model
from pangu.errors import InputError
from pangu.files import write_durably
from pangu.planner.hardware import Positive

NotNegative = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]


class MeasuredMatmul(Section):
    """One product of an M x K with a K x N matrix, timed."""

    m: Count
    n: Count
    k: Count
    tflops: Positive


class MeasuredLink(Section):
    """All-reduces of several sizes over `ranks` ranks that lie in one unit of a level, timed, and a line laid through the times."""

    level: Literal["group", "server", "rack", "cluster"]
    ranks: Count
    bandwidth: Positive
    """GB/s that each rank sends while the ring turns."""
    latency_us: Positive
    """Microseconds of one step of the ring."""


Kind = Literal["zero0", "zero1", "zero2", "zero3", "pipeline"]


class MeasuredEngine(Section):
    """What training a tiny model took beyond what it computes and sends: the work of DeepSpeed and of Python."""

    kind: Kind
    """The engine without stages, by its ZeRO stage; or the one with stages."""
    ranks: Count
    """Processes that trained. ZeRO-2 and 3 mostly wait for messages, whose number grows with the data-parallel size."""
    step_us: NotNegative
    """Microseconds of a step: for each layer of a rank; of the pipeline for each stage."""
    micro_batch_us: NotNegative
    """Microseconds of a micro-batch: for each layer of a rank; in a pipeline in each stage."""


class Profile(Section):
    """What a software stack makes of the figures of a cluster."""

    matmul_efficiency: Share = 0.88
    """Share of the peak that is reached by a matrix product with endless sides."""
    matmul_saturation: Positive = 2.2
    """Sides N and K of this many times (peak / memory bandwidth) FLOP/byte each add a product's time once more."""
    token_saturation: Positive = 3.6
    """The same for M, the tokens of a micro-batch."""
    memory_efficiency: Share = 0.73
    """Share of the memory bandwidth that is reached by LayerNorm, dropout, GELU, softmax, residual sums and the optimizer."""
    server_efficiency: Share = 0.53
    """Share of the links inside a server that is reached by collectives."""
    network_efficiency: Share = 0.53
    """Share of the network between servers that is reached by collectives."""
    unaligned: Annotated[float, Field(ge=1.0)] = 5.2
    """How many times longer a product takes whose inner sides are no multiples of 8 elements: matrix units need 16 bytes."""
    overhead_us: NotNegative = 5.0
    """Microseconds to start one operator."""
    overlap: Annotated[float, Field(ge=1.0)] = 3.0
    """How well ZeRO-3 traffic hides under the computation: exponent k of (traffic^k + computation^k)^(1/k), 1 = not at all."""
    sharing: Annotated[float, Field(ge=1.0)] = 1.0
    """How many times as fast a rank is while the others wait: processes that share cores get those of the waiting ones."""
    sequence_sums: Annotated[int, Field(ge=0)] = 0
    """Small all-reduces that each layer adds to a backward pass under sequence parallelism. Megatron does them once a step, together."""
    matmuls: tuple[MeasuredMatmul, ...] = ()
    links: tuple[MeasuredLink, ...] = ()
    engines: tuple[MeasuredEngine, ...] = ()

    def correction(self, m: float, n: float, k: float, formula: list[float]) -> float:
        """What to multiply the formula's time of a product by: mean over the measured ones, weighted by 1 / distance^2 of the logarithms.

        Args:
            m, n, k: sides of the product.
            formula: TFLOP/s that the formula gives for each measured product.
        """
        weights = total = 0.0
        for measured, expected in zip(self.matmuls, formula, strict=True):
            distance = math.log(m / measured.m) ** 2 + math.log(n / measured.n) ** 2 + math.log(k / measured.k) ** 2
            weight = 1.0 / (distance + 1e-6)
            weights += weight
            total += weight * math.log(expected / measured.tflops)
        return math.exp(total / weights) if weights else 1.0

    def link(self, level: str, ranks: int) -> MeasuredLink | None:
        """The measurement of a level whose number of ranks is nearest."""
        links = [link for link in self.links if link.level == level]
        return min(links, key=lambda link: abs(math.log(link.ranks / ranks)), default=None)

    def engine(self, zero_stage: int, *, pipeline: bool) -> MeasuredEngine | None:
        """The measurement of the engine that a plan runs on."""
        kind = "pipeline" if pipeline else f"zero{zero_stage}"
        return next((engine for engine in self.engines if engine.kind == kind), None)

    def to_yaml(self) -> str:
        """A profile file; `load_profile` reads it back equal."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_profile(path: Path | str) -> Profile:
    """Read a profile file; what it leaves out has its default.

    Raises:
        InputError: one line naming the file, the key, what was found and what is expected.
    """
    return read_model(path, Profile)


def save_profile(profile: Profile, path: Path) -> None:
    """Write a profile file; it appears whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    try:
        write_durably(path, profile.to_yaml())
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}). Name another file with --output.") from None
