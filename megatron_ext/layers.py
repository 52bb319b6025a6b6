"""Linear layers and embeddings split over the tensor-parallel group (Megatron-LM, arXiv 1909.08053, section 3).

Shapes: B micro-batch, S sequence, I input features, O output features, V vocabulary, H hidden, T tensor-parallel size.
Under sequence parallelism (arXiv 2205.05198, section 4.2.2) the activations between the parallel layers hold S/T positions per rank; the
column-parallel layers gather them and the row-parallel layers scatter them again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ext.collectives import (
    copy_to_tensor_parallel,
    gather_from_sequence_parallel,
    reduce_from_tensor_parallel,
    reduce_scatter_to_sequence_parallel,
    scatter_to_sequence_parallel,
)
from megatron_ext.context import ParallelContext
from megatron_ext.initialize import make_parameter
from megatron_ext.matmul import linear
from megatron_ext.sharding import ONES, ZEROS, Init, ShardSpec

SEQUENCE_DIM = 1


def enter_tensor_parallel(x_BSH: Tensor, context: ParallelContext) -> Tensor:
    """Pass the residual stream to column-parallel layers: the whole sequence on every rank, its gradient summed over the ranks.

    Layers that share an input (query, key and value) share this one communication.

    Shapes: x_BSH, S/T positions under sequence parallelism -> x_BSH, whole sequence.
    """
    if context.sequence_parallel:
        return gather_from_sequence_parallel(x_BSH, context.tensor, SEQUENCE_DIM)
    return copy_to_tensor_parallel(x_BSH, context.tensor)


def leave_tensor_parallel(partial_BSH: Tensor, context: ParallelContext) -> Tensor:
    """Sum the ranks' partial results into the residual stream.

    Shapes: partial_BSH, whole sequence -> x_BSH; S/T positions under sequence parallelism.
    """
    if context.sequence_parallel:
        return reduce_scatter_to_sequence_parallel(partial_BSH, context.tensor, SEQUENCE_DIM)
    return reduce_from_tensor_parallel(partial_BSH, context.tensor)


def split_sequence(x_BSH: Tensor, context: ParallelContext) -> Tensor:
    """Bring a tensor that every rank holds whole into the layout of the residual stream.

    Shapes: x_BSH, whole sequence -> x_BSH; S/T positions under sequence parallelism.
    """
    return scatter_to_sequence_parallel(x_BSH, context.tensor, SEQUENCE_DIM) if context.sequence_parallel else x_BSH


def replicated(parameter: Tensor, context: ParallelContext) -> Tensor:
    """Prepare a replicated parameter for use on the residual stream: under sequence parallelism its gradient is summed over the group.

    There each rank applies the parameter to different positions. Summing inside autograd works under every engine and ZeRO stage; a hook
    in DeepSpeed's own reduction would not.
    """
    return copy_to_tensor_parallel(parameter, context.tensor) if context.sequence_parallel else parameter


class ColumnParallelLinear(nn.Module):
    """y = x Wᵀ + b with W split along its output features; each rank computes O/T of them.

    The caller passes its input through `enter_tensor_parallel` first.

    Args:
        in_features: I.
        out_features: O of the full weight; must be divisible by T.
        context: where the layer runs.
        name: canonical name; `.weight` and `.bias` are appended.
        init: distribution of the weight's initial values. The bias starts at zero.

    Shapes: x_BSI, whole sequence -> y_BSO with O/T features.

    Raises:
        LayoutError: if `out_features` is not divisible by T.
    """

    def __init__(self, in_features: int, out_features: int, context: ParallelContext, *, name: str, init: Init) -> None:
        super().__init__()
        self.weight = make_parameter(ShardSpec(f"{name}.weight", (out_features, in_features), init, split_dim=0), context)
        self.bias = make_parameter(ShardSpec(f"{name}.bias", (out_features,), ZEROS, split_dim=0), context)

    def forward(self, x_BSI: Tensor) -> Tensor:
        """Apply the layer."""
        return linear(x_BSI, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = x Wᵀ + b with W split along its input features; the ranks' partial products are summed (`leave_tensor_parallel`).

    The bias is added once, after the sum, so that T ranks do not add it T times.

    Args:
        in_features: I of the full weight; must be divisible by T.
        out_features: O.
        context: where the layer runs.
        name: canonical name; `.weight` and `.bias` are appended.
        init: distribution of the weight's initial values. The bias starts at zero.

    Shapes: x_BSI with I/T features -> y_BSO; S/T positions under sequence parallelism.

    Raises:
        LayoutError: if `in_features` is not divisible by T.
    """

    def __init__(self, in_features: int, out_features: int, context: ParallelContext, *, name: str, init: Init) -> None:
        super().__init__()
        self.context = context
        self.weight = make_parameter(ShardSpec(f"{name}.weight", (out_features, in_features), init, split_dim=1), context)
        self.bias = make_parameter(ShardSpec(f"{name}.bias", (out_features,), ZEROS), context)

    def forward(self, x_BSI: Tensor) -> Tensor:
        """Apply the layer."""
        return leave_tensor_parallel(linear(x_BSI, self.weight), self.context) + replicated(self.bias, self.context)


