"""What is asked of the generator, and what becomes of what it writes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from helpers.evaluation_model import DATA
from helpers.small_model import small_model

from pangu.evaluation.answering import Answerer, answer_metrics, as_written
from pangu.evaluation.examples import Choice, Example
from pangu.evaluation.prompts import PromptBuilder
from pangu.evaluation.readers import read_examples
from pangu.evaluation.scoring import Score
from pangu.evaluation.tasks import Task, find_files, load_tasks
from pangu.inference.generation import Generation

LOADED = load_tasks()


class Writer:
    """A generator that writes what it is told, and remembers what it was asked."""

    def __init__(self, *texts: str, max_positions: int = 1024) -> None:
        self.texts, self.asked = list(texts), []  # type: ignore[var-annotated]
        self.model = small_model(max_positions=max_positions)
        self.tokenizer = SimpleNamespace(encode=lambda text: [ord(char) % 90 for char in text])

    def generate(self, prompts: list[str], **settings: Any) -> list[Generation]:
        self.asked.append((prompts, settings))
        return [Generation(self.texts.pop(0), [], "length") for _ in prompts]


def answerer(task: Task, generator: Any, seed: int = 5) -> Answerer:
    return Answerer(task, generator, PromptBuilder(task, [], 0, "suffix", seed, len, 10_000), seed)


# Table 8 of the paper; what it does not name keeps the default, which draws from the model's own distribution.
TABLE_8 = {
    "cmrc2018": {"top_p": 0.8, "temperature": 0.8},
    "drcd": {"top_p": 0.8, "temperature": 0.8},
    "dureader": {"top_p": 0.9, "temperature": 0.7},
    "webqa": {"top_k": 5},
    "pd_cft": {"top_k": 1, "temperature": 0.9},
    "cmrc2017": {"top_p": 0.9, "temperature": 1.0},
}


def test_all_written_tasks_are_in_table_8() -> None:
    assert set(TABLE_8) == {name for name, task in LOADED.items() if task.kind == "generate"}


@pytest.mark.parametrize("name", TABLE_8)
def test_decoding_is_the_papers(name: str) -> None:
    task = LOADED[name]
    examples = list(enumerate(read_examples(task, find_files(task, DATA / name).evaluate)))
    writer = Writer(*["。"] * len(examples))
    records = answerer(task, writer).answer(examples)
    [(prompts, settings)] = writer.asked
    assert {key: settings[key] for key in ("top_p", "top_k", "temperature") if key in settings} == TABLE_8[name]
    assert settings["stop_ids"] == {9, ord("\n") % 90} and settings["max_new_tokens"] == task.decoding["max_new_tokens"]
    assert sorted(settings["seed"]) == [5 + number for number, _ in examples]
    assert sorted(map(len, prompts)) == list(map(len, prompts))
    assert [record["number"] for record in records] == [number for number, _ in examples]


def test_answers_are_tidied_and_go_to_their_questions() -> None:
    task = LOADED["webqa"]
    examples = [
        (0, Example("a", {"question": "很长的一个问题？"}, answers=("成都，四川",))),
        (1, Example("b", {"question": "短？"}, answers=("周",))),
    ]
    records = answerer(task, Writer(" 周 \n问：还有", "成都,四川\n")).answer(examples)  # the shorter prompt is answered first
    assert [record["prediction"] for record in records] == ["成都，四川", "周"]
    assert [(record["em"], record["f1"]) for record in records] == [(1.0, 1.0), (1.0, 1.0)]


def test_an_answer_that_the_tokenizer_cannot_give_back_can_still_be_met() -> None:
    assert as_written(["成都，四川"]) == ["成都，四川"]  # punctuation comes back
    assert as_written(["１９９５年", "九五年"]) == ["１９９５年", "九五年", "1995年"]
    example = Example("a", {"question": "哪年？"}, answers=("１９９５年",))
    [record] = answerer(LOADED["webqa"], Writer("1995年")).answer([(0, example)])
    assert (record["em"], record["answers"]) == (1.0, ["１９９５年"])


def test_a_small_window_leaves_half_for_the_question() -> None:
    writer = Writer("。", max_positions=24)
    answerer(LOADED["webqa"], writer).answer([(0, Example("a", {"question": "谁？"}, answers=("周",)))])
    assert writer.asked[0][1]["max_new_tokens"] == 12


def test_the_word_of_a_cloze() -> None:
    metrics = answer_metrics()
    begins, first = metrics["accuracy"], metrics["accuracy_first_word"]
    for answers, text, both in (
        (["游客"], "游客多了起来", (1, 1)),
        (["客"], "客人来了", (1, 0)),
        (["游客"], "很多游客", (0, 0)),
        (["游客"], "", (0, 0)),
        (["ＣＤ"], "cd", (1, 1)),
    ):
        assert (begins(answers, text), first(answers, text)) == both, text


def test_the_lowest_mean_loss_is_chosen() -> None:
    """Of the mean, not of the sum: the longer text has the worse sum here."""
    task = LOADED["chid"]
    asked = answerer(task, Writer())
    example = Example("a", {"before": "前", "after": "后"}, (Choice("0", "短"), Choice("1", "长长长")), 1)
    scores = {2: Score(-4.0, 2, False), 4: Score(-6.0, 4, False)}
    asked.scorer = SimpleNamespace(span=lambda context, scored: len(scored), score=lambda spans: [scores[span] for span in spans])  # type: ignore[assignment]
    [record] = asked.answer([(3, example)])
    assert (record["prediction"], record["gold"], record["accuracy"], record["number"]) == ("1", "1", 1.0, 3)
    assert dict(zip(record["choices"], record["losses"], strict=True)) == {"0": 2.0, "1": 1.5}
