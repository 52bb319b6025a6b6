"""Device memory that a rank needs: model states as DeepSpeed keeps them (pangu.planner.states), and activations.

What a layer keeps is counted from our own layers and checked against what torch actually holds (tests/pangu/planner/test_real_memory.py).
With the constants of `MEGATRON` it is the formula of Korthikanti et al. (arXiv 2205.05198, sections 4 and 5).

Shapes: B micro-batch, S sequence, H hidden size, F MLP width, A heads, T tensor-parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from pangu.config.activations import ACTIVATIONS
from pangu.config.sizes import rank_parameters
from pangu.planner.plan import Plan, Workload
from pangu.planner.states import BYTES, FP32_BYTES, ModelStates, model_state_bytes

GIB = 2**30

CHUNK_LOGITS = 2**24
"""Number of logits that a rank computes at once (megatron_ext.cross_entropy, which is not imported, because it needs torch)."""


@dataclass(frozen=True)
class Platform:
    """What implementations keep in memory differently, and what must be left free."""

    mask_bytes: int = 1
    """Bytes per element of a dropout mask; 0: as many as the activations' dtype, as torch keeps on CPU."""
    fused_dropout: bool = True
    """Whether fused attention supports dropout. Otherwise torch falls back to an implementation that keeps S x S matrices."""
    softmax_in_fp32: bool = True
    """Whether eager attention keeps its probabilities in fp32."""
    keeps_gathered: bool = True
    """Whether, under sequence parallelism, the gathered input of column-parallel layers is kept whole; otherwise it is gathered again."""
    keeps_small: bool = True
    """Whether to count what is small beside a hidden state: statistics of LayerNorm and attention, attention masks, token ids."""
    chunked_loss: bool = True
    """Whether the loss processes the tokens in chunks; otherwise the logits of a whole micro-batch are in memory at once."""
    pipeline_copies: bool = True
    """Whether the pipeline keeps what a stage receives and sends until the backward pass, as DeepSpeed does, besides what autograd
    keeps."""
    update_copies: bool = True
    """Whether the optimizer step makes fp32 copies of the gradients, as DeepSpeed's does."""
    reserve_fraction: float = 0.1
    """Reserve for the allocator's fragmentation and temporaries of single kernels, as a fraction of the memory that is needed."""
    reserve_bytes: int = 3 * GIB // 2
    """Reserve in bytes for the device's context and the communication library."""


ACCELERATOR = Platform()
CPU = Platform(mask_bytes=0, fused_dropout=False, reserve_fraction=0.0, reserve_bytes=0)
MEGATRON = Platform(
    softmax_in_fp32=False, keeps_gathered=False, keeps_small=False, chunked_loss=False, pipeline_copies=False, update_copies=False
)
"""Megatron-LM on GPUs, as its authors count."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one rank needs, by kind."""

    states: ModelStates
    activations: int
    """Bytes kept for the backward pass by all micro-batches in flight, with the exchanged hidden states of the pipeline."""
    recomputed: int
    """Bytes that one layer holds in addition while it is recomputed."""
    logits: int
    """Last stage only: bytes of a chunk's logits and their temporaries, and of the gradients kept for the backward pass."""
    reserve: int
    """Bytes to be left free."""

    @property
    def peak(self) -> int:
        """Largest sum of tensors on the device, in bytes: either in the backward pass or in the optimizer step."""
        return self.states.resident + max(self.activations + max(self.recomputed, self.logits), self.states.step)

    @property
    def total(self) -> int:
        """Memory in bytes that the device must have: the peak and the reserve."""
        return self.peak + self.reserve


