"""Core attention: the implementations against a loop, dropout and its stream, and what is asked of the Ascend kernel."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.attention import IMPLEMENTATIONS, causal_mask, core_attention, document_mask
from megatron_ext.random import RngStreams
from megatron_ext.topology import Coordinates

B, N, S, D = 2, 3, 11, 80
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 0, 1, 2], [5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7]])
DOCUMENTS = [[0, 0, 0, 0, 1, 2, 2, 2, 3, 3, 3], [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]]  # read off the positions by eye


@pytest.fixture
def rng() -> RngStreams:
    return streams()


def streams(tensor: int = 0) -> RngStreams:
    return RngStreams(1, Coordinates(0, 0, tensor))


def qkv(queries: int = S, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, N, queries, D), (B, N, S, D), (B, N, S, D))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q * 3, k, v  # sharp enough that a wrong scale shows


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """One query of one head at a time, in float64, over the keys it sees."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(q.shape[0]):
        for n in range(q.shape[1]):
            for s in range(q.shape[2]):
                visible = range(s + 1) if mask is None else mask.expand(q.shape[0], 1, -1, -1)[b, 0, s].nonzero().flatten().tolist()
                scores = [math.exp(float(q[b, n, s].double() @ k[b, n, j].double()) / math.sqrt(q.shape[3])) for j in visible]
                for score, j in zip(scores, visible, strict=True):
                    out[b, n, s] += score / sum(scores) * v[b, n, j].double()
    return out


def call(implementation: str, rng: RngStreams, mask: Tensor | None, dropout: float = 0.0, **inputs: Any) -> Tensor:
    return core_attention(*qkv(**inputs), mask, implementation=implementation, dropout=dropout, rng=rng)


