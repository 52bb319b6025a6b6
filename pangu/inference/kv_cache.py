"""Keys and values of the tokens already seen, so that generating a token computes that token alone.

Prompts of different lengths share a batch by left padding: token i of a row stands in column padding + i, so that all rows end in the
same column and grow together. A token's position, by which both the position and the query embedding are looked up, is column - padding.

Shapes: B rows, N heads on this rank, S new columns, K columns so far, M columns at most, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.attention import causal_mask
from pangu.model.model import PanguModel


class LayerCache:
    """Keys and values of one layer (a `pangu.model.block.Cache`), in memory that is taken once.

    Args:
        k_BNMD: memory for the keys; its content is not looked at.
        v_BNMD: memory for the values.
        visible_B1MM: bool, which column each column sees (`visible_columns`).
    """

    def __init__(self, k_BNMD: Tensor, v_BNMD: Tensor, visible_B1MM: Tensor) -> None:
        self.k_BNMD, self.v_BNMD, self.visible_B1MM = k_BNMD, v_BNMD, visible_B1MM
        self.length = 0

    def append(self, k_BNSD: Tensor, v_BNSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store the keys and values of the next columns.

        Returns:
            k_BNKD and v_BNKD of all columns so far (views), and the bool mask [B, 1, S, K] of what each new column sees.
        """
        begin, self.length = self.length, self.length + k_BNSD.shape[2]
        self.k_BNMD[:, :, begin : self.length] = k_BNSD
        self.v_BNMD[:, :, begin : self.length] = v_BNSD
        seen = slice(0, self.length)
        return self.k_BNMD[:, :, seen], self.v_BNMD[:, :, seen], self.visible_B1MM[:, :, begin : self.length, seen]

    def repeat(self, times: int) -> None:
        """Turn each row into `times` equal rows, side by side."""
        self.k_BNMD, self.v_BNMD, self.visible_B1MM = (
            x.repeat_interleave(times, dim=0) for x in (self.k_BNMD, self.v_BNMD, self.visible_B1MM)
        )


def make_caches(model: PanguModel, padding_B: Tensor, max_length: int) -> list[LayerCache]:
    """An empty cache for each layer, the query layer last, as `PanguModel.logits` takes them.

    Takes 2 · layers · B · M · hidden_size / T numbers of the weights' dtype on each of T tensor-parallel ranks.

    Args:
        model: the model; the caches lie on its device.
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
    """bool [B, 1, M, M], True where a row's column (third dimension) sees another (fourth): tokens see earlier tokens and themselves.

    Padding is seen by nobody but itself. It must see something: the softmax over nothing is not a number.
    """
    device = padding_B.device
    is_token_BM = torch.arange(max_length, device=device) >= padding_B.unsqueeze(-1)
    itself_MM = torch.eye(max_length, dtype=torch.bool, device=device)
    return (causal_mask(max_length, device) & is_token_BM.unsqueeze(1) | itself_MM).unsqueeze(1)