def estimate_memory(workload: Workload, plan: Plan, stage: int, platform: Platform = ACCELERATOR) -> MemoryEstimate:
    """Device memory of a rank of one pipeline stage, counted from 0."""
    layout, model = plan.layout, workload.model
    first, last = stage == 0, stage == layout.pipeline - 1
    states = model_state_bytes(
        rank_parameters(model, layout.tensor, plan.stage_layers[stage], first=first, last=last),
        zero_stage=plan.zero_stage,
        precision=workload.precision,
        data_parallel_size=layout.data,
        bucket_elements=plan.bucket_elements,
        offload_optimizer=plan.offload_optimizer,
        offload_parameters=plan.offload_parameters,
    )
    if not platform.update_copies:
        states = replace(states, step=0)
    layer = layer_activation_bytes(workload, plan, platform)
    recomputed = layer_activation_bytes(workload, plan, platform, recompute="none") - layer
    kept = plan.stage_layers[stage] * layer + end_activation_bytes(workload, plan, platform, first=first, last=last)
    parts = micro_batch_parts_in_flight(plan, stage, plan.micro_batches(workload))
    activations = kept * parts // plan.interleave
    if platform.pipeline_copies and layout.pipeline > 1:
        activations += exchanged_bytes(workload, plan, parts, first=first, last=last)
    logits = logits_bytes(workload, plan, platform) if last else 0
    needed = states.resident + max(activations + max(recomputed, logits), states.step)
    reserve = int(platform.reserve_fraction * needed) + platform.reserve_bytes
    return MemoryEstimate(states, activations, recomputed, logits, reserve)


def micro_batch_parts_in_flight(plan: Plan, stage: int, micro_batches: int) -> int:
    """The largest number of forward passes of its model chunks that a stage is ahead of its backward passes.

    1F1B: as many as there are stages from it to the end. Interleaved: see arXiv 2104.04473, section 2.2; of the first stage's layers it is
    1 + (p - 1) / (p v) times what 1F1B holds.
    """
    stages, parts = plan.layout.pipeline, plan.interleave
    to_the_end = stages - stage
    ahead = to_the_end if parts == 1 else 2 * to_the_end - 1 + (parts - 1) * stages
    return min(ahead, micro_batches * parts)


@lru_cache(maxsize=4096)
def _score_bytes(workload: Workload, micro_batch: int, tensor: int, platform: Platform) -> int:
    """Bytes that attention keeps besides queries, keys, values and its output."""
    model, length = workload.model, workload.sequence_length
    element = BYTES[workload.precision]
    mask_bytes = platform.mask_bytes or element
    heads, drops = model.num_heads // tensor, model.attention_dropout > 0
    squares = micro_batch * length * length
    statistics = 0
    if model.attention == "eager":
        # Probabilities; if they are dropped the mask and what it leaves; in 16 bits the product's own copy.
        softmax = FP32_BYTES if platform.softmax_in_fp32 else element
        kept = softmax + (mask_bytes + element if drops else element if softmax != element else 0)
        statistics = squares if workload.eod_reset else length * length  # one byte an element of the mask
    elif drops and not platform.fused_dropout:
        kept = 2 * element + mask_bytes
    else:
        kept = 0
        if model.attention == "npu_fusion":
            # Maximum and sum of each row, eight times in fp32; and the mask, without documents a triangle of 2048.
            statistics = 16 * FP32_BYTES * micro_batch * length * heads + (squares if workload.eod_reset else 2048 * 2048)
        else:
            # Each row's logarithm of the sum; and the mask as numbers to add.
            statistics = FP32_BYTES * micro_batch * length * heads + (element * squares if workload.eod_reset else 0)
    return kept * squares * heads + (statistics if platform.keeps_small else 0)


def layer_activation_bytes(workload: Workload, plan: Plan, platform: Platform, recompute: str | None = None) -> int:
    """Bytes that one layer keeps for the backward pass of one micro-batch.

    In 16 bits with F = 4H, dropout and eager attention: B·S·H·(10 + 24/T + 7·A·S/(H·T)), the last term 5·A·S/(H·T) where probabilities are
    kept in 16 bits. Selective recomputation and fused attention drop it; full recomputation keeps the layer's input only, 2·B·S·H.
    Sequence parallelism divides 6 of the 10 by T, and the other 4 too where gathered inputs are not kept.

    Args:
        workload: the training workload.
        plan: the layout.
        platform: what the implementation keeps.
        recompute: mode of recomputation; None: the plan's.
    """
    model, recompute = workload.model, recompute or plan.recompute
    tensor, element = plan.layout.tensor, BYTES[workload.precision]
    tokens = plan.micro_batch_size * workload.sequence_length
    own = tokens // tensor if plan.sequence_parallel else tokens
    if recompute == "full":
        return element * own * model.hidden_size
    entered = tokens if platform.keeps_gathered else own
    masks = 2 * (platform.mask_bytes or element) if model.hidden_dropout > 0 else 0
    # Inputs of both LayerNorms and the masks of both dropouts; inputs of the matrices behind the LayerNorms.
    kept = model.hidden_size * ((2 * element + masks) * own + 2 * element * entered)
    if platform.keeps_small:
        kept += 2 * 2 * FP32_BYTES * own  # mean and deviation of each token, twice
    # Query, key, value and the attention output; what the activation keeps.
    wide = ACTIVATIONS[model.gelu].saved_tensors
    kept += tokens * element * (4 * model.hidden_size + wide * model.ffn_hidden_size) // tensor
    if recompute == "none":
        kept += _score_bytes(workload, plan.micro_batch_size, tensor, platform)
    elif workload.eod_reset and platform.keeps_small:
        kept += tokens * workload.sequence_length  # the mask, for the second time
    return kept


