"""Scores texts by their log-likelihood: the one code path for choices by perplexity, clozes and the perplexity of a corpus.

    scorer = Scorer(model, tokenizer)
    [score] = scorer.score([scorer.span("四川的省会是", "成都")])
    score.log_likelihood, score.num_tokens

Where the scored part begins is decided before tokenization: context and continuation are encoded separately, which puts a word
boundary between them. Encoding the whole text and counting the context's tokens would score the wrong ones, since jieba segments across the
boundary (中国人|民 is 中国|人民) and the context's tokens are then not a prefix of the whole text's. Generation, too, encodes the prompt
alone.

Shapes: B rows, S columns, H hidden, N scored tokens, V vocabulary, T tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_ext.collectives import all_gather
from megatron_ext.cross_entropy import cross_entropy_
from megatron_ext.layers import mask_padded_ids
from pangu.model.model import PanguModel

BATCH_TOKENS = 8192
"""Largest number of tokens per batch, padding included, unless a single text is longer; it bounds the memory of activations."""
CPU_BATCH_TOKENS = 2048
"""The same on a CPU, which gains nothing from larger batches and whose caches hold the activations of smaller ones."""
CHUNKS = 8
"""Number of parts of a batch for which logits are computed in turn: 160 MB of them in fp32 with 40,000 ids, 40 MB on a CPU."""


class Encoder(Protocol):
    """The interface of a tokenizer that scoring needs."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...


@dataclass(frozen=True)
class Span:
    """Tokens, and the index from which they are scored."""

    ids: Sequence[int]
    start: int
    """Index of the first scored token, 1 or more: each token is scored given all tokens before it, within the window."""

    def __post_init__(self) -> None:
        assert 1 <= self.start <= len(self.ids), "a first token is given, never scored"


