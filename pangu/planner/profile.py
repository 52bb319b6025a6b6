"""The constants of the time model that are not in data sheets: what fraction of a device's rates a software stack reaches.

The defaults are those that `plan_parallel.py validate` fits to published runs on A100 (docs/planner.md). A profile that was measured on the
machine at hand (tables of matrix products and of collectives) replaces them where it has measurements.
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
    """Timed all-reduces of several sizes over `ranks` ranks in one unit of a level, and a line fitted to the times."""

    level: Literal["group", "server", "rack", "cluster"]
    ranks: Count
    bandwidth: Positive
    """GB/s that each rank sends during the ring."""
    latency_us: Positive
    """Microseconds of one step of the ring."""


Kind = Literal["zero0", "zero1", "zero2", "zero3", "pipeline"]


class MeasuredEngine(Section):
    """Overhead of DeepSpeed and Python: the time of training a tiny model beyond its computation and communication."""

    kind: Kind
    """Kind of engine: the plain engine by its ZeRO stage, or the pipeline engine."""
    ranks: Count
    """Number of processes. ZeRO-2 and 3 mostly wait for messages, whose number grows with the data-parallel size."""
    step_us: NotNegative
    """Microseconds per step and layer of a rank; for the pipeline engine per step and stage."""
    micro_batch_us: NotNegative
    """Microseconds per micro-batch and layer of a rank; for the pipeline engine per micro-batch and stage."""


class Profile(Section):
    """The fractions of a cluster's figures that a software stack reaches."""

    matmul_efficiency: Share = 0.88
    """Fraction of the peak that an infinitely large matrix product reaches."""
    matmul_saturation: Positive = 2.2
    """A side N or K of this many times (peak / memory bandwidth) FLOP/byte doubles a product's time per operation."""
    token_saturation: Positive = 3.6
    """The same for M, the tokens of a micro-batch."""
    memory_efficiency: Share = 0.73
    """Share of the memory bandwidth that is reached by LayerNorm, dropout, GELU, softmax, residual sums and the optimizer."""
    server_efficiency: Share = 0.53
    """Share of the links inside a server that is reached by collectives."""
    network_efficiency: Share = 0.53
    """Share of the network between servers that is reached by collectives."""
    unaligned: Annotated[float, Field(ge=1.0)] = 5.2
    """Factor on the time of a product whose inner sides are not multiples of 8 elements: matrix units need 16 bytes."""
    overhead_us: NotNegative = 5.0
    """Microseconds to launch one operator."""
    overlap: Annotated[float, Field(ge=1.0)] = 3.0
    """How well ZeRO-3 traffic hides under the computation: exponent k of (traffic^k + computation^k)^(1/k), 1 = not at all."""
    sharing: Annotated[float, Field(ge=1.0)] = 1.0
    """Factor by which a rank is faster while the others wait: processes that share cores get those of the waiting ones."""
    sequence_sums: Annotated[int, Field(ge=0)] = 0
    """Small all-reduces that each layer adds to a backward pass under sequence parallelism. Megatron does them together, once per step."""
    matmuls: tuple[MeasuredMatmul, ...] = ()
    links: tuple[MeasuredLink, ...] = ()
    engines: tuple[MeasuredEngine, ...] = ()

    def correction(self, m: float, n: float, k: float, formula: list[float]) -> float:
        """Factor on the formula's time of a product: mean over the measured products, weighted by 1 / distance^2 of the logarithms.

        Args:
            m, n, k: sides of the product: M x K times K x N.
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
        """The profile as YAML; `load_profile` reads it back equal."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_profile(path: Path | str) -> Profile:
    """Read a profile file; missing keys have their defaults.

    Raises:
        InputError: names the file, the key, what was found and what is expected.
    """
    return read_model(path, Profile)


def save_profile(profile: Profile, path: Path) -> None:
    """Write a profile file; it appears complete or not at all.

    Raises:
        InputError: if it cannot be written.
    """
    try:
        write_durably(path, profile.to_yaml())
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}). Name another file with --output.") from None