def end_activation_bytes(workload: Workload, plan: Plan, platform: Platform, *, first: bool, last: bool) -> int:
    """Bytes that one micro-batch keeps outside the transformer layers of a stage."""
    model, tensor, element = workload.model, plan.layout.tensor, BYTES[workload.precision]
    tokens = plan.micro_batch_size * workload.sequence_length
    own = tokens // tensor if plan.sequence_parallel else tokens
    hidden_state = element * own * model.hidden_size
    kept = 0
    if first:
        if model.hidden_dropout > 0:
            kept += (platform.mask_bytes or element) * own * model.hidden_size
        if platform.keeps_small:
            kept += tokens * (16 + (9 if tensor > 1 else 0))  # token and position ids; ids within the slice, and whether they are in it
    if last:
        entered = element * tokens * model.hidden_size if platform.keeps_gathered else hidden_state
        kept += hidden_state + entered  # input of the final LayerNorm; the gradient of what the loss reads (or else its input)
        kept += element * tokens * model.hidden_size  # the query embedding, looked up for every position
        if platform.keeps_small:
            kept += tokens * 12 + 2 * FP32_BYTES * own  # labels and loss mask; the LayerNorm's statistics
    return kept


def exchanged_bytes(workload: Workload, plan: Plan, in_flight: int, *, first: bool, last: bool) -> int:
    """Bytes of the hidden states exchanged with neighbouring stages that DeepSpeed's pipeline engine keeps."""
    tokens = plan.micro_batch_size * workload.sequence_length
    whole = BYTES[workload.precision] * tokens * workload.model.hidden_size
    sent = whole // plan.layout.tensor  # it cuts what every tensor rank has; under sequence parallelism it is cut already
    held = sent if plan.sequence_parallel else whole
    is_gathered = sent < held
    # It has two buffers even where one micro-batch is in flight.
    buffers = min(max(2, in_flight), plan.micro_batches(workload))
    # Copies of the ids: of tokens and positions on the first stage, of positions on the others.
    kept = tokens * (16 * in_flight if first else 8 * buffers)
    if not first:
        # Received copies; what is gathered from the parts takes the copy's place, and is what the first layer keeps.
        kept += sent + (buffers - in_flight if is_gathered else buffers) * held
    if not last:
        kept += sent + in_flight * sent  # a gradient, and outputs
    return kept


def logits_bytes(workload: Workload, plan: Plan, platform: Platform) -> int:
    """Bytes of a chunk's logits and their temporaries, and of the output layer's gradient, which is computed with the loss.

    Where the loss is not chunked: all logits, their fp32 probabilities and the gradient of the loss.
    """
    model, element = workload.model, BYTES[workload.precision]
    width = -(-model.vocab_size // plan.layout.tensor)
    logits = plan.micro_batch_size * workload.sequence_length * width
    if not platform.chunked_loss:
        return logits * (element + 2 * FP32_BYTES)
    # In 16 bits the logits, their fp32 copy that becomes the gradient, and that again in 16 bits; in fp32 all in one place.
    each = element if element == FP32_BYTES else 2 * element + FP32_BYTES
    return min(logits, CHUNK_LOGITS) * each + width * model.hidden_size * FP32_BYTES