def test_document_mask_keeps_a_document_to_itself() -> None:
    mask = document_mask(POSITIONS)
    assert mask.shape == (2, 1, S, S) and mask.dtype == torch.bool
    for b, documents in enumerate(DOCUMENTS):
        for query in range(S):
            for key in range(S):
                assert mask[b, 0, query, key].item() == (key <= query and documents[key] == documents[query]), (b, query, key)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_the_loop(implementation: str, masked: bool, rng: RngStreams) -> None:
    mask = document_mask(POSITIONS) if masked else None
    out = call(implementation, rng, mask)
    torch.testing.assert_close(out.double(), naive(*qkv(), mask), rtol=0, atol=5e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_few_queries_see_all_cached_keys(implementation: str, rng: RngStreams) -> None:
    """Generation with a cache: two new queries, eleven keys, and a mask that says so."""
    mask = causal_mask(S, torch.device("cpu"))[-2:].expand(B, 1, 2, S)
    out = call(implementation, rng, mask, queries=2)
    torch.testing.assert_close(out.double(), naive(*qkv(queries=2), mask), rtol=0, atol=5e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_equal_those_of_a_plain_softmax(implementation: str, masked: bool, rng: RngStreams) -> None:
    mask = document_mask(POSITIONS) if masked else None
    mine = [x.requires_grad_() for x in qkv()]
    plain = [x.double().requires_grad_() for x in qkv()]
    upstream = torch.randn(B, N, S, D, generator=torch.Generator().manual_seed(2))
    core_attention(*mine, mask, implementation=implementation, dropout=0.0, rng=rng).backward(upstream)
    scores = plain[0] @ plain[1].mT / math.sqrt(D)
    visible = torch.ones(S, S).tril().bool() if mask is None else mask
    (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ plain[2]).backward(upstream.double())
    for got, expected in zip(mine, plain, strict=True):
        torch.testing.assert_close(got.grad.double(), expected.grad, rtol=0, atol=2e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_keep_their_type(implementation: str, dtype: torch.dtype, rng: RngStreams) -> None:
    out = call(implementation, rng, None, dtype=dtype)
    assert out.dtype == dtype
    error = (out.double() - naive(*qkv(dtype=dtype), None)).abs().max()
    assert error < (3e-2 if dtype == torch.bfloat16 else 4e-3)


def test_eager_does_not_overflow_fp16(rng: RngStreams) -> None:
    """q · k is 80 · 40² = 128,000 here and overflows fp16; divided by √80 beforehand it does not."""
    q = torch.full((1, 1, 2, 80), 40.0, dtype=torch.float16)
    out = core_attention(q, q, q, None, implementation="eager", dropout=0.0, rng=rng)
    torch.testing.assert_close(out, q)


def drop_uniform_weights(implementation: str, rng: RngStreams, p: float) -> Tensor:
    """Attention weights after dropout: queries of zero weigh all visible keys alike, and values of the identity show the weights."""
    zeros, identity = torch.zeros(2, 4, 64, 64), torch.eye(64).expand(2, 4, 64, 64)
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    return core_attention(zeros, zeros, identity, mask, implementation=implementation, dropout=p, rng=rng)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropout_drops_its_share_and_scales_the_rest(implementation: str, rng: RngStreams) -> None:
    p, number = 0.3, 2 * 4 * 64 * 64
    weights = drop_uniform_weights(implementation, rng, p)
    dropped = (weights == 0).double().mean().item()
    assert abs(dropped - p) < 4 * math.sqrt(p * (1 - p) / number)
    torch.testing.assert_close(weights[weights != 0], torch.full_like(weights[weights != 0], 1 / 64 / (1 - p)))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropout_draws_from_the_tensor_parallel_stream(implementation: str) -> None:
    same, again, other = streams(tensor=0), streams(tensor=0), streams(tensor=1)
    default, stream = torch.get_rng_state(), same.tensor_parallel_state
    first = drop_uniform_weights(implementation, same, 0.3)
    assert torch.equal(torch.get_rng_state(), default)
    assert not torch.equal(same.tensor_parallel_state, stream)
    assert not torch.equal(drop_uniform_weights(implementation, same, 0.3), first)
    assert torch.equal(drop_uniform_weights(implementation, again, 0.3), first)
    assert not torch.equal(drop_uniform_weights(implementation, other, 0.3), first)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_without_dropout_nothing_is_drawn(implementation: str, rng: RngStreams) -> None:
    default, stream = torch.get_rng_state(), rng.tensor_parallel_state
    drop_uniform_weights(implementation, rng, 0.0)
    assert torch.equal(torch.get_rng_state(), default)
    assert torch.equal(rng.tensor_parallel_state, stream)


class FakeNpu(SimpleNamespace):
    """`torch_npu.npu_fusion_attention` as Ascend documents it: `atten_mask` is True where hidden; in `sparse_mode` 2 it is the upper
    triangle of 2048 × 2048 whatever the length; the results come as a tuple, attention first."""

    def npu_fusion_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        head_num: int,
        input_layout: str,
        *,
        atten_mask: Tensor | None = None,
        scale: float = 1.0,
        keep_prob: float = 1.0,
        sparse_mode: int = 0,
    ) -> tuple[Any, ...]:
        assert input_layout == "BNSD" and head_num == query.shape[1] and atten_mask is not None and atten_mask.dtype == torch.bool
        if sparse_mode == 2:
            assert torch.equal(atten_mask, torch.ones(2048, 2048).triu(1).bool())
            hidden = atten_mask[: query.shape[2], : key.shape[2]]
        else:
            assert sparse_mode == 0 and atten_mask.shape == (query.shape[0], 1, query.shape[2], key.shape[2])
            hidden = atten_mask
        self.calls.append((sparse_mode, keep_prob))
        weights = (query @ key.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        return F.dropout(weights, 1.0 - keep_prob) @ value, None, None, None, 0, 0, 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_npu_kernel_is_asked_for_the_same_attention(masked: bool, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    npu = FakeNpu(calls=[])
    monkeypatch.setitem(sys.modules, "torch_npu", npu)
    mask = document_mask(POSITIONS) if masked else None
    out = call("npu_fusion", streams(), mask, dropout)
    assert npu.calls == [(0 if masked else 2, 1.0 - dropout)]
    # The same stream drops the same weights in the fake kernel and in eager attention.
    torch.testing.assert_close(out, call("eager", streams(), mask, dropout), rtol=0, atol=5e-6)


def test_every_implementation_is_tested_here() -> None:
    assert set(IMPLEMENTATIONS) == {"eager", "sdpa", "npu_fusion"}
