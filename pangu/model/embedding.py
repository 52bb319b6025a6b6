"""The bottom of the model: word and position embeddings and the dropout of their sum."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_ext.context import ParallelContext
from megatron_ext.layers import Embedding, VocabParallelEmbedding, split_sequence
from megatron_ext.sharding import Init
from pangu.config import ModelConfig
from pangu.model.block import WEIGHT_STD


class WordEmbedding(VocabParallelEmbedding):
    """The word embedding, which is the output layer too."""

    def __init__(self, config: ModelConfig, context: ParallelContext) -> None:
        init = Init("normal", WEIGHT_STD)
        super().__init__(config.vocab_size, config.hidden_size, context, name="transformer.wte", init=init)


class PositionEmbedding(nn.Module):
    """Adds the embedding of each position to the words and drops the sum.

    A module of its own, apart from the words: a pipeline ties whole modules, and only the words are tied.
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
