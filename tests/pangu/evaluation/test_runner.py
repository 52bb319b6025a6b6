"""A run of a task: in which order, what a kill leaves, whose records are refused; and figures by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.topology import Groups, Topology
from pangu.errors import InputError
from pangu.evaluation import runner
from pangu.evaluation.examples import Example
from pangu.evaluation.figures import figures, markdown
from pangu.evaluation.runner import evaluation_order, run
from pangu.evaluation.tasks import load_tasks

ALONE = Groups.from_topology(Topology(tensor=1, pipeline=1, data=1), 0)
EXAMPLES = [Example(str(number), {}) for number in range(100)]
HEADER = {"task": "none", "seed": 1}


class Killed(Exception):
    pass


class Counting:
    """Answers with the example's number, and dies when it has answered `lives` rounds."""

    def __init__(self, lives: int = 1000) -> None:
        self.lives, self.asked = lives, []  # type: ignore[var-annotated]

    def __call__(self, examples: Sequence[tuple[int, Example]]) -> list[dict[str, Any]]:
        if not self.lives:
            raise Killed
        self.lives -= 1
        self.asked += [number for number, _ in examples]
        return [{"number": number, "id": example.id} for number, example in examples]


def test_order_is_a_shuffle_whose_beginning_does_not_change() -> None:
    order = evaluation_order(100, 5, None)
    assert sorted(order) == list(range(100)) and order != sorted(order)
    assert evaluation_order(100, 5, 7) == order[:7] and evaluation_order(100, 6, None) != order


