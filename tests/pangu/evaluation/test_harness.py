"""The model in lm-evaluation-harness: its three kinds of requests, and a whole `simple_evaluate`. Skipped where that is not installed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.evaluation_model import write_evaluation_model

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'pangu-alpha-pytorch[eval]'")

from pangu.evaluation.harness import PanguLM  # noqa: E402  (after the check that it can be imported)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PanguLM:
    return PanguLM.from_directory(write_evaluation_model(tmp_path_factory.mktemp("harness")))


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


def test_likelihoods_of_a_text_add_up(model: PanguLM) -> None:
    text = "青溪镇在山的南边，镇里有一条老街。"
    [rolling] = model.loglikelihood_rolling(requests((text,)))
    [(whole, greedy)] = model.loglikelihood(requests(("", text)))
    assert rolling == pytest.approx(whole) and whole < 0 and not greedy
    long = text * 20
    [rolling] = model.loglikelihood_rolling(requests((long,)))
    assert math.isfinite(rolling) and rolling < 10 * whole


def test_generation_stops_where_it_is_told_to(model: PanguLM) -> None:
    context = "青溪镇在山的"
    [free] = model.generate_until(requests((context, {"until": [], "max_gen_toks": 12})))
    assert len(free) > 4
    [stopped, again] = model.generate_until(requests((context, {"until": [free[3]], "max_gen_toks": 12}), (context, {"max_gen_toks": 12})))
    assert stopped == free[: free.index(free[3])] and again == free
    sampled = {model.generate_until(requests((context, {"do_sample": True, "temperature": t, "max_gen_toks": 12})))[0] for t in (0.5, 20.0)}
    assert len(sampled) == 2


def test_a_context_that_is_too_long_loses_its_beginning(model: PanguLM) -> None:
    window = model.generator.model.config.max_positions
    ending = "老街的尽头是一家茶馆。" * window
    texts = model.generate_until(requests((ending, {"max_gen_toks": 8}), ("青溪" * window + ending, {"max_gen_toks": 8})))
    assert texts[0] == texts[1] and texts[0]


def test_simple_evaluate(model: PanguLM, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    rows: list[dict[str, Any]] = [
        {"question": "茶馆的主人姓什么？", "choices": ["周", "林", "陈"], "answer": 0, "text": "青溪镇在山的南边。"},
        {"question": "渡船冬天开吗？", "choices": ["停航", "开行", "不知道"], "answer": 0, "text": "云湖号是一艘渡船。"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    shared = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\n"
        f"  cache_dir: {tmp_path}/cache\ntest_split: test\ntarget_delimiter: ''\n"
    )
    kinds = {
        "choose": 'output_type: multiple_choice\ndoc_to_text: "问：{{question}}\\n答："\ndoc_to_choice: choices\n'
        "doc_to_target: answer\n"
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n",
        "roll": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: byte_perplexity\n",
        "write": 'output_type: generate_until\ndoc_to_text: "问：{{question}}\\n答："\n'
        "doc_to_target: '{{choices[0]}}'\n"
        "generation_kwargs:\n  until: ['\\n', '。']\n  max_gen_toks: 8\nmetric_list:\n  - metric: exact_match\n",
    }
    for name, kind in kinds.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{shared}{kind}", "utf-8")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = lm_eval.simple_evaluate(model=model, tasks=list(kinds), task_manager=manager, bootstrap_iters=0)["results"]
    right = 0
    for row in rows:
        scores = model.loglikelihood(requests(*((f"问：{row['question']}\n答：", choice) for choice in row["choices"])))
        right += max(range(3), key=lambda index: scores[index][0]) == row["answer"]
    assert results["choose"]["acc,none"] == right / 2
    total = sum(model.loglikelihood_rolling(requests(*((row["text"],) for row in rows))))
    expected = math.exp(-total / sum(len(row["text"].encode()) for row in rows))
    assert results["roll"]["byte_perplexity,none"] == pytest.approx(expected)
    assert results["write"]["exact_match,none"] == 0.0  # nothing was learned