class VocabParallelEmbedding(nn.Module):
    """A table of V rows split over the ranks; also the output layer that is tied to it.

    A vocabulary that is not divisible by T is padded with zero rows that are never looked up. Their logits are not masked here: whoever
    reads the logits must mask them (`mask_padded_ids`, `cross_entropy_`).

    Args:
        num_embeddings: V, without padding.
        embedding_dim: H.
        context: where the layer runs.
        name: canonical name; `.weight` is appended.
        init: distribution of the table's initial values.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, context: ParallelContext, *, name: str, init: Init) -> None:
        super().__init__()
        self.context = context
        self.num_embeddings = num_embeddings
        spec = ShardSpec(f"{name}.weight", (num_embeddings, embedding_dim), init, split_dim=0, padded=True)
        self.first_id = spec.offset(context.tensor.rank, context.tensor.size)
        self.num_local = spec.local_shape(context.tensor.size)[0]
        self.weight = make_parameter(spec, context)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Look ids up.

        Shapes: ids_BS int64, whole sequence -> x_BSH; S/T positions under sequence parallelism.
        """
        if self.context.tensor.size == 1:
            return F.embedding(ids_BS, self.weight)
        local_BS = ids_BS - self.first_id
        foreign_BS = (local_BS < 0) | (local_BS >= self.num_local)
        partial_BSH = F.embedding(local_BS.masked_fill(foreign_BS, 0), self.weight).masked_fill(foreign_BS.unsqueeze(-1), 0.0)
        return leave_tensor_parallel(partial_BSH, self.context)

    def logits(self, x_BSH: Tensor) -> Tensor:
        """Logits of this rank's ids: the output layer tied to the table, without a bias.

        Shapes: x_BSH on the residual stream -> logits_BSV, whole sequence, this rank's V/T ids (padding included, not masked).
        """
        return linear(enter_tensor_parallel(x_BSH, self.context), self.weight)


class LayerNorm(nn.Module):
    """Layer normalisation over H on the residual stream (biased variance, epsilon inside the square root).

    The kernel computes in fp32 whatever the dtype of its input.
    """

    def __init__(self, dim: int, context: ParallelContext, *, name: str, eps: float = 1e-5) -> None:
        super().__init__()
        self.context = context
        self.eps = eps
        self.weight = make_parameter(ShardSpec(f"{name}.weight", (dim,), ONES), context)
        self.bias = make_parameter(ShardSpec(f"{name}.bias", (dim,), ZEROS), context)

    def forward(self, x_BSH: Tensor) -> Tensor:
        """Apply the layer."""
        weight, bias = replicated(self.weight, self.context), replicated(self.bias, self.context)
        return F.layer_norm(x_BSH, weight.shape, weight, bias, self.eps)


class Embedding(nn.Module):
    """A table that every rank holds whole, such as position embeddings.

    Every rank looks up the whole sequence, so that the gradient need not be summed over the ranks.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, context: ParallelContext, *, name: str, init: Init) -> None:
        super().__init__()
        self.weight = make_parameter(ShardSpec(f"{name}.weight", (num_embeddings, embedding_dim), init), context)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Look ids up: ids_BS int64 -> x_BSH, whole sequence."""
        return F.embedding(ids_BS, self.weight)


def mask_padded_ids(logits_V: Tensor, first_id: int, vocab_size: int) -> Tensor:
    """Set the logits of ids at or beyond `vocab_size`, which only pad the vocabulary, to -inf.

    Args:
        logits_V: any shape and float dtype; the last dimension holds consecutive ids.
        first_id: the id at index 0 of the last dimension.
        vocab_size: number of ids without padding.
    """
    num_real = max(0, min(logits_V.shape[-1], vocab_size - first_id))
    if num_real == logits_V.shape[-1]:
        return logits_V
    padded = torch.arange(logits_V.shape[-1], device=logits_V.device) >= num_real
    return logits_V.masked_fill(padded, float("-inf"))
