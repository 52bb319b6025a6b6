"""How much device memory a rank needs: model states as DeepSpeed keeps them, and activations.

Sources: ZeRO (Rajbhandari et al., arXiv 1910.02054, section 5) for what is sharded; DeepSpeed 0.19 for the copies and buffers it really
allocates; Korthikanti et al. (arXiv 2205.05198, sections 4 and 5) for activations. The allocator's own reserve and the device context come
on top: leave a tenth of the device and a gigabyte free.

Shapes: B micro-batch, S sequence, H hidden size, F MLP width, A heads, T tensor-parallel size, D data-parallel size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_ext.topology import Topology
from pangu.config import Config, gradient_accumulation_steps

FP32_BYTES = 4
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a weight, a gradient and an activation under each `train.precision`."""

CHUNK_LOGITS = 2**25
"""Of a rank, that the loss computes at once (megatron_ext.cross_entropy, which this module does not import: it needs no torch)."""

ZERO3_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default bound on gathered parameters (stage3_max_live_parameters), and on what one update works on (sub_group_size)."""


@dataclass(frozen=True)
class ModelStates:
    """Bytes of what belongs to the parameters, on one rank; the first five are on the device."""

    weights: int
    gradients: int
    optimizer: int
    """fp32 copy of the weights and the two moments."""
    buffers: int
    """Communication buckets, and under ZeRO-3 the gathered weights."""
    step: int
    """Only during the optimizer step, when no activations are held: fp32 gradients and one temporary of their size."""
    host: int
    """What offloading keeps in host memory instead."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one rank needs, by kind."""

    states: ModelStates
    activations: int
    """Kept for the backward pass by every micro-batch in flight, and the largest layer that is being recomputed."""
    logits: int
    """Last stage only: a chunk's logits with what is made of them, and the gradients that wait for the backward pass."""

    @property
    def total(self) -> int:
        """Peak on the device: either the backward pass or the optimizer step."""
        states = self.states
        working = max(self.activations + self.logits, states.step)
        return states.weights + states.gradients + states.optimizer + states.buffers + working


def model_state_bytes(
    num_parameters: int,
    *,
    zero_stage: int,
    precision: str,
    data_parallel_size: int,
    bucket_elements: int = 500_000_000,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
) -> ModelStates:
    """Bytes of weights, gradients and Adam states of one rank.

    Without buffers and offloading, per parameter in 16 bits: 16 without ZeRO, 4 + 12/D in stage 1, 2 + 14/D in stage 2, 16/D in stage 3.
    In fp32 it is 16, 8 + 12/D, 4 + 16/D and 20/D: DeepSpeed's ZeRO keeps the copy of the weights that it updates in fp32 training too.

    Args:
        num_parameters: parameters this rank's layers hold before ZeRO shards them: its tensor slice of its pipeline stage.
        zero_stage: 0 to 3.
        precision: `fp32`, `bf16` or `fp16`.
        data_parallel_size: D, over which ZeRO shards.
        bucket_elements: reduce_bucket_size of the DeepSpeed JSON.
        offload_optimizer: optimizer states, and from stage 2 on gradients, live in host memory.
        offload_parameters: stage 3 only: weights live in host memory too.
    """
    element = BYTES[precision]
    shard = math.ceil(num_parameters / data_parallel_size)
    weights = element * (shard if zero_stage == 3 else num_parameters)
    gradients = element * (shard if zero_stage >= 2 else num_parameters)
    updated = shard if zero_stage else num_parameters
    has_copy = precision != "fp32" or zero_stage > 0
    optimizer = FP32_BYTES * updated * (3 if has_copy else 2)
    # Without ZeRO in fp32 each parameter is updated in place, one after the other.
    at_once = min(updated, ZERO3_LIVE_PARAMETERS) if zero_stage == 3 else updated
    step = 2 * FP32_BYTES * at_once if has_copy else 0

    buffers = element * bucket_elements if zero_stage or data_parallel_size > 1 else 0
    if zero_stage == 3:
        buffers += element * min(num_parameters, ZERO3_LIVE_PARAMETERS)
    host = 0
    if offload_optimizer:
        # The host updates with fp32 gradients of its own, and keeps the gradients (stages 2, 3) and new weights (1, 2) that are copied.
        host += optimizer + shard * (FP32_BYTES + element * (2 if zero_stage == 2 else 1))
        optimizer = step = 0
        if zero_stage >= 2:
            gradients = 0
    if offload_parameters:
        host += weights
        weights = 0
    return ModelStates(weights, gradients, optimizer, buffers, step, host)


