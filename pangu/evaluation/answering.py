"""Gets a model's answers to examples, chosen, written or scored, and checks whether they are right."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from pangu.evaluation.answer_metrics import exact_match, f1, restore_punctuation, rouge_1
from pangu.evaluation.examples import Example
from pangu.evaluation.prompts import PromptBuilder, Query
from pangu.evaluation.scoring import Scorer
from pangu.evaluation.tasks import Task
from pangu.inference.generation import TextGenerator
from pangu.text.segmentation import Segmenter

Record = dict[str, Any]
"""The result of one example, a line of the records file."""

PROMPTS_A_BATCH = 8


class Answerer:
    """Gets a model's answers to examples of one task.

    Args:
        task: the task.
        generator: the model and its tokenizer.
        builder: makes the texts from the examples.
        seed: seed of sampling; each example uses its own random stream.
    """

    def __init__(self, task: Task, generator: TextGenerator, builder: PromptBuilder, seed: int) -> None:
        self.task, self.generator, self.builder, self.seed = task, generator, builder, seed
        self.scorer = Scorer(generator.model, generator.tokenizer)
        self.metrics = answer_metrics()

    def answer(self, examples: Sequence[tuple[int, Example]]) -> list[Record]:
        """The records of examples, which are given as (number in the data, example)."""
        queries = [self.builder.build(example, number) for number, example in examples]
        match self.task.kind:
            case "choice":
                bodies = self._choose(queries)
            case "generate":
                bodies = self._write([self.seed + number for number, _ in examples], queries)
            case "perplexity":
                bodies = self._measure(queries)
        return [
            {"number": number, "id": query.example.id, "subset": query.example.subset, "shots": query.shots, "cut": query.is_cut, **body}
            for (number, _), query, body in zip(examples, queries, bodies, strict=True)
        ]

    def _choose(self, queries: Sequence[Query]) -> list[Record]:
        """Records of the choice with the lowest mean loss per token; among equal ones the first in the order drawn."""
        scores = iter(self.scorer.score([self.scorer.span(text.context, text.scored) for query in queries for text in query.texts]))
        records = []
        for query in queries:
            losses = [next(scores).loss for _ in query.texts]
            chosen = losses.index(min(losses))
            labels = [choice.label for choice in query.example.choices]
            records.append(
                {
                    "choices": labels,
                    "losses": losses,
                    "prediction": labels[chosen],
                    "gold": labels[query.example.gold],
                    "accuracy": float(chosen == query.example.gold),
                }
            )
        return records

    def _write(self, seeds: Sequence[int], queries: Sequence[Query]) -> list[Record]:
        decoding = {**self.task.decoding, "max_new_tokens": max_new_tokens(self.task, self.generator.model.config.max_positions)}
        newline = self.generator.tokenizer.encode("\n")[-1:]
        stop_ids = {self.generator.model.config.separator_id, *newline}
        # Of like length together: a batch is as long as its longest prompt.
        order = sorted(range(len(queries)), key=lambda index: len(queries[index].texts[0].context))
        texts = [""] * len(queries)
        for begin in range(0, len(order), PROMPTS_A_BATCH):
            batch = order[begin : begin + PROMPTS_A_BATCH]
            prompts, own_seeds = [queries[index].texts[0].context for index in batch], [seeds[index] for index in batch]
            for index, generation in zip(
                batch, self.generator.generate(prompts, seed=own_seeds, stop_ids=stop_ids, **decoding), strict=True
            ):
                texts[index] = restore_punctuation(generation.text.partition("\n")[0].strip())
        return [
            {"prediction": text, "answers": list(query.example.answers)}
            | {name: self.metrics[name](as_written(query.example.answers), text) for name in self.task.metrics}
            for query, text in zip(queries, texts, strict=True)
        ]

    def _measure(self, queries: Sequence[Query]) -> list[Record]:
        texts = [query.texts[0] for query in queries]
        scores = self.scorer.score([self.scorer.span(text.context, text.scored) for text in texts])
        return [
            {
                "log_likelihood": score.log_likelihood,
                "tokens": score.num_tokens,
                "characters": len(text.scored),
                "bytes": len(text.scored.encode()),
                "greedy": score.is_greedy,
            }
            for text, score in zip(texts, scores, strict=True)
        ]


def as_written(answers: Sequence[str]) -> list[str]:
    """The answers; those with characters that the tokenizer folds are added in their folded form (１９９５年 as 1995年)."""
    return [*answers, *(form for answer in answers if (form := restore_punctuation(unicodedata.normalize("NFKC", answer))) not in answers)]


def max_new_tokens(task: Task, max_positions: int) -> int:
    """Largest number of tokens of an answer: at most half of the window, so that there is room for the question."""
    return min(int(task.decoding.get("max_new_tokens", 0)), max_positions // 2)


def answer_metrics() -> dict[str, Callable[[Sequence[str], str], float]]:
    """The metrics of written answers, by the names in tasks.yaml."""
    segmenter = Segmenter()

    def first_word(answers: Sequence[str], prediction: str) -> float:
        return float(_folded(next(iter(segmenter.cut(prediction)), "")) in map(_folded, answers))

    return {"em": exact_match, "f1": f1, "rouge1": rouge_1, "accuracy": begins_with, "accuracy_first_word": first_word}


def begins_with(answers: Sequence[str], prediction: str) -> float:
    """1 if the prediction begins with an answer, else 0: nothing marks where the requested word ends in a longer text."""
    return float(_folded(prediction).startswith(tuple(map(_folded, answers))))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).strip().lower()
