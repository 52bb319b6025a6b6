"""The input of the model: word and position embeddings, and dropout of their sum."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_ext.context import ParallelContext
from megatron_ext.layers import Embedding, VocabParallelEmbedding, split_sequence
from megatron_ext.sharding import Init
from pangu.config import ModelConfig
from pangu.model.block import WEIGHT_STD


class WordEmbedding(VocabParallelEmbedding):
    """The word embedding, which is also the output layer."""

    def __init__(self, config: ModelConfig, context: ParallelContext) -> None:
        init = Init("normal", WEIGHT_STD)
        super().__init__(config.vocab_size, config.hidden_size, context, name="transformer.wte", init=init)


class PositionEmbedding(nn.Module):
    """Adds the embedding of each position to the word embeddings and applies dropout to the sum.

    It is a module separate from the word embedding: a pipeline ties whole modules, and only the word embedding is tied.
    """

    def __init__(self, config: ModelConfig, context: ParallelContext) -> None:
        super().__init__()
        self.config, self.context = config, context
        init = Init("truncated_normal", WEIGHT_STD)
        self.wpe = Embedding(config.max_positions, config.hidden_size, context, name="transformer.wpe", init=init)

    def forward(self, words_BSH: Tensor, position_ids_BS: Tensor) -> Tensor:
        """words_BSH on the residual stream, position_ids_BS int64 for the whole sequence -> x_BSH on the residual stream."""
        x_BSH = words_BSH + split_sequence(self.wpe(position_ids_BS), self.context)
        return self.context.rng.dropout(x_BSH, self.config.hidden_dropout, training=self.training, split=self.context.splits_sequence)
