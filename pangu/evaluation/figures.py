"""Turns records into figures, each with its interval, the scores of guessing and the paper's score, as JSON and as a Markdown table."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pangu.evaluation.answer_metrics import bootstrap, wilson
from pangu.evaluation.answering import Record, answer_metrics
from pangu.evaluation.tasks import Task


def figures(task: Task, records: Sequence[Record], seed: int, vocab_size: int) -> list[dict[str, Any]]:
    """The figures of a task, for all examples and, if there are several subsets, for each subset.

    Each has `metric`, `subset` (empty: all), `value`, `interval` (95 %: Wilson's of a share, else bootstrap with `seed`), `examples`, and
    `random` and `majority`, the values of guessing (None where that has no meaning). Shares lie in [0, 1].
    """
    subsets = sorted({record["subset"] for record in records})
    parts = [("", list(records))]
    if len(subsets) > 1:
        parts += [(subset, [record for record in records if record["subset"] == subset]) for subset in subsets]
    found = []
    for subset, part in parts:
        rows = _perplexities(task, part, seed, vocab_size) if task.kind == "perplexity" else _means(task, part, seed)
        found += [{"metric": row.pop("metric"), "subset": subset, "examples": len(part), **row} for row in rows]
    return found


def _means(task: Task, records: Sequence[Record], seed: int) -> list[dict[str, Any]]:
    guessed = _guess_choices(records) if task.kind == "choice" else _guess_answers(task, records, seed)
    rows = []
    for metric in task.metrics:
        values = [record[metric] for record in records]
        is_share = set(values) <= {0.0, 1.0}
        interval = wilson(sum(values), len(values)) if is_share else bootstrap([[v] for v in values], lambda means: means[:, 0], seed)
        rows.append({"metric": metric, "value": _mean(values), "interval": interval, **guessed[metric]})
    return rows


def _guess_choices(records: Sequence[Record]) -> dict[str, dict[str, float | None]]:
    """Guessing among what was offered: blindly; or the label that is right most often in these very examples."""
    common = Counter(record["gold"] for record in records)
    hits = []
    for record in records:
        most = max(common[label] for label in record["choices"])
        best = [label for label in record["choices"] if common[label] == most]
        hits.append((record["gold"] in best) / len(best))
    blind = [1 / len(record["choices"]) for record in records]
    return {"accuracy": {"random": _mean(blind), "majority": _mean(hits)}}


def _guess_answers(task: Task, records: Sequence[Record], seed: int) -> dict[str, dict[str, float | None]]:
    """Guessing texts: the answer to another of these questions; or the one that answers most of them."""
    metrics = answer_metrics()
    answers = [record["answers"] for record in records]
    [(frequent, _)] = Counter(answer for of_one in answers for answer in dict.fromkeys(of_one)).most_common(1)
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    others = [answers[number][0] for number in order[1:] + order[:1]]
    return {
        name: {
            "random": _mean([metrics[name](answers[number], other) for number, other in zip(order, others, strict=True)])
            if len(order) > 1
            else None,
            "majority": _mean([metrics[name](own, frequent) for own in answers]),
        }
        for name in task.metrics
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _perplexities(task: Task, records: Sequence[Record], seed: int, vocab_size: int) -> list[dict[str, Any]]:
    """exp of the mean negative log-likelihood of a token, a character, a byte; of WPLC also of a word, and the share of words guessed."""
    keys = ["tokens", "characters", "bytes"]
    samples = [[record["log_likelihood"], *(record[key] for key in keys)] for record in records]
    totals = np.sum(samples, axis=0)
    rows: list[dict[str, Any]] = []

    def of(column: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda means: _exp_of_mean(-means[:, 0], means[:, column])

    for column, key in enumerate(keys, 1):
        uniform = float(_exp_of_mean(math.log(vocab_size) * totals[1], totals[column]))
        value = float(_exp_of_mean(-totals[0], totals[column]))
        rows.append(
            {"metric": f"perplexity per {key[:-1]}", "value": value, "interval": bootstrap(samples, of(column), seed), "random": uniform}
        )
    if task.name != "perplexity":
        words = [[row[0], 1.0] for row in samples]
        uniform = float(_exp_of_mean(math.log(vocab_size) * totals[1], len(records)))
        rows.append(
            {
                "metric": "perplexity per word",
                "value": float(_exp_of_mean(-totals[0], len(records))),
                "interval": bootstrap(words, of(1), seed),
                "random": uniform,
            }
        )
        hits = sum(record["greedy"] for record in records)
        rows.append({"metric": "accuracy", "value": hits / len(records), "interval": wilson(hits, len(records)), "random": 0.0})
    return [{**row, "majority": None} for row in rows]


def _exp_of_mean(total: Any, count: Any) -> Any:
    """exp(total / count) of numbers or arrays; infinite where nothing was counted, or the result is too large for a float."""
    with np.errstate(all="ignore"):
        return np.where(np.equal(count, 0), np.inf, np.exp(np.divide(total, count)))


def markdown(task: Task, results: dict[str, Any]) -> str:
    """A page about one run: its figures beside those of guessing and of the paper."""
    lines = [f"# {task.name}", "", f"`{results['model']}`, {results['shots']} shots asked for, seed {results['seed']}.", ""]
    lines += ["| metric | subset | value | 95 % interval | random | majority | examples |", "|---|---|---|---|---|---|---|"]
    for row in results["figures"]:
        show = _perplexity if "perplexity" in row["metric"] else _percent
        cells = [show(value) for value in (row["value"], row["random"], row["majority"])]
        low, high = map(show, row["interval"])
        lines.append(
            f"| {row['metric']} | {row['subset'] or 'all'} | {cells[0]} | {low} to {high} | {cells[1]} | {cells[2]} | {row['examples']} |"
        )
    if task.paper:
        paper = task.paper
        lines += ["", f"The paper (arXiv 2104.12369, Table 10; {paper['metric']}, shots {paper['shots']}):", ""]
        lines += ["| model | zero-shot | few-shot |", "|---|---|---|"]
        lines += [f"| {name} | {zero} | {few} |" for name, zero, few in zip(("2.6B", "13B"), paper["zero"], paper["few"], strict=True)]
    return "\n".join(lines) + "\n"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _perplexity(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if value < 1e5 else f"{value:.2e}"
