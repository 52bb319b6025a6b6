"""Cross-entropy over a vocabulary that is split over the tensor-parallel group (Megatron-LM, arXiv 1909.08053, section 3).

Each rank holds only its own V/T logits; two small all-reduces replace gathering N × V of them. In training they never exist all at once:
the output projection and its loss process the tokens in chunks (`linear_cross_entropy`).

Shapes: N tokens, C tokens of a chunk, H hidden, V vocabulary, T tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_ext.collectives import all_reduce, all_reduce_max
from megatron_ext.matmul import add_product_, product
from megatron_ext.topology import Group

CHUNK_LOGITS = 2**24
"""Number of logits that a rank computes at once: 64 MiB in fp32. More take memory, fewer make matrix products too small for the device."""


def cross_entropy_(scores_NV: Tensor, labels_N: Tensor, *, vocab_size: int, group: Group) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each label, and its gradient, which overwrites the scores.

    Args:
        scores_NV: fp32, this rank's slice of the logits, [N, V/T]; overwritten. Ids at or beyond `vocab_size` are padding: they get no
            probability and no gradient.
        labels_N: ids in the whole vocabulary, int64, the same on every rank.
        vocab_size: V without padding.
        group: the tensor-parallel group.

    Returns:
        [N], fp32, in nats, the same on every rank; and softmax - one-hot, [N, V/T]: the gradient of each with respect to the scores.
    """
    width = scores_NV.shape[-1]
    first_id = group.rank * width
    scores_NV[:, max(0, vocab_size - first_id) :] = float("-inf")
    # A rank may hold nothing but padding: its maximum of -inf never survives the maximum over the group.
    scores_NV.sub_(all_reduce_max(scores_NV.amax(dim=-1), group).unsqueeze(-1))

    local_N = labels_N - first_id
    foreign_N = (local_N < 0) | (local_N >= width)
    local_N1 = local_N.masked_fill(foreign_N, 0).unsqueeze(-1)
    label_score_N = scores_NV.gather(-1, local_N1).squeeze(-1).masked_fill(foreign_N, 0.0)
    exp_NV = scores_NV.exp_()
    label_score_N, total_N = all_reduce(torch.stack([label_score_N, exp_NV.sum(dim=-1)]), group)
    gradient_NV = exp_NV.div_(total_N.unsqueeze(-1))
    gradient_NV.scatter_add_(-1, local_N1, foreign_N.float().sub_(1.0).unsqueeze(-1))
    return total_N.log() - label_score_N, gradient_NV


def linear_cross_entropy(x_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, mask_N: Tensor, *, vocab_size: int, group: Group) -> Tensor:
    """Mean negative log-likelihood of the labels under softmax(x Wᵀ), over the tokens whose mask is 1; 0 where there is none.

    The gradients are computed with the loss, chunk by chunk, and kept for the backward pass, which only scales them: while the logits are
    in memory that takes two matrix products, later it would take three. The backward pass can run only once.

    In 16 bits the logits of a chunk become fp32, softmax - one-hot is cast back, not yet divided by the number of tokens or multiplied by a
    loss scale, and the weight's gradient is summed over the chunks in fp32.

    Args:
        x_NH: input of the output layer, the same on every rank, any float dtype.
        weight_VH: this rank's rows of the output layer, [V/T, H], same dtype.
        labels_N: ids in the whole vocabulary, int64, the same on every rank.
        mask_N: 0 or 1.
        vocab_size: V without padding (`cross_entropy_`).
        group: the tensor-parallel group.

    Returns:
        fp32 scalar, in nats, the same on every rank. The gradient of `x_NH` is this rank's part of a sum over the group.
    """
    if torch.is_grad_enabled():
        loss: Tensor = _LinearCrossEntropy.apply(x_NH, weight_VH, labels_N, mask_N, vocab_size, group)  # type: ignore[no-untyped-call]
        return loss

    def losses(part: slice) -> Tensor:
        return _losses(x_NH[part], weight_VH, labels_N[part], vocab_size, group)[0]

    return _masked_mean(torch.cat([losses(part) for part in _parts(len(x_NH), len(weight_VH))]), mask_N)


def _masked_mean(loss_N: Tensor, mask_N: Tensor) -> Tensor:
    return (loss_N * mask_N.float()).sum() / _count(mask_N)


def _count(mask_N: Tensor) -> Tensor:
    return mask_N.float().sum().clamp(min=1.0)


def _parts(num_tokens: int, width: int) -> Iterator[slice]:
    """Cut the tokens into chunks of about equal size, with no more than `CHUNK_LOGITS` logits each."""
    size = max(1, -(-num_tokens // max(1, -(-num_tokens * width // CHUNK_LOGITS))))
    return (slice(begin, min(begin + size, num_tokens)) for begin in range(0, num_tokens, size))


def _losses(x_CH: Tensor, weight_VH: Tensor, labels_C: Tensor, vocab_size: int, group: Group) -> tuple[Tensor, Tensor]:
    """Losses of a chunk [C], and their gradients with respect to the logits [C, V/T], fp32."""
    return cross_entropy_(product(x_CH, weight_VH.t()).float(), labels_C, vocab_size=vocab_size, group=group)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, mask_N: Tensor, vocab_size: int, group: Group) -> Tensor:
        grad_x_NH = torch.empty_like(x_NH)
        # Transposed: so the product is the faster of the two, and the copy that turns it back also casts it.
        grad_weight_HV = torch.empty_like(weight_VH.t(), dtype=torch.float32, memory_format=torch.contiguous_format)

        def losses(part: slice) -> Tensor:  # a function, so that nothing of a chunk is there when the next begins
            x_CH, mask_C1 = x_NH[part], mask_N[part].to(x_NH.dtype).unsqueeze(-1)
            loss_C, gradient_CV = _losses(x_CH, weight_VH, labels_N[part], vocab_size, group)
            gradient_CV = gradient_CV.to(x_NH.dtype)
            # The mask is applied where it is cheap, to H numbers per token instead of V.
            torch.mul(product(gradient_CV, weight_VH), mask_C1, out=grad_x_NH[part])
            add_product_(grad_weight_HV, (x_CH * mask_C1).t(), gradient_CV, is_first=part.start == 0)
            return loss_C

        loss_N = torch.cat([losses(part) for part in _parts(len(x_NH), len(weight_VH))])
        ctx.gradients, ctx.count = (grad_x_NH, grad_weight_HV), _count(mask_N)
        return _masked_mean(loss_N, mask_N)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: backward ran a second time, but its gradients were scaled in place the first time. "
                "Call backward once per loss."
            )
        (grad_x_NH, grad_weight_HV), ctx.gradients = ctx.gradients, None
        scale = grad.float() / ctx.count
        dtype = grad_x_NH.dtype
        # In fp32, where no loss scale can overflow, and in place: nothing else refers to them.
        grad_x_NH = grad_x_NH.float().mul_(scale).to(dtype)
        grad_weight_VH = torch.empty_like(grad_weight_HV.t(), dtype=dtype, memory_format=torch.contiguous_format)
        grad_weight_VH.copy_(grad_weight_HV.mul_(scale).t())
        return grad_x_NH, grad_weight_VH, None, None, None, None
