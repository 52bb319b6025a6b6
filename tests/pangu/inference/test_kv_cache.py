"""With a cache the model computes what it computes without one, padding or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.golden import golden_batch, golden_model
from helpers.harness import run_distributed
from helpers.small_model import TOKENIZER_VOCAB, VOCAB, WINDOW, small_model
from torch import Tensor

from megatron_ext.supervision import rendezvous
from megatron_ext.topology import Groups, Topology
from pangu.inference.kv_cache import make_caches, visible_columns
from pangu.model.model import PanguModel, gather_logits

TOLERANCE = 5e-5
CHUNKS = [7, 1, 1, 1, 3]  # a prompt, single tokens, and several at once


def cached_logits(model: PanguModel, tokens_BS: Tensor, padding_B: Tensor, chunks: list[int]) -> Tensor:
    """Logits of every column, computed chunk by chunk; what the chunks leave comes one by one."""
    length = tokens_BS.shape[1]
    caches = make_caches(model, padding_B, length)
    position_ids_BS = (torch.arange(length) - padding_B.unsqueeze(-1)).clamp(min=0)
    sizes = chunks + [1] * (length - sum(chunks))
    parts = zip(tokens_BS.split(sizes, dim=1), position_ids_BS.split(sizes, dim=1), strict=True)
    with torch.inference_mode():
        return torch.cat([model.logits(tokens, positions, caches) for tokens, positions in parts], dim=1)


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(0, TOKENIZER_VOCAB, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("final_norm", ["before_query", "after_query"])
def test_logits_equal_the_whole_forward_pass(final_norm: str, attention: str) -> None:
    model = small_model(final_norm=final_norm, attention=attention)
    tokens = random_tokens(2, WINDOW)
    with torch.inference_mode():
        whole = model.logits(tokens, torch.arange(WINDOW).expand(2, -1))
    cached = cached_logits(model, tokens, torch.zeros(2, dtype=torch.int64), CHUNKS)
    assert (cached - whole).abs().max() < TOLERANCE
    assert whole.std() > 0.5  # else the tolerance would mean nothing


def test_logits_equal_the_original(shared: Path) -> None:
    golden = np.load(shared / "oracle/A/case_plain.npz")
    model = golden_model(shared).eval()
    tokens, position_ids, _, _ = golden_batch(golden)
    assert (position_ids == torch.arange(tokens.shape[1])).all()
    cached = cached_logits(model, tokens, torch.zeros(len(tokens), dtype=torch.int64), CHUNKS)
    assert np.abs(cached.numpy() - golden["logits"]).max() < TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padded_rows_equal_rows_by_themselves(attention: str) -> None:
    model = small_model(attention=attention)
    lengths = [WINDOW, 1, 9, WINDOW - 1]
    padding = torch.tensor([WINDOW - length for length in lengths])
    tokens = random_tokens(len(lengths), WINDOW)
    batch = cached_logits(model, tokens, padding, [WINDOW - 5])
    assert batch.isfinite().all()
    for row, length in enumerate(lengths):
        alone = cached_logits(model, tokens[row : row + 1, -length:], torch.tensor([0]), [1])
        assert (batch[row, -length:] - alone[0]).abs().max() < TOLERANCE


def test_no_token_sees_padding() -> None:
    model = small_model()
    tokens, padding = random_tokens(1, 12), torch.tensor([5])
    other = tokens.clone()
    other[:, :5] = 6
    with_padding, with_other = (cached_logits(model, ids, padding, [8]) for ids in (tokens, other))
    assert torch.equal(with_padding[:, 5:], with_other[:, 5:])
    assert not torch.equal(with_padding[:, :5], with_other[:, :5])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("final_norm", ["before_query", "after_query"])
def test_the_last_position_alone_is_what_it_is_among_all(final_norm: str, attention: str) -> None:
    """And the caches hold the same, so that what follows is the same too."""
    model, padding, tokens = small_model(final_norm=final_norm, attention=attention), torch.tensor([0, 3]), random_tokens(2, 10)
    position_ids = (torch.arange(10) - padding.unsqueeze(-1)).clamp(min=0)
    all_caches, last_caches = make_caches(model, padding, 12), make_caches(model, padding, 12)
    with torch.inference_mode():
        whole = model.hidden(tokens, position_ids, all_caches)
        last = model.hidden(tokens, position_ids, last_caches, last_only=True)
    assert last.shape == (2, 1, 32)
    assert (last - whole[:, -1:]).abs().max() < TOLERANCE
    for one, other in zip(all_caches, last_caches, strict=True):
        assert one.length == other.length == 10
        assert torch.equal(one.k_BNMD[:, :, :10], other.k_BNMD[:, :, :10]) and torch.equal(one.v_BNMD[:, :, :10], other.v_BNMD[:, :, :10])


def test_repeated_rows_go_on_by_themselves() -> None:
    model, tokens = small_model(), random_tokens(2, WINDOW)
    padding = torch.tensor([2, 0])
    position_ids = (torch.arange(WINDOW) - padding.unsqueeze(-1)).clamp(min=0)
    caches = make_caches(model, padding, WINDOW)
    different = random_tokens(4, WINDOW)[:, 9:]
    with torch.inference_mode():
        model.logits(tokens[:, :9], position_ids[:, :9], caches)
        for cache in caches:
            cache.repeat(2)
        repeated = model.logits(different, position_ids[:, 9:].repeat_interleave(2, dim=0), caches)
    rows = torch.cat([tokens[:, :9].repeat_interleave(2, dim=0), different], dim=1)
    expected = cached_logits(model, rows, padding.repeat_interleave(2), [9])
    assert (repeated - expected[:, 9:]).abs().max() < TOLERANCE


def test_visible_columns() -> None:
    one, padded = visible_columns(torch.tensor([0, 2]), 4).int().squeeze(1).tolist()
    assert one == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert padded == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def rank_logits() -> np.ndarray:
    rendezvous.initialize(60)
    group = Groups.create(Topology(tensor=2, pipeline=1, data=1)).tensor
    model = small_model(group)
    caches = make_caches(model, torch.tensor([0]), 5)
    assert caches[0].k_BNMD.shape == (1, 2, 5, 8)  # a rank holds half of the heads
    logits = cached_logits(model, random_tokens(2, WINDOW), torch.tensor([0, 4]), CHUNKS)
    return gather_logits(logits, vocab_size=VOCAB, group=group).numpy()


def test_two_ranks_equal_one() -> None:
    one = cached_logits(small_model(), random_tokens(2, WINDOW), torch.tensor([0, 4]), CHUNKS).numpy()
    for two in run_distributed(rank_logits, 2):
        assert np.abs(two - one).max() < TOLERANCE