def layer_activation_bytes(
    *,
    micro_batch: int,
    sequence: int,
    hidden: int,
    ffn_hidden: int,
    heads: int,
    tensor_parallel_size: int,
    sequence_parallel: bool,
    recompute: str,
    fused_attention: bool,
    element: int = 2,
) -> int:
    """Bytes that one layer keeps for the backward pass of one micro-batch (arXiv 2205.05198, table 2), with dropout.

    In 16 bits with F = 4H: S·B·H·(10 + 24/T + 5·A·S/(H·T)); sequence parallelism divides the 10 by T too; selective recomputation and
    fused attention drop the last term; full recomputation keeps the layer's input only, 2·S·B·H.

    Args:
        fused_attention: attention keeps no S × S matrix even without recomputation.
        element: bytes of an activation.
    """
    tokens = micro_batch * sequence
    replicated_over = tensor_parallel_size if sequence_parallel else 1
    if recompute == "full":
        return element * tokens * hidden // replicated_over
    # Inputs of both LayerNorms and of the matrices behind them, and a one-byte mask for each of the two dropouts.
    replicated = tokens * hidden * (4 * element + 2)
    # Query, key, value and the attention output; input and output of GELU.
    split = tokens * element * (4 * hidden + 2 * ffn_hidden)
    if recompute == "none" and not fused_attention:
        # Probabilities, the mask of their dropout, and what the dropout leaves.
        split += tokens * sequence * heads * (2 * element + 1)
    return replicated // replicated_over + split // tensor_parallel_size


def estimate_memory(
    config: Config, layout: Topology, deepspeed: dict[str, Any], *, stage: int, num_layers: int, num_parameters: int
) -> MemoryEstimate:
    """Peak device memory of a rank of one pipeline stage.

    Args:
        config: the run's configuration.
        layout: sizes of the axes.
        deepspeed: the completed DeepSpeed configuration, for offloading and bucket sizes.
        stage: pipeline stage, from 0.
        num_layers: transformer layers of the stage, the query layer included.
        num_parameters: parameters the rank holds before ZeRO shards them.
    """
    model, train, parallel = config.model, config.train, config.parallel
    element = BYTES[train.precision]
    tokens = train.micro_batch_size * train.sequence_length
    zero = deepspeed["zero_optimization"]
    states = model_state_bytes(
        num_parameters,
        zero_stage=zero["stage"],
        precision=train.precision,
        data_parallel_size=layout.data,
        bucket_elements=zero["reduce_bucket_size"],
        offload_optimizer=_is_offloaded(zero, "offload_optimizer"),
        offload_parameters=_is_offloaded(zero, "offload_param"),
    )

    def layer(recompute: str) -> int:
        return layer_activation_bytes(
            micro_batch=train.micro_batch_size,
            sequence=train.sequence_length,
            hidden=model.hidden_size,
            ffn_hidden=model.ffn_hidden_size,
            heads=model.num_heads,
            tensor_parallel_size=layout.tensor,
            sequence_parallel=parallel.sequence,
            recompute=recompute,
            fused_attention=model.attention != "eager",
            element=element,
        )

    kept = num_layers * layer(parallel.recompute)
    hidden_state = tokens * model.hidden_size // (layout.tensor if parallel.sequence else 1)
    if stage == 0:
        kept += hidden_state  # one byte each: the mask of the embedding's dropout
    if stage == layout.pipeline - 1:
        kept += 2 * element * hidden_state  # input of the final LayerNorm, and the query embedding
    # 1F1B: a stage starts as many micro-batches as there are stages from it to the end before it finishes the first.
    in_flight = min(gradient_accumulation_steps(config, layout), layout.pipeline - stage)
    recomputed = layer("none") - layer(parallel.recompute)
    logits = 0
    if stage == layout.pipeline - 1:
        words = math.ceil(model.vocab_size / layout.tensor)
        chunk = min(tokens * words, CHUNK_LOGITS)
        logits = chunk * (element if element == FP32_BYTES else 2 * element + FP32_BYTES)
        logits += words * model.hidden_size * FP32_BYTES + tokens * model.hidden_size * element
    return MemoryEstimate(states, kept * in_flight + recomputed, logits)


def _is_offloaded(zero: dict[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"
