"""What is to be trained, and one way to lay it over devices: what the memory model, the time model and the search speak about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_ext.topology import Topology
from pangu.config import ModelConfig

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Workload:
    """What every plan has to train."""

    model: ModelConfig
    sequence_length: int
    """Tokens a sample."""
    global_batch_size: int
    """Samples an optimizer step sees."""
    precision: str
    """`fp32`, `bf16` or `fp16`."""


@dataclass(frozen=True)
class Plan:
    """How the work is split."""

    layout: Topology
    micro_batch_size: int
    """Samples a rank computes at once."""
    stage_layers: tuple[int, ...]
    """Transformer layers of each pipeline stage, the query layer included. The first stage holds the embeddings too, the last the final
    LayerNorm, the query layer and the logits."""
    zero_stage: int = 1
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    offload_optimizer: bool = False
    offload_parameters: bool = False
    interleave: int = 1
    """Model parts a stage holds in turn (arXiv 2104.04473, section 2.2). DeepSpeed has no such schedule: only runs of others do."""
    order: Literal["tp-dp-pp", "tp-pp-dp"] = "tp-dp-pp"
    """Axes of the grid of ranks, the one that varies fastest first: replicas near and stages far, or the reverse."""

    def micro_batches(self, workload: Workload) -> int:
        """Micro-batches a pipeline computes for one optimizer step."""
        return workload.global_batch_size // (self.layout.data * self.micro_batch_size)