@pytest.mark.parametrize("torn", ["", '{"number": 3, "i', "not json\n", '{"number": -1}\n'])
def test_a_killed_run_goes_on(tmp_path: Path, torn: str) -> None:
    path, order = tmp_path / "r.jsonl", evaluation_order(100, 1, None)
    run(Counting(), EXAMPLES, order, ALONE, tmp_path / "whole.jsonl", HEADER)
    with pytest.raises(Killed):
        run(Counting(2), EXAMPLES, order, ALONE, path, HEADER)
    with path.open("a") as file:
        file.write(torn)
    second = Counting()
    records = run(second, EXAMPLES, order, ALONE, path, HEADER)
    assert second.asked == order[2 * runner.EXAMPLES_A_ROUND :]
    assert [record["number"] for record in records] == order
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_longer_run_goes_on_from_a_shorter_and_a_shorter_reads_a_longer(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    run(Counting(), EXAMPLES, evaluation_order(100, 1, 10), ALONE, path, HEADER)
    longer = Counting()
    run(longer, EXAMPLES, evaluation_order(100, 1, 40), ALONE, path, HEADER)
    assert longer.asked == evaluation_order(100, 1, 40)[10:]
    before, shorter = path.read_bytes(), Counting()
    assert len(run(shorter, EXAMPLES, evaluation_order(100, 1, 5), ALONE, path, HEADER)) == 5
    assert shorter.asked == [] and path.read_bytes() == before


def test_records_of_another_run_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    run(Counting(), EXAMPLES, [1, 2], ALONE, path, HEADER)
    with pytest.raises(InputError, match=r"another run \(seed = 1, now 2\)"):
        run(Counting(), EXAMPLES, [1, 2], ALONE, path, {**HEADER, "seed": 2})
    path.write_text("hello\nworld\n")
    with pytest.raises(InputError, match="not a header"):
        run(Counting(), EXAMPLES, [1, 2], ALONE, path, HEADER)
    assert path.read_text() == "hello\nworld\n"


def choice(gold: str, correct: bool, offered: str = "abc", subset: str = "") -> dict[str, Any]:
    return {"gold": gold, "choices": list(offered), "accuracy": float(correct), "subset": subset}


def test_accuracy_stands_beside_what_guessing_gets() -> None:
    task = load_tasks()["cmnli"]
    [row] = figures(task, [choice("a", True), choice("a", False), choice("a", True), choice("b", False)], 1, 100)
    assert (row["value"], row["random"], row["majority"], row["examples"]) == (0.5, pytest.approx(1 / 3), 0.75, 4)
    assert row["interval"] == pytest.approx((0.1500, 0.8500), abs=1e-3)
    # Of those offered the most common is guessed; of two as common, either.
    [row] = figures(task, [choice("a", True), choice("b", True), choice("b", True, "bc"), choice("a", True, "ac")], 1, 100)
    assert (row["random"], row["majority"]) == (pytest.approx((1 / 3 + 1 / 3 + 1 / 2 + 1 / 2) / 4), 0.75)


def test_subsets_are_told_apart() -> None:
    rows = figures(
        load_tasks()["c3"], [choice("0", True, subset="d"), choice("0", False, subset="m"), choice("1", False, subset="m")], 1, 100
    )
    assert [(row["subset"], row["value"], row["examples"]) for row in rows] == [("", pytest.approx(1 / 3), 3), ("d", 1.0, 1), ("m", 0.0, 2)]


def test_written_answers_stand_beside_what_guessing_gets() -> None:
    records = [
        {"answers": answers, "prediction": "", "em": 0.0, "f1": value, "subset": ""}
        for answers, value in ((["甲"], 0.5), (["甲", "乙"], 0.25), (["丙丁"], 0.0))
    ]
    em, f1 = figures(load_tasks()["webqa"], records, 1, 100)
    assert em["majority"] == pytest.approx(2 / 3) and f1["value"] == 0.25
    assert 0 <= f1["interval"][0] < 0.25 < f1["interval"][1] <= 0.5
    assert em["random"] in (0.0, pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_perplexities_by_hand() -> None:
    records = [
        {"log_likelihood": -6.0, "tokens": 2, "characters": 3, "bytes": 9, "greedy": True, "subset": ""},
        {"log_likelihood": -2.0, "tokens": 2, "characters": 5, "bytes": 7, "greedy": False, "subset": ""},
    ]
    rows = {row["metric"]: row for row in figures(load_tasks()["wplc"], records, 1, 50)}
    assert {name: row["value"] for name, row in rows.items()} == {
        "perplexity per token": pytest.approx(math.exp(2)),
        "perplexity per character": pytest.approx(math.exp(1)),
        "perplexity per byte": pytest.approx(math.exp(0.5)),
        "perplexity per word": pytest.approx(math.exp(4)),
        "accuracy": 0.5,
    }
    assert rows["perplexity per token"]["random"] == pytest.approx(50)
    assert rows["perplexity per character"]["random"] == pytest.approx(50**0.5)
    assert rows["perplexity per token"]["interval"] == pytest.approx((math.exp(1), math.exp(3)))


def test_a_hopeless_model_is_infinitely_perplexed() -> None:
    record = {"log_likelihood": -5000.0, "tokens": 300, "characters": 300, "bytes": 900, "greedy": False, "subset": ""}
    rows = {row["metric"]: row for row in figures(load_tasks()["wplc"], [record], 1, 50)}
    assert rows["perplexity per word"]["value"] == rows["perplexity per word"]["random"] == math.inf
    assert rows["perplexity per word"]["interval"] == (math.inf, math.inf)
    assert rows["perplexity per token"]["value"] == pytest.approx(math.exp(50 / 3))


def test_a_text_without_tokens_has_no_perplexity() -> None:
    """A tab, which the tokenizer drops."""
    record = {"log_likelihood": 0.0, "tokens": 0, "characters": 1, "bytes": 1, "greedy": True, "subset": ""}
    row = figures(load_tasks()["perplexity"], [record], 1, 50)[0]
    assert (row["value"], row["random"]) == (math.inf, math.inf)


def test_the_page_shows_the_papers_row() -> None:
    task = load_tasks()["cmnli"]
    results = {"model": "m", "shots": 0, "seed": 1, "figures": figures(task, [choice("a", True)], 1, 100)}
    page = markdown(task, json.loads(json.dumps(results)))
    assert "| accuracy | all | 100.00 | 20.65 to 100.00 | 33.33 | 100.00 | 1 |" in page
    assert "| 2.6B | 50.20 | 51.17 |" in page and "| 13B | 48.44 | 46.18 |" in page
