"""Vocab-parallel cross-entropy against torch's on the whole vocabulary in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import run_distributed
from ranks import share, tensor_groups
from torch import Tensor

from megatron_ext.cross_entropy import vocab_parallel_cross_entropy
from megatron_ext.topology import SINGLE, Group

B, S = 2, 32
# 48 divides by 2 and 4; of 50 the last rank of four holds two padded ids; of 5 it holds nothing else.
VOCABULARIES = (48, 50, 5)
JUNK = 1e9  # what the padded logits hold: were they not masked, nothing else would count


def whole_logits(vocab_size: int, scale: float, dtype: torch.dtype) -> Tensor:
    return (torch.randn(B, S, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * scale).to(dtype)


def slice_of(x: Tensor, group: Group, padding: float) -> Tensor:
    return share(x, group.rank, group.size, -1, padding)


def check(group: Group, vocab_size: int, scale: float, dtype: torch.dtype) -> None:
    logits = whole_logits(vocab_size, scale, dtype)
    labels = (torch.arange(B * S) * 7 % vocab_size).reshape(B, S)  # every rank owns some
    assert labels.unique().numel() == min(vocab_size, B * S)
    upstream = torch.rand(B, S, generator=torch.Generator().manual_seed(1))

    dense = logits.double().requires_grad_()
    expected = F.cross_entropy(dense.flatten(0, 1), labels.flatten(), reduction="none").view(B, S)
    (expected_grad,) = torch.autograd.grad((expected * upstream.double()).sum(), dense)

    mine = slice_of(logits, group, JUNK).clone().requires_grad_()
    before = mine.detach().clone()
    loss = vocab_parallel_cross_entropy(mine, labels, vocab_size=vocab_size, group=group)
    assert loss.dtype == torch.float32 and torch.isfinite(loss).all()
    # The difference of two scores of this size is all that fp32 can be blamed for.
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=2e-6)

    (grad,) = torch.autograd.grad((loss * upstream).sum(), mine, retain_graph=True)
    assert grad.dtype == dtype
    tolerance = 2**-8 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(grad.double(), slice_of(expected_grad, group, 0.0), rtol=tolerance, atol=1e-6)
    width = mine.shape[-1]
    padded = torch.arange(group.rank * width, (group.rank + 1) * width) >= vocab_size
    assert (grad[..., padded] == 0).all()
    assert torch.equal(mine.detach(), before)
    (again,) = torch.autograd.grad((loss * upstream).sum(), mine)
    assert torch.equal(grad, again)


def check_everything() -> list[list[float]]:
    """Also returns one case's losses for each size of group."""
    losses = []
    for group in tensor_groups():
        for vocab_size in VOCABULARIES:
            for dtype in (torch.float32, torch.bfloat16):
                for scale in (1.0, 1e4, 1e37):
                    try:
                        check(group, vocab_size, scale, dtype)
                    except Exception as error:
                        raise AssertionError(f"T={group.size}, vocabulary {vocab_size}, {dtype}, scale {scale}") from error
        logits, labels = slice_of(whole_logits(50, 1.0, torch.float32), group, JUNK), torch.arange(B * S).reshape(B, S) % 50
        losses.append(vocab_parallel_cross_entropy(logits, labels, vocab_size=50, group=group).flatten().tolist())
    return losses


def test_cross_entropy_equals_the_dense_one_and_is_the_same_on_every_rank() -> None:
    results = run_distributed(check_everything, 4)
    assert all(result == results[0] for result in results)


def test_uniform_scores_cost_the_logarithm_of_the_vocabulary() -> None:
    logits, labels = torch.zeros(1, 3, 8), torch.tensor([[0, 3, 4]])
    loss = vocab_parallel_cross_entropy(logits, labels, vocab_size=5, group=SINGLE)
    torch.testing.assert_close(loss, torch.full((1, 3), 5.0).log())
