"""PanGu-α as one module, for ZeRO training without a pipeline, inference and conversion.

The pipeline (pangu.engine.pipeline) is built from the same parts and gives the same numbers.
Shapes: B micro-batch, S sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from megatron_ext.collectives import all_gather
from megatron_ext.context import ParallelContext
from megatron_ext.cross_entropy import linear_cross_entropy
from megatron_ext.layers import LayerNorm, VocabParallelEmbedding, enter_tensor_parallel, mask_padded_ids
from megatron_ext.topology import Group
from pangu.config import ModelConfig
from pangu.model.block import Block, Cache, RunOptions
from pangu.model.embedding import PositionEmbedding, WordEmbedding
from pangu.model.query_layer import QueryLayer


class PanguModel(nn.Module):
    """The whole model, or this rank's slice of it.

    Args:
        config: sizes and dialect.
        context: where the model runs and how it is split.
        options: options of this run; the default is for inference.
    """

    def __init__(self, config: ModelConfig, context: ParallelContext, options: RunOptions | None = None) -> None:
        super().__init__()
        options = options or RunOptions()
        self.config, self.context = config, context
        self.wte = WordEmbedding(config, context)
        self.position = PositionEmbedding(config, context)
        self.blocks = nn.ModuleList(Block(config, context, options, index=i) for i in range(config.num_layers - 1))
        self.ln_f = LayerNorm(config.hidden_size, context, name="transformer.ln_f")
        self.query_layer = QueryLayer(config, context, options)

    def forward(self, tokens_BS: Tensor, position_ids_BS: Tensor, labels_BS: Tensor, loss_mask_BS: Tensor) -> Tensor:
        """The mean loss of a micro-batch (fp32 scalar): see `language_model_loss`."""
        return language_model_loss(self.wte, self.hidden(tokens_BS, position_ids_BS), labels_BS, loss_mask_BS)

    def logits(self, tokens_BS: Tensor, position_ids_BS: Tensor, caches: Sequence[Cache] | None = None) -> Tensor:
        """Logits of the next token at every position.

        Args:
            tokens_BS: int64, whole sequence on every rank.
            position_ids_BS: int64, the position of each token in its document.
            caches: during generation, one per layer, the query layer last.

        Returns:
            [B, S, V/T]: the logits of this rank's slice of the padded vocabulary (`gather_logits` gathers and trims them).
        """
        return self.wte.logits(self.hidden(tokens_BS, position_ids_BS, caches))

    def hidden(
        self, tokens_BS: Tensor, position_ids_BS: Tensor, caches: Sequence[Cache] | None = None, *, last_only: bool = False
    ) -> Tensor:
        """The input of the output layer (`wte.logits`): x_BSH on the residual stream. The arguments are those of `logits`.

        With `last_only`, which needs caches, only the last position: [B, 1, H]. Generation needs no other, and the logits of a whole
        prompt would be its largest tensor.
        """
        assert caches is not None or not last_only, "what the layers do not compute must come from their caches later"
        caches = caches or [None] * self.config.num_layers  # type: ignore[list-item]
        x_BSH = self.position(self.wte(tokens_BS), position_ids_BS)
        for block, cache in zip(self.blocks, caches[:-1], strict=True):
            x_BSH = block(x_BSH, position_ids_BS, cache)
        query_BSH = self.query_layer.query(position_ids_BS[:, -1:]) if last_only else None
        if self.config.final_norm == "before_query":
            return self.query_layer(self.ln_f(x_BSH), position_ids_BS, caches[-1], query_BSH)
        return self.ln_f(self.query_layer(x_BSH, position_ids_BS, caches[-1], query_BSH))


def language_model_loss(words: VocabParallelEmbedding, x_BSH: Tensor, labels_BS: Tensor, loss_mask_BS: Tensor) -> Tensor:
    """Mean negative log-likelihood over the tokens whose mask is 1, in nats; 0 where there is none.

    Args:
        words: the output layer.
        x_BSH: its input, on the residual stream.
        labels_BS: int64, the id of the next token at each position.
        loss_mask_BS: 0 where the token has no loss, else 1.
    """
    x_NH = enter_tensor_parallel(x_BSH, words.context).flatten(0, 1)
    labels_N, mask_N = labels_BS.flatten(), loss_mask_BS.flatten()
    return linear_cross_entropy(x_NH, words.weight, labels_N, mask_N, vocab_size=words.num_embeddings, group=words.context.tensor)


def gather_logits(logits_BSV: Tensor, *, vocab_size: int, group: Group) -> Tensor:
    """Gather each rank's slice of the logits and drop the padding: [..., V/T] -> [..., V] on every rank."""
    masked = mask_padded_ids(logits_BSV, group.rank * logits_BSV.shape[-1], vocab_size)
    return all_gather(masked, group, dim=-1)[..., :vocab_size]
