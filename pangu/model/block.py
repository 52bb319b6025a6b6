"""One pre-LN Transformer layer, split over the tensor-parallel group.

Shapes: B micro-batch, S sequence (S/T on the residual stream under sequence parallelism), H hidden, F feed-forward, N heads on this rank,
D head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron_ext.attention import core_attention, document_mask
from megatron_ext.context import ParallelContext
from megatron_ext.layers import ColumnParallelLinear, LayerNorm, RowParallelLinear, enter_tensor_parallel
from megatron_ext.recompute import recompute
from megatron_ext.sharding import Init
from pangu.config import ModelConfig
from pangu.config.activations import ACTIVATIONS

# How the released code drew its weights: query, key and value with half the deviation of the rest, output projections scaled by depth.
QKV_STD = 0.01
WEIGHT_STD = 0.02


class Cache(Protocol):
    """The interface of a key-value cache that attention uses during generation."""

    def append(self, k_BNSD: Tensor, v_BNSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store the new keys and values; return all keys, all values and the bool mask [B, 1, S, K] of what each new query sees."""


@dataclass(frozen=True)
class RunOptions:
    """Options of the forward pass that belong to the run and not to the model."""

    recompute: str = "none"
    """Mode of recomputation: `none`, `selective` or `full` (megatron_ext.recompute)."""
    reset_at_document: bool = False
    """Whether attention is limited to a document, which begins where the position id is 0; otherwise it is causal."""


class Attention(nn.Module):
    """Multi-head attention with three separate projections, the heads split over the ranks."""

    def __init__(self, config: ModelConfig, context: ParallelContext, options: RunOptions, *, name: str) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.config, self.context, self.options, self.recompute = config, context, options, recompute
        self.head_dim = hidden // config.num_heads
        self.q_proj = ColumnParallelLinear(hidden, hidden, context, name=f"{name}.q_proj", init=Init("normal", QKV_STD))
        self.k_proj = ColumnParallelLinear(hidden, hidden, context, name=f"{name}.k_proj", init=Init("normal", QKV_STD))
        self.v_proj = ColumnParallelLinear(hidden, hidden, context, name=f"{name}.v_proj", init=Init("normal", QKV_STD))
        self.c_proj = RowParallelLinear(hidden, hidden, context, name=f"{name}.c_proj", init=_output_init(config))

    def forward(self, x_BSH: Tensor, position_ids_BS: Tensor, cache: Cache | None, query_BSH: Tensor | None) -> Tensor:
        """Apply the sublayer.

        Args:
            x_BSH: normalised residual stream: the source of keys and values, and of the queries unless those come from `query_BSH`.
            position_ids_BS: int64, whole sequence.
            cache: keys and values of earlier tokens, while generating.
            query_BSH: the query layer's query embedding, replicated, for the whole sequence or, with a cache, for its last positions only.

        Returns:
            The sublayer's output on the residual stream, for the positions that have a query.
        """
        x_BSH = enter_tensor_parallel(x_BSH, self.context)
        q_BNSD = self._heads(self.q_proj(x_BSH if query_BSH is None else query_BSH))
        k_BNSD, v_BNSD = self._heads(self.k_proj(x_BSH)), self._heads(self.v_proj(x_BSH))
        mask: Tensor | None = None
        if cache is not None:
            k_BNSD, v_BNSD, mask = cache.append(k_BNSD, v_BNSD)
            mask = mask[:, :, -q_BNSD.shape[2] :]
        elif self.options.reset_at_document:
            mask = document_mask(position_ids_BS)
        attend = partial(
            core_attention,
            implementation=self.config.attention,
            dropout=self.config.attention_dropout if self.training else 0.0,
            rng=self.context.rng,
        )
        if self.options.recompute == "selective" and torch.is_grad_enabled():
            out_BNSD = self.recompute(attend, q_BNSD, k_BNSD, v_BNSD, mask, rng=self.context.rng)
        else:
            out_BNSD = attend(q_BNSD, k_BNSD, v_BNSD, mask)
        return self.c_proj(out_BNSD.transpose(1, 2).flatten(2))

    def _heads(self, x_BSH: Tensor) -> Tensor:
        return x_BSH.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    """The feed-forward sublayer, its F features split over the ranks."""

    def __init__(self, config: ModelConfig, context: ParallelContext, *, name: str) -> None:
        super().__init__()
        hidden, features = config.hidden_size, config.ffn_hidden_size
        self.context = context
        self.activation = ACTIVATIONS[config.gelu].build()
        self.c_fc = ColumnParallelLinear(hidden, features, context, name=f"{name}.c_fc", init=Init("normal", WEIGHT_STD))
        self.c_proj = RowParallelLinear(features, hidden, context, name=f"{name}.c_proj", init=_output_init(config))

    def forward(self, x_BSH: Tensor) -> Tensor:
        """Apply the sublayer on the residual stream."""
        return self.c_proj(self.activation(self.c_fc(enter_tensor_parallel(x_BSH, self.context))))


class Block(nn.Module):
    """x += attention(LN₁(x)); x += MLP(LN₂(x)). The residual is taken before normalisation.

    Args:
        config: the model's configuration.
        context: where the layer runs.
        options: options of this run.
        index: index of the layer in the model, from 0; its parameters are named `transformer.h.{index}.…`.
    """

    def __init__(self, config: ModelConfig, context: ParallelContext, options: RunOptions, *, index: int) -> None:
        super().__init__()
        name = f"transformer.h.{index}"
        self.config, self.context, self.options = config, context, options
        self.ln_1 = LayerNorm(config.hidden_size, context, name=f"{name}.ln_1")
        self.attn = Attention(config, context, options, name=f"{name}.attn")
        self.ln_2 = LayerNorm(config.hidden_size, context, name=f"{name}.ln_2")
        self.mlp = MLP(config, context, name=f"{name}.mlp")

    def forward(self, x_BSH: Tensor, position_ids_BS: Tensor, cache: Cache | None = None, query_BSH: Tensor | None = None) -> Tensor:
        """Apply the layer; recomputed in the backward pass if the run asks for `full`."""
        if self.options.recompute == "full" and torch.is_grad_enabled():
            return recompute(self._layer, x_BSH, position_ids_BS, cache, query_BSH, rng=self.context.rng)
        return self._layer(x_BSH, position_ids_BS, cache, query_BSH)

    def compile_layer(self) -> None:
        """Compile the layer with torch.compile, without recomputation: that restores random streams, which torch.compile cannot do."""
        self.attn.recompute = torch.compiler.disable(recompute)
        self._layer = torch.compile(self._layer)  # type: ignore[method-assign]

    def _layer(self, x_BSH: Tensor, position_ids_BS: Tensor, cache: Cache | None, query_BSH: Tensor | None) -> Tensor:
        attended_BSH = self._dropout(self.attn(self.ln_1(x_BSH), position_ids_BS, cache, query_BSH))
        if cache is not None:
            x_BSH = x_BSH[:, -attended_BSH.shape[1] :]
        x_BSH = x_BSH + attended_BSH
        return x_BSH + self._dropout(self.mlp(self.ln_2(x_BSH)))

    def _dropout(self, x_BSH: Tensor) -> Tensor:
        return self.context.rng.dropout(x_BSH, self.config.hidden_dropout, training=self.training, split=self.context.splits_sequence)


def _output_init(config: ModelConfig) -> Init:
    return Init("normal", WEIGHT_STD / math.sqrt(2 * config.num_layers))