@dataclass(frozen=True)
class Score:
    """The score of a span."""

    log_likelihood: float
    """Log-likelihood in nats, summed over the scored tokens; 0 if there are none."""
    num_tokens: int
    is_greedy: bool
    """Whether each scored token is the most likely one at its position."""

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per token, in nats; infinite if there is none, so that an empty text is never chosen."""
        return -self.log_likelihood / self.num_tokens if self.num_tokens else float("inf")


class Window(NamedTuple):
    """The part of a span that one forward pass reads and scores, as indices of its tokens."""

    begin: int
    """Index of the first token that is read."""
    first: int
    """Index of the first token that is scored."""
    end: int
    """One past the last token that is scored; the last input of the pass is the token before it, `end - 2`."""


def windows(length: int, start: int, max_positions: int) -> Iterator[Window]:
    """Cut a span of `length` tokens, scored from `start`, into passes of at most `max_positions` inputs; each token is scored once.

    A pass scores as many tokens as fit and reads as much context as it can. After the first, each advances by half a window, so that every
    token has at least that much context: disjoint windows would score their first tokens without context.
    """
    stride = max(1, max_positions // 2)
    first = start
    while first < length:
        end = min(length, max(max_positions + 1, first + stride))
        yield Window(max(0, end - 1 - max_positions), first, end)
        first = end


class Scorer:
    """Scores spans in batches of similar length.

    Args:
        model: the whole model, or this rank's slice of it, in evaluation mode. The ranks of a tensor-parallel group must be given the same
            spans, and all get the same scores.
        tokenizer: the model's tokenizer.
        batch_tokens: largest number of tokens per batch, padding included, unless a single text is longer; None: a default for the device.
    """

    def __init__(self, model: PanguModel, tokenizer: Encoder, batch_tokens: int | None = None) -> None:
        assert not model.context.sequence_parallel, "spans of any length cannot be split along the sequence"
        self.model, self.tokenizer = model, tokenizer
        self.batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if model.ln_f.weight.device.type == "cpu" else BATCH_TOKENS)

    def span(self, context: str, continuation: str) -> Span:
        """The span that scores the continuation given the context. Without context it begins a document, given the separator."""
        given = self.tokenizer.encode(context) or [self.model.config.separator_id]
        return Span(given + self.tokenizer.encode(continuation), len(given))

    @torch.inference_mode()
    def score(self, spans: Sequence[Span], advance: Callable[[int], None] = lambda tokens: None) -> list[Score]:
        """Score each span.

        Args:
            spans: spans of any length; one longer than the model's window is scored in several (`windows`).
            advance: called after each batch with the number of tokens it scored.

        Returns:
            One score per span, in order. A span's score does not depend on the other spans, except for rounding.
        """
        window = self.model.config.max_positions
        passes = [(index, piece) for index, span in enumerate(spans) for piece in windows(len(span.ids), span.start, window)]
        # Longest first: what does not fit into memory fails at once.
        passes.sort(key=lambda item: item[1].begin - item[1].end)
        sums, greedy = [0.0] * len(spans), [True] * len(spans)
        for batch in batches(passes, self.batch_tokens):
            rows = [(spans[index].ids[piece.begin : piece.end], piece.first - piece.begin) for index, piece in batch]
            for (index, _), (log_likelihood, is_greedy) in zip(batch, self._score_batch(rows), strict=True):
                sums[index] += log_likelihood
                greedy[index] &= is_greedy
            advance(sum(piece.end - piece.first for _, piece in batch))
        return [Score(sums[index], len(span.ids) - span.start, greedy[index]) for index, span in enumerate(spans)]

    def _score_batch(self, rows: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, bool]]:
        """Log-likelihood and greediness of each row (ids, index of the first scored one)."""
        device, longest = self.model.ln_f.weight.device, max(len(ids) for ids, _ in rows) - 1
        # What follows a token does not reach it, so rows are padded on the right without a mask.
        tokens_BS = torch.tensor([[*ids[:-1], *[0] * (longest + 1 - len(ids))] for ids, _ in rows], device=device)
        position_ids_BS = torch.arange(longest, device=device).expand_as(tokens_BS)
        hidden_BSH = self.model.hidden(tokens_BS, position_ids_BS)
        scored_NH = torch.cat([hidden_BSH[row, first - 1 : len(ids) - 1] for row, (ids, first) in enumerate(rows)])
        labels_N = torch.tensor([token_id for ids, first in rows for token_id in ids[first:]], device=device)
        losses, hits = [], []
        chunk = max(1, self.batch_tokens // CHUNKS)
        for some_NH, some_N in zip(scored_NH.split(chunk), labels_N.split(chunk), strict=True):
            loss_N, best_N = self._losses(some_NH, some_N)
            losses.append(loss_N)
            hits.append(best_N == some_N)
        counts = [len(ids) - first for ids, first in rows]
        by_row = torch.cat(losses).cpu().double().split(counts), torch.cat(hits).cpu().split(counts)
        return [(-float(loss.sum()), bool(hit.all())) for loss, hit in zip(*by_row, strict=True)]

    def _losses(self, hidden_NH: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of each label [N] and the likeliest id [N], equal on all ranks of the tensor-parallel group."""
        group, vocab_size = self.model.context.tensor, self.model.config.vocab_size
        logits_NV = self.model.wte.logits(hidden_NH.unsqueeze(0)).squeeze(0).float()
        first_id = group.rank * logits_NV.shape[-1]
        best = mask_padded_ids(logits_NV, first_id, vocab_size).max(dim=-1)
        best_TN = all_gather(best.values.unsqueeze(0), group, dim=0)
        ids_TN = all_gather(best.indices.unsqueeze(0) + first_id, group, dim=0)
        loss_N, _ = cross_entropy_(logits_NV, labels_N, vocab_size=vocab_size, group=group)
        return loss_N, ids_TN.gather(0, best_TN.argmax(dim=0, keepdim=True)).squeeze(0)


def batches(passes: Sequence[tuple[int, Window]], batch_tokens: int) -> Iterator[Sequence[tuple[int, Window]]]:
    """Divide passes, longest first, into batches of at most `batch_tokens` tokens, padding included."""
    begin = 0
    while begin < len(passes):
        _, longest = passes[begin]
        end = begin + max(1, batch_tokens // (longest.end - longest.begin))
        yield passes[begin:end]
        begin = end
