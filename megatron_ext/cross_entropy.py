"""Cross-entropy over a vocabulary that is split over the tensor-parallel group (Megatron-LM, arXiv 1909.08053, section 3).

Each rank sees only its own V/T logits; two small all-reduces replace gathering B × S × V of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ext.collectives import all_reduce, all_reduce_max
from megatron_ext.layers import mask_padded_ids
from megatron_ext.topology import Group


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BSV: Tensor, labels_BS: Tensor, vocab_size: int, group: Group) -> Tensor:
        first_id = group.rank * logits_BSV.shape[-1]
        scores_BSV = mask_padded_ids(logits_BSV.float(), first_id, vocab_size)
        # A rank may hold nothing but padding: its maximum of -inf never survives the maximum over the group.
        highest_BS = all_reduce_max(scores_BSV.amax(dim=-1), group)
        scores_BSV = scores_BSV - highest_BS.unsqueeze(-1)

        local_BS = labels_BS - first_id
        foreign_BS = (local_BS < 0) | (local_BS >= logits_BSV.shape[-1])
        local_BS = local_BS.masked_fill(foreign_BS, 0)
        label_score_BS = scores_BSV.gather(-1, local_BS.unsqueeze(-1)).squeeze(-1).masked_fill(foreign_BS, 0.0)
        exp_BSV = scores_BSV.exp_()
        sums = all_reduce(torch.stack([label_score_BS, exp_BSV.sum(dim=-1)]), group)
        label_score_BS, total_BS = sums[0], sums[1]

        ctx.save_for_backward(exp_BSV.div_(total_BS.unsqueeze(-1)), local_BS, foreign_BS)
        ctx.dtype = logits_BSV.dtype
        return total_BS.log() - label_score_BS

    @staticmethod
    def backward(ctx: Any, grad_BS: Tensor) -> tuple[Tensor, None, None, None]:
        softmax_BSV, local_BS, foreign_BS = ctx.saved_tensors
        grad_BSV = softmax_BSV.clone()
        hit = torch.where(foreign_BS, 0.0, -1.0).to(grad_BSV.dtype).unsqueeze(-1)
        grad_BSV.scatter_add_(-1, local_BS.unsqueeze(-1), hit).mul_(grad_BS.unsqueeze(-1))
        return grad_BSV.to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(logits_BSV: Tensor, labels_BS: Tensor, *, vocab_size: int, group: Group) -> Tensor:
    """Negative log-likelihood of each label, computed in fp32.

    Args:
        logits_BSV: this rank's slice of the logits, [B, S, V/T], any float dtype. Ids at or beyond `vocab_size` are padding: they get no
            probability and no gradient.
        labels_BS: ids in the whole vocabulary, int64, the same on every rank.
        vocab_size: V without padding.
        group: the tensor-parallel group.

    Returns:
        [B, S], fp32, in nats, the same on every rank.
    """
    return _VocabParallelCrossEntropy.apply(logits_BSV, labels_BS, vocab_size, group)
