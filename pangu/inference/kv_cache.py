"""The key-value cache, with which generation computes only the new token.

Prompts of different lengths share a batch by left padding: token i of a row is in column padding + i, so that all rows end in the
same column and grow together. A token's position, by which both the position and the query embedding are looked up, is column - padding.

Shapes: B rows, N heads on this rank, S new columns, K columns so far, M columns at most, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.attention import causal_mask
from pangu.model.model import PanguModel


class LayerCache:
    """Keys and values of one layer (a `pangu.model.block.Cache`), in memory that is allocated once.

    Args:
        k_BNMD: memory for the keys; may be uninitialized.
        v_BNMD: memory for the values.
        visible_B1MM: bool, True where a column attends to another (`visible_columns`).
    """

    def __init__(self, k_BNMD: Tensor, v_BNMD: Tensor, visible_B1MM: Tensor) -> None:
        self.k_BNMD, self.v_BNMD, self.visible_B1MM = k_BNMD, v_BNMD, visible_B1MM
        self.length = 0

    def append(self, k_BNSD: Tensor, v_BNSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store the keys and values of the next columns.

        Returns:
            k_BNKD and v_BNKD of all columns so far (views), and the bool mask [B, 1, S, K] of the columns that each new column attends to.
        """
        begin, self.length = self.length, self.length + k_BNSD.shape[2]
        self.k_BNMD[:, :, begin : self.length] = k_BNSD
        self.v_BNMD[:, :, begin : self.length] = v_BNSD
        seen = slice(0, self.length)
        return self.k_BNMD[:, :, seen], self.v_BNMD[:, :, seen], self.visible_B1MM[:, :, begin : self.length, seen]

    def repeat(self, times: int) -> None:
        """Repeat each row `times` times; the copies are adjacent."""
        self.k_BNMD, self.v_BNMD, self.visible_B1MM = (
            x.repeat_interleave(times, dim=0) for x in (self.k_BNMD, self.v_BNMD, self.visible_B1MM)
        )


def make_caches(model: PanguModel, padding_B: Tensor, max_length: int) -> list[LayerCache]:
    """An empty cache for each layer, the query layer last, as `PanguModel.logits` takes them.

    Takes 2 · layers · B · M · hidden_size / T numbers of the weights' dtype on each of T tensor-parallel ranks.

    Args:
        model: the model; the caches are on its device.
        padding_B: int64, columns of padding on the left of each row.
        max_length: M, padding included.
    """
    config, weight = model.config, model.ln_f.weight.detach()
    shape = (
        len(padding_B),
        config.num_heads // model.context.tensor.size,
        max_length,
        config.hidden_size // config.num_heads,
    )
    visible_B1MM = visible_columns(padding_B, max_length).to(weight.device)
    return [LayerCache(weight.new_empty(shape), weight.new_empty(shape), visible_B1MM) for _ in range(config.num_layers)]


def visible_columns(padding_B: Tensor, max_length: int) -> Tensor:
    """bool [B, 1, M, M], True where a column (third dimension) attends to another (fourth): tokens attend to earlier ones and themselves.

    Only padding attends to padding, each column to itself: the softmax over an empty set would be NaN.
    """
    device = padding_B.device
    is_token_BM = torch.arange(max_length, device=device) >= padding_B.unsqueeze(-1)
    itself_MM = torch.eye(max_length, dtype=torch.bool, device=device)
    return (causal_mask(max_length, device) & is_token_BM.unsqueeze(1) | itself_MM).unsqueeze(1)
