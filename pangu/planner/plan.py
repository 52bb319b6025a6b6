"""The training workload and a plan, one layout of it, on which the memory model, the time model and the search operate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_ext.topology import Topology
from pangu.config import Config, ModelConfig
from pangu.config.layout import RunLayout, default_bucket_size

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Workload:
    """The training workload, which is the same for every plan."""

    model: ModelConfig
    sequence_length: int
    """Tokens per sample."""
    global_batch_size: int
    """Samples per optimizer step."""
    precision: str
    """Training precision: `fp32`, `bf16` or `fp16`."""
    eod_reset: bool = True
    """Whether attention is limited to documents, and therefore given a mask."""


@dataclass(frozen=True)
class Plan:
    """One way to distribute the workload over devices."""

    layout: Topology
    micro_batch_size: int
    """Samples that a rank computes at once."""
    stage_layers: tuple[int, ...]
    """Transformer layers of each pipeline stage, the query layer included. The first stage holds the embeddings too, the last the final
    LayerNorm, the query layer and the logits."""
    zero_stage: int = 1
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    offload_optimizer: bool = False
    offload_parameters: bool = False
    interleave: int = 1
    """Number of model chunks per stage in an interleaved schedule (arXiv 2104.04473, section 2.2). DeepSpeed has no such schedule; measured
    runs of others do."""
    bucket_elements: int = 0
    """Number of elements of the buffers in which DeepSpeed reduces gradients (see the function `bucket_elements`)."""

    def micro_batches(self, workload: Workload) -> int:
        """Number of micro-batches that a pipeline computes per optimizer step."""
        return workload.global_batch_size // (self.layout.data * self.micro_batch_size)


def workload_of(config: Config) -> Workload:
    """The workload of a configuration, independent of its layout."""
    train = config.train
    return Workload(config.model, train.sequence_length, train.global_batch_size, train.precision, config.data.eod_reset)


def plan_of(config: Config, layout: RunLayout) -> tuple[Workload, Plan]:
    """The workload and the plan of a configuration.

    Args:
        config: the run's configuration.
        layout: the layout of its processes (pangu.config.layout.resolve).
    """
    parallel, zero = config.parallel, layout.deepspeed["zero_optimization"]

    def is_offloaded(key: str) -> bool:
        return (zero.get(key) or {}).get("device", "none") != "none"

    plan = Plan(
        layout.topology,
        config.train.micro_batch_size,
        layout.stage_layers,
        zero_stage=parallel.zero_stage,
        sequence_parallel=parallel.sequence,
        recompute=parallel.recompute,
        offload_optimizer=is_offloaded("offload_optimizer"),
        offload_parameters=is_offloaded("offload_param"),
        bucket_elements=bucket_elements(zero, config.model, layout.topology.pipeline),
    )
    return workload_of(config), plan


def bucket_elements(zero: dict[str, Any], model: ModelConfig, pipeline: int) -> int:
    """Number of elements of the buffers in which DeepSpeed reduces gradients: two buffers if one is filled while the other is reduced.

    Args:
        zero: the section `zero_optimization` of a DeepSpeed JSON.
        model: the model's configuration.
        pipeline: number of stages; with several DeepSpeed does not reduce before the last micro-batch.
    """
    size = zero.get("reduce_bucket_size", default_bucket_size(model))
    return 2 * size if zero.get("overlap_comm") and zero["stage"] in (1, 2) and pipeline == 1 else size
