"""Likelihood of texts, next to transformers' GPT-2 of equal shape.

Both have random weights in fp32, read the same texts in the same batches with as many threads, and say of each text how likely its scored
tokens are and whether each is the likeliest. `suffix` scores the last tokens of each, as a choice among answers does; `full` all but the
first, as perplexity does. GPT-2 is asked as lm-evaluation-harness asks it: texts of like length together, padded on the right, the
logits of the whole batch, their log_softmax, and then each text's scored tokens are picked. After one run each to warm up they take turns;
each turn's speed is divided by GPT-2's in the same turn. Numbers are medians over the turns, ranges their least and greatest; tokens are
those that are read. How far the log-likelihoods are from those of the same weights, computed text by text as the weights come, is said too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.table import Table

from pangu.benchmarks import harness, turns
from pangu.errors import InputError

if TYPE_CHECKING:
    from pangu.evaluation.scoring import Score, Span
    from pangu.model.model import PanguModel

COUNTS = {
    "texts": (32, "to score"),
    "length": (256, "tokens of the longest; the others have half of it or more"),
    "suffix": (8, "scored tokens of each text in `suffix`"),
    "batch_tokens": (2048, "of a batch, padding included"),
    **turns.COUNTS,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this task."""
    turns.add_arguments(parser, COUNTS)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Score in turns.

    Raises:
        InputError: if an option is impossible, or transformers is not installed.
    """
    model = turns.settings(arguments, COUNTS)
    if arguments.suffix > (arguments.length + 1) // 2 - 1:
        raise InputError(
            f"--suffix {arguments.suffix}: less than half of --length {arguments.length} expected, for context goes before it."
        )

    import torch

    from pangu.evaluation.scoring import Scorer, Span
    from pangu.inference.cpu_weights import arrange_for_cpu

    random = torch.Generator().manual_seed(1)
    lengths = torch.randint((arguments.length + 1) // 2, arguments.length + 1, (arguments.texts,), generator=random).tolist()
    texts = [torch.randint(10, arguments.vocab, (length,), generator=random).tolist() for length in lengths]
    spans = {"suffix": [Span(ids, len(ids) - arguments.suffix) for ids in texts], "full": [Span(ids, 1) for ids in texts]}
    config = turns.model_config(arguments, arguments.length)
    peer, plain = turns.gpt2(config), turns.random_model(config)
    own = turns.id_generator(turns.random_model(config, arrange_for_cpu))
    scorer = Scorer(own.model, own.tokenizer, arguments.batch_tokens)
    runs: dict[str, Callable[[], list[Score]]] = {}
    for name, some in spans.items():
        runs[name] = partial(scorer.score, some)
        runs[f"{turns.PEER}, {name}"] = partial(peer_scores, peer, some, arguments.batch_tokens)
    furthest = max(
        abs(score.log_likelihood - right)
        for name, some in spans.items()
        for score, right in zip(runs[name](), recomputed(plain, some), strict=True)
    )
    return {
        "model": model,
        "largest_difference": furthest,
        **turns.compare(runs, {name: f"{turns.PEER}, {name}" for name in spans}, sum(lengths), arguments),
    }


def peer_scores(model: Any, spans: Sequence[Span], batch_tokens: int) -> list[Score]:
    """The scores of a transformers model."""
    import torch

    from pangu.evaluation.scoring import Score, Window, batches

    order = sorted(range(len(spans)), key=lambda index: -len(spans[index].ids))
    scores: dict[int, Score] = {}
    for batch in batches([(index, Window(0, spans[index].start, len(spans[index].ids))) for index in order], batch_tokens):
        longest = batch[0][1].end - 1
        tokens = torch.tensor([[*spans[index].ids[:-1], *[0] * (longest + 1 - window.end)] for index, window in batch])
        with torch.inference_mode():
            logprobs = torch.log_softmax(model(tokens, use_cache=False).logits, dim=-1)
            for row, (index, window) in zip(logprobs, batch, strict=True):
                scored, labels = row[window.first - 1 : window.end - 1], torch.tensor(spans[index].ids[window.first :])
                likelihood = scored.gather(-1, labels.unsqueeze(-1)).sum()
                scores[index] = Score(float(likelihood), len(labels), bool((scored.argmax(dim=-1) == labels).all()))
    return [scores[index] for index in range(len(spans))]


def recomputed(model: PanguModel, spans: Sequence[Span]) -> list[float]:
    """The log-likelihood of each span by itself."""
    import torch

    found = []
    for span in spans:
        with torch.inference_mode():
            logits = model.logits(torch.tensor([span.ids[:-1]]), torch.arange(len(span.ids) - 1).unsqueeze(0))[0, span.start - 1 :]
            labels = torch.tensor(span.ids[span.start :]).unsqueeze(-1)
            found.append(float(logits.double().log_softmax(dim=-1).gather(-1, labels).sum()))
    return found


def table(result: dict[str, Any]) -> Table:
    """The result for people: a row for each part of the texts that is scored."""
    model = result["model"]
    return harness.speed_table(
        result,
        f"{model['texts']} texts of up to {model['length']} tokens, {model['suffix']} or all but one scored, batches of "
        f"{model['batch_tokens']}; {model['layers']} layers, hidden {model['hidden']}, vocabulary {model['vocab']}\n"
        f"largest difference of a log-likelihood from recomputation: {result['largest_difference']:.1e}",
        f"{result['device']}; {model['threads']} threads, {model['clock']} time",
        *("tokens_per_second", "tokens/s", ".1f"),
    )
