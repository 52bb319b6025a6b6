"""Vocab-parallel cross-entropy against torch's on the whole vocabulary in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.harness import run_distributed
from helpers.ranks import share, tensor_groups
from torch import Tensor

from megatron_ext import cross_entropy
from megatron_ext.collectives import all_reduce
from megatron_ext.cross_entropy import cross_entropy_, linear_cross_entropy
from megatron_ext.topology import SINGLE, Group

N, H = 64, 16
# 48 divides by 2 and 4; of 50 the last rank of four holds two padded ids; of 5 it holds nothing else.
VOCABULARIES = (48, 50, 5)
JUNK = 1e9  # what the padded logits hold: were they not masked, nothing else would count
UNUSED = 1e3  # what the padded rows of the output layer hold


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels_of(vocab_size: int) -> Tensor:
    labels = torch.arange(N) * 7 % vocab_size  # every rank owns some
    assert labels.unique().numel() == min(vocab_size, N)
    return labels


def check_scores(group: Group, vocab_size: int, scale: float) -> None:
    scores, labels = random(N, vocab_size, seed=vocab_size) * scale, labels_of(vocab_size)
    dense = scores.double().requires_grad_()
    expected = F.cross_entropy(dense, labels, reduction="none")
    (expected_grad,) = torch.autograd.grad(expected.sum(), dense)

    mine = share(scores, group.rank, group.size, -1, JUNK).clone()
    loss, grad = cross_entropy_(mine, labels, vocab_size=vocab_size, group=group)
    assert torch.isfinite(loss).all()
    # The difference of two scores of this size is all that fp32 can be blamed for.
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(grad.double(), share(expected_grad, group.rank, group.size, -1), rtol=2e-6, atol=1e-6)
    padded = torch.arange(group.rank * mine.shape[-1], (group.rank + 1) * mine.shape[-1]) >= vocab_size
    assert (grad[:, padded] == 0).all()


def check_layer(group: Group, vocab_size: int, dtype: torch.dtype, mask: Tensor) -> float:
    """The loss and both gradients of an output layer; returns the loss."""
    x, weight, labels = random(N, H, seed=1).to(dtype), random(vocab_size, H, seed=2).to(dtype), labels_of(vocab_size)
    upstream = 512.0  # a loss scale

    dense_x, dense_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    loss_N = F.cross_entropy(dense_x @ dense_weight.t(), labels, reduction="none")
    expected = (loss_N * mask).sum() / mask.sum().clamp(min=1)
    (expected * upstream).backward()

    own_x = x.clone().requires_grad_()
    own_weight = share(weight, group.rank, group.size, 0, UNUSED).clone().requires_grad_()
    loss = linear_cross_entropy(own_x, own_weight, labels, mask, vocab_size=vocab_size, group=group)
    with torch.no_grad():
        assert torch.equal(loss, linear_cross_entropy(own_x, own_weight, labels, mask, vocab_size=vocab_size, group=group))
    (loss * upstream).backward()

    assert loss.dtype == torch.float32 and own_x.grad is not None and own_weight.grad is not None
    assert own_x.grad.dtype == own_weight.grad.dtype == dtype
    # 16 bits round the logits, softmax - one-hot and each product: a few units of the last place, of the largest element.
    unit = torch.finfo(dtype).eps
    tolerance = 1e-6 if dtype == torch.float32 else 4 * unit
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    assert dense_x.grad is not None and dense_weight.grad is not None
    for name, found, wanted in (
        ("x", all_reduce(own_x.grad.float(), group), dense_x.grad),
        ("weight", own_weight.grad, share(dense_weight.grad, group.rank, group.size, 0)),
    ):
        worst = float((found.double() - wanted).abs().max())
        assert worst <= tolerance * max(1e-9, float(dense_x.grad.abs().max() if name == "x" else dense_weight.grad.abs().max())), name
    return loss.item()


def check_everything() -> list[list[float]]:
    """Also returns one case's losses for each size of group."""
    masks = {"all": torch.ones(N), "some": (torch.arange(N) % 3 > 0).float(), "none": torch.zeros(N)}
    losses = []
    for group in tensor_groups():
        for vocab_size in VOCABULARIES:
            for scale in (1.0, 1e4, 1e37):
                try:
                    check_scores(group, vocab_size, scale)
                except Exception as error:
                    raise AssertionError(f"T={group.size}, vocabulary {vocab_size}, scale {scale}") from error
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                for name, mask in masks.items():
                    for chunk in (10**9, 23 * vocab_size // group.size):  # one chunk; several, the last one shorter
                        cross_entropy.CHUNK_LOGITS = chunk
                        try:
                            loss = check_layer(group, vocab_size, dtype, mask)
                        except Exception as error:
                            raise AssertionError(f"T={group.size}, {vocab_size} ids, {dtype}, mask {name}, chunk {chunk}") from error
                        assert (loss == 0.0) == (name == "none")
                        if dtype == torch.float32:
                            losses.append(loss)
    return [losses]


def test_cross_entropy_equals_the_dense_one_and_is_the_same_on_every_rank() -> None:
    results = run_distributed(check_everything, 4)
    assert all(result == results[0] for result in results)


def test_uniform_scores_cost_the_logarithm_of_the_vocabulary() -> None:
    loss, _ = cross_entropy_(torch.zeros(3, 8), torch.tensor([0, 3, 4]), vocab_size=5, group=SINGLE)
    torch.testing.assert_close(loss, torch.full((3,), 5.0).log())


def test_the_logits_are_never_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 10 * 50)
    widest, intact = [0], cross_entropy.cross_entropy_

    def watched(scores_NV: Tensor, labels_N: Tensor, *, vocab_size: int, group: Group) -> tuple[Tensor, Tensor]:
        widest.append(scores_NV.numel())
        return intact(scores_NV, labels_N, vocab_size=vocab_size, group=group)

    monkeypatch.setattr(cross_entropy, "cross_entropy_", watched)
    check_layer(SINGLE, 50, torch.float32, torch.ones(N))
    assert len(widest) > 7 and max(widest) <= 10 * 50
    # The gradients that waited are spent: a second pass would find them scaled already.
    x, weight = random(N, H, seed=1).requires_grad_(), random(50, H, seed=2)
    loss = linear_cross_entropy(x, weight, labels_of(50), torch.ones(N), vocab_size=50, group=SINGLE)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
