"""Device memory of the model states as DeepSpeed 0.19 keeps them: weights, gradients, Adam's states, buffers.

Source of what is sharded: ZeRO (Rajbhandari et al., arXiv 1910.02054, section 5). Copies, paddings and buffers are those of the live
tensors of real engines (tests/pangu/planner/test_real_memory.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from pangu.config.sizes import RankParameters

FP32_BYTES = 4
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a weight, a gradient and an activation under each `train.precision`."""

ZERO3_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default bound on gathered parameters (stage3_max_live_parameters), and on what one update works on (sub_group_size)."""
ALIGNMENT = 2
"""A data rank's part of a flat buffer has a multiple of so many elements in ZeRO-1 and 2 (nccl_start_alignment_factor)."""


@dataclass(frozen=True)
class ModelStates:
    """Bytes of the model states of one rank; the first five fields are on the device."""

    weights: int
    gradients: int
    """Bytes of gradients, on the rank that has most."""
    optimizer: int
    """Bytes of the fp32 copy of the weights and the two moments."""
    buffers: int
    """Bytes of communication buckets, and under ZeRO-3 of the gathered weights."""
    step: int
    """Bytes used only in the optimizer step, when there are no activations: fp32 gradients and one temporary of their size."""
    host: int
    """Bytes that offloading keeps in host memory instead."""

    @property
    def resident(self) -> int:
        """Bytes that are on the device all the time."""
        return self.weights + self.gradients + self.optimizer + self.buffers


@lru_cache(maxsize=4096)
def model_state_bytes(
    parameters: RankParameters,
    *,
    zero_stage: int,
    precision: str,
    data_parallel_size: int,
    bucket_elements: int = 500_000_000,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
) -> ModelStates:
    """Bytes of weights, gradients and Adam states of one rank.

    Without buffers, padding and offloading, per parameter in 16 bits: 16 without ZeRO, 4 + 12/D in stage 1, 2 + 14/D in stage 2, 16/D in
    stage 3. In fp32 it is 16, 8 + 12/D, 4 + 16/D and 20/D: DeepSpeed's ZeRO keeps the copy of the weights that it updates in fp32 too.

    Args:
        parameters: the rank's parameters before ZeRO shards them: its tensor slice of its pipeline stage.
        zero_stage: ZeRO stage, 0 to 3.
        precision: `fp32`, `bf16` or `fp16`.
        data_parallel_size: D, over which ZeRO shards.
        bucket_elements: reduce_bucket_size of the DeepSpeed JSON.
        offload_optimizer: keep optimizer states, and from stage 2 on gradients, in host memory.
        offload_parameters: stage 3 only: also keep weights in host memory.
    """
    element, total, size = BYTES[precision], parameters.total, data_parallel_size
    if zero_stage == 0:
        held, shard = total, total
    elif zero_stage < 3:
        # A flat buffer a group, cut into D equal parts.
        held = sum(-(-group // (ALIGNMENT * size)) * ALIGNMENT * size for group in parameters.groups)
        shard = held // size
    else:
        # Every parameter by itself is cut into D equal parts.
        held = shard = sum(-(-numel // size) for group in (parameters.matrices, parameters.vectors) for numel in group)
    weights = element * held
    gradients = element * (total if zero_stage < 2 else _most_gradients(parameters, size) if zero_stage == 2 else shard)
    has_copy = precision != "fp32" or zero_stage > 0
    optimizer = FP32_BYTES * shard * (3 if has_copy else 2)
    # Without ZeRO in fp32 each parameter is updated in place, one after the other.
    at_once = min(shard, ZERO3_LIVE_PARAMETERS) if zero_stage == 3 else shard
    step = 2 * FP32_BYTES * at_once if has_copy else 0

    buffers = element * bucket_elements if zero_stage or size > 1 else 0
    if zero_stage == 3:
        buffers += element * min(shard * size, ZERO3_LIVE_PARAMETERS)  # gathered with their padding
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


def _most_gradients(parameters: RankParameters, size: int) -> int:
    """ZeRO-2: the largest number of gradient elements on a rank, which keeps the whole gradient of every parameter that its part
    overlaps."""
    kept = [0] * size
    for group in (parameters.matrices, parameters.vectors):
        if not group:
            continue
        part = -(-sum(group) // (ALIGNMENT * size)) * ALIGNMENT
        for end, numel in zip(accumulate(group), group, strict=True):
            for rank in range((end - numel) // part, (end - 1) // part + 1):
                kept[rank] += numel
    return max(kept)
