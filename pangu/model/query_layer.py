"""The query layer on top of PanGu-α's Transformer (arXiv 2104.12369, section 2.2.2)."""

from __future__ import annotations

from torch import Tensor

from megatron_ext.collectives import copy_to_tensor_parallel
from megatron_ext.context import ParallelContext
from megatron_ext.layers import Embedding
from megatron_ext.sharding import Init
from pangu.config import ModelConfig
from pangu.model.block import WEIGHT_STD, Block, Cache, RunOptions


class QueryLayer(Block):
    """A Transformer layer whose attention query is an embedding of the position and not a function of its input.

    Row i of the query embedding stands for "the token after position i": it is looked up with the same position ids as the tokens, resets
    included, and is neither normalised nor dropped. Keys, values and the residual stream come from the layer's input as in any block.
    """

    def __init__(self, config: ModelConfig, context: ParallelContext, options: RunOptions) -> None:
        super().__init__(config, context, options, index=config.num_layers - 1)
        init = Init("truncated_normal", WEIGHT_STD)
        self.wqe = Embedding(config.max_positions, config.hidden_size, context, name="transformer.wqe", init=init)

    def forward(self, x_BSH: Tensor, position_ids_BS: Tensor, cache: Cache | None = None, query_BSH: Tensor | None = None) -> Tensor:
        """Apply the layer; `query_BSH` defaults to the embedding of each position.

        With a cache it may cover the last positions only: the layer then returns those, and stores the keys and values of all.
        """
        if query_BSH is None:
            query_BSH = self.query(position_ids_BS)
        return super().forward(x_BSH, position_ids_BS, cache, query_BSH)

    def query(self, position_ids_BS: Tensor) -> Tensor:
        """The query embedding of each position: [B, S, H], replicated."""
        return copy_to_tensor_parallel(self.wqe(position_ids_BS), self.context.tensor)
