"""Scoring: each token once, given all before it, the same in any batch, any window and under tensor parallelism."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.harness import run_distributed
from helpers.small_model import VOCAB, WINDOW, NumberTokenizer, small_model

from megatron_ext.supervision import rendezvous
from megatron_ext.topology import Groups, Topology
from pangu.evaluation.scoring import Score, Scorer, Span, windows
from pangu.inference.generation import TextGenerator
from pangu.model.model import PanguModel
from pangu.text.tokenizer import PanguTokenizer


def spans() -> list[Span]:
    """Of many lengths, up to several windows; scored from the second token, the middle, the last one, and past the end."""
    rng = torch.Generator().manual_seed(5)
    found = []
    for length in (2, 3, 7, 7, 8, WINDOW, WINDOW + 1, WINDOW + 2, 2 * WINDOW, 90):
        ids = torch.randint(0, VOCAB, (length,), generator=rng).tolist()
        found += [Span(ids, start) for start in sorted({1, length // 2, length - 1, length} - {0})]
    return found


def token_by_token(model: PanguModel, span: Span) -> Score:
    """Each token by a pass of its own over the tokens that `windows` lets it see."""
    total, greedy = 0.0, True
    for window in windows(len(span.ids), span.start, model.config.max_positions):
        for at in range(window.first, window.end):
            ids = torch.tensor([list(span.ids[window.begin : at])])
            scores = model.logits(ids, torch.arange(ids.shape[1]).unsqueeze(0))[0, -1, :VOCAB].double().log_softmax(-1)
            total += float(scores[span.ids[at]])
            greedy &= int(scores.argmax()) == span.ids[at]
    return Score(total, len(span.ids) - span.start, greedy)


@pytest.mark.parametrize("max_positions", [1, 2, 3, 7, 16])
def test_windows_score_each_token_once_and_look_far_back(max_positions: int) -> None:
    for length in range(2, 60):
        for start in range(1, length + 1):
            pieces = list(windows(length, start, max_positions))
            assert [at for piece in pieces for at in range(piece.first, piece.end)] == list(range(start, length))
            for piece in pieces:
                assert 0 <= piece.begin < piece.first and piece.end - 1 - piece.begin <= max_positions
                assert piece.first - piece.begin >= min(piece.first, max(1, max_positions // 2)) or piece is pieces[0]
            if length <= max_positions + 1:
                assert len(pieces) == (start < length) and all(piece.begin == 0 for piece in pieces)


@torch.inference_mode()
def test_scores_are_those_of_one_token_at_a_time() -> None:
    model = small_model()
    expected = [token_by_token(model, span) for span in spans()]
    for batch_tokens in (None, 1, 50):
        advanced: list[int] = []
        for score, right in zip(Scorer(model, NumberTokenizer(), batch_tokens).score(spans(), advanced.append), expected, strict=True):
            assert score.log_likelihood == pytest.approx(right.log_likelihood, abs=1e-3)
            assert (score.num_tokens, score.is_greedy) == (right.num_tokens, right.is_greedy)
        assert sum(advanced) == sum(len(span.ids) - span.start for span in spans())


def test_the_perplexity_of_a_document_is_the_training_loss() -> None:
    model = small_model()
    ids = [9, 4, 8, 15, 16, 23, 42]
    tokens, labels = torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])
    loss = model(tokens, torch.arange(6).unsqueeze(0), labels, torch.ones(1, 6))
    scorer = Scorer(model, NumberTokenizer())
    span = scorer.span("", "4 8 15 16 23 42")
    assert span == Span(ids, 1)  # 9 is the separator
    assert scorer.score([span])[0].loss == pytest.approx(float(loss.detach()), rel=1e-5)


def test_what_greedy_decoding_writes_is_greedy() -> None:
    model = small_model(vocab_size=90)  # generation never chooses ids that the tokenizer lacks, scoring counts them
    [written] = TextGenerator(model, NumberTokenizer()).generate(["3 14 15"], max_new_tokens=6, temperature=0)  # type: ignore[arg-type]
    scorer = Scorer(model, NumberTokenizer())
    other = " ".join(map(str, [*written.ids[:-1], written.ids[-1] ^ 1]))
    right, wrong = scorer.score([scorer.span("3 14 15", written.text), scorer.span("3 14 15", other)])
    assert right.is_greedy and not wrong.is_greedy
    assert right.log_likelihood > wrong.log_likelihood


def test_nothing_is_never_the_likeliest() -> None:
    scorer = Scorer(small_model(), NumberTokenizer())
    [nothing] = scorer.score([scorer.span("3 4", "")])
    assert (nothing.log_likelihood, nothing.num_tokens, nothing.loss) == (0.0, 0, float("inf"))
    assert scorer.score([]) == []


PAIRS = [
    ("中国人", "民很勤劳"),
    ("四川的省会是", "成都"),
    ("他研究生", "命科学"),
    ("北京大", "学生会"),
    ("南京市长", "江大桥"),
    ("你好，", "世界"),
]


def test_the_scored_tokens_are_those_of_the_continuation(shared: Path) -> None:
    """Where counting off the context's tokens from the whole's would score others."""
    tokenizer = PanguTokenizer(shared / "tokenizer")
    scorer = Scorer(small_model(), tokenizer)
    shifted = 0
    for context, continuation in PAIRS:
        span, whole = scorer.span(context, continuation), tokenizer.encode(context + continuation)
        assert tokenizer.decode(span.ids[: span.start]) == tokenizer.decode(tokenizer.encode(context))
        assert tokenizer.decode(span.ids[span.start :]) == continuation
        shifted += whole[: span.start] != tokenizer.encode(context)
    assert shifted >= 3


@torch.inference_mode()
def likeliest() -> list[Span]:
    """Texts that end in the likeliest token, which is one of all ranks'."""
    model, found = small_model(), []
    for length in range(1, WINDOW):
        ids = [(7 * place) % VOCAB for place in range(length)]
        best = model.logits(torch.tensor([ids]), torch.arange(length).unsqueeze(0))[0, -1, :VOCAB].argmax()
        found.append(Span([*ids, int(best)], length))
    return found


def on_a_rank(size: int) -> list[Score]:
    rendezvous.initialize(60)
    groups = Groups.create(Topology.from_world_size(size, tensor=size, pipeline=1))
    return Scorer(small_model(groups.tensor), NumberTokenizer()).score([*spans(), *likeliest()])


@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_scores_are_the_same_on_all_ranks(size: int) -> None:
    expected = Scorer(small_model(), NumberTokenizer()).score([*spans(), *likeliest()])
    assert len({4 * span.ids[-1] // VOCAB for span in likeliest()}) > 2 and all(score.is_greedy for score in expected[len(spans()) :])
    results = run_distributed(on_a_rank, size, size)
    for scores in results:
        assert scores == results[0]
        for score, right in zip(scores, expected, strict=True):
            assert score.log_likelihood == pytest.approx(right.log_likelihood, abs=1e-3)
            assert (score.num_tokens, score.is_greedy) == (right.num_tokens, right.is_greedy)
