"""Turns examples into texts for the model: fills in templates, prepends few-shot examples, and cuts the text to fit the model's window.

Everything that is drawn (which examples are shown, which wrong labels are offered, in which order) is drawn from the seed and the
example's number in its file alone: it is the same whatever else is evaluated, by how many processes, in which order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pangu.evaluation.examples import Choice, Example
from pangu.evaluation.tasks import Task

ScoredPart = Literal["suffix", "full"]
BETWEEN_EXAMPLES = "\n"


@dataclass(frozen=True)
class Text:
    """A text in two parts: the context, and the part that is scored (empty for a generation task)."""

    context: str
    scored: str = ""


@dataclass(frozen=True)
class Query:
    """The texts for one example."""

    texts: list[Text]
    """One text per choice; for a generation task only the prompt."""
    example: Example
    """The example, with the choices that are offered, in their order."""
    shots: int
    """Number of few-shot examples in the text: as many of the requested ones as fit."""
    is_cut: bool
    """Whether the example itself was cut because it was too long."""


@dataclass(frozen=True)
class PromptBuilder:
    """Makes queries from a task's examples.

    Args:
        task: the task, with its templates.
        train: examples from which few-shot examples are drawn.
        shots: number of few-shot examples.
        score: the part of a choice's text that is scored: `suffix` = what follows its context, `full` = all but the few-shot examples.
        seed: seed of all random choices.
        count: returns the number of tokens of a text.
        budget: largest number of tokens of a query.
    """

    task: Task
    train: Sequence[Example]
    shots: int
    score: ScoredPart
    seed: int
    count: Callable[[str], int]
    budget: int

    def build(self, example: Example, number: int) -> Query:
        """The query of an example, the `number`-th of its file."""
        rng = random.Random(f"{self.seed}:{number}")  # a text, so that neighbouring seeds have nothing in common
        example = offer(self.task, example, rng)
        shown = [self._solved(one) for one in rng.sample(self.train, min(self.shots, len(self.train)))]
        fitting = self._cut(example)
        texts = self._texts(fitting)
        if shown:
            longest = max(texts, key=lambda text: self.count(text.context) + self.count(text.scored))
            while shown and self.count(self._in_front(shown) + longest.context) + self.count(longest.scored) > self.budget:
                shown.pop()
        front = self._in_front(shown)
        return Query([self._place(front, text) for text in texts], example, len(shown), fitting is not example)

    def _place(self, front: str, text: Text) -> Text:
        if self.task.kind == "choice" and (self.score == "full" or not text.scored):  # a pronoun may end its text: nothing follows
            return Text(front, text.context + text.scored)
        return Text(front + text.context, text.scored)

    def _in_front(self, shown: Sequence[str]) -> str:
        return "".join(text + BETWEEN_EXAMPLES for text in shown)

    def _solved(self, example: Example) -> str:
        """An example with its answer filled in."""
        if self.task.kind == "generate":
            return self.task.solved.format(**example.fields, answer=example.answers[0])
        word = {"word": example.choices[example.gold].word} if example.choices else {}
        return (self.task.context + self.task.scored).format(**example.fields, **word)

    def _texts(self, example: Example) -> list[Text]:
        if self.task.kind == "generate":
            return [Text(self.task.prompt.format(**example.fields))]
        words = [{"word": choice.word} for choice in example.choices] or [{}]
        return [
            Text(self.task.context.format(**example.fields, **word), self.task.scored.format(**example.fields, **word)) for word in words
        ]

    def _cut(self, example: Example) -> Example:
        """The example with its long field cut to the most characters that fit; itself if it fits as it is, or has no such field."""

        def fits(candidate: Example) -> bool:
            return all(self.count(text.context) + self.count(text.scored) <= self.budget for text in self._texts(candidate))

        name = self.task.long
        if not name or fits(example):
            return example
        whole = example.fields[name]

        def keeping(length: int) -> Example:
            kept = whole[len(whole) - length :] if self.task.keep == "end" else whole[:length]
            return replace(example, fields={**example.fields, name: kept})

        return keeping(most_that_fits(len(whole), lambda length: fits(keeping(length))))


def most_that_fits(whole: int, fits: Callable[[int], bool]) -> int:
    """The largest number below `whole` that fits, where all smaller ones do too; 0 if none."""
    low, high = 0, whole
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def offer(task: Task, example: Example, rng: random.Random) -> Example:
    """The example with the choices that are offered, in an order that says nothing: `task.offered` of them, the right one included."""
    if not example.choices:
        return example
    right = example.choices[example.gold]
    wrong: list[Choice] = [choice for index, choice in enumerate(example.choices) if index != example.gold]
    if task.offered:
        wrong = rng.sample(wrong, min(task.offered - 1, len(wrong)))
    offered = [right, *wrong]
    rng.shuffle(offered)
    return replace(example, choices=tuple(offered), gold=offered.index(right))
