"""python -m pangu.evaluate: every task by its name, alone and on several processes, and one line for what cannot work."""

from __future__ import annotations

import io
import json
import sys
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.evaluation_model import DATA, TASKS, write_evaluation_model
from helpers.harness import run_distributed

from megatron_ext.context import ParallelContext
from megatron_ext.initialize import random_weights
from megatron_ext.sharding import canonical_parameters
from megatron_ext.topology import Groups, Topology
from pangu.config import ModelConfig
from pangu.conversion.export import write_weights
from pangu.model.model import PanguModel
from pangu.text.tokenizer_training import train_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_evaluation_model(tmp_path_factory.mktemp("evaluate"))


def run(*arguments: str | int | Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the program, run in this process."""
    from pangu.evaluate import main

    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["pangu.evaluate", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        return int(end.code or 0), out.getvalue(), err.getvalue()
    finally:
        sys.argv = argv
    return 0, out.getvalue(), err.getvalue()


def data(name: str) -> Path:
    return DATA / "perplexity/text.txt" if name == "perplexity" else DATA / name


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()[1:]]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_runs(name: str, weights: Path, tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    shots = 0 if name in ("wplc", "perplexity") else 1
    code, out, err = run("--model", weights, "--task", name, "--data", data(name), "--shots", shots, "--output", output)
    assert code == 0, err
    results = json.loads(output.read_text("utf-8"))
    assert out == (tmp_path / "r.md").read_text("utf-8") and out.startswith(f"# {name}\n")
    assert results["task"] == name and results["examples"] == results["examples_in_files"] == len(records(tmp_path / "r.jsonl")) > 1
    assert results["examples_cut"] < results["examples"] or name in ("cmrc2018", "drcd", "dureader", "pd_cft", "iflytek", "csl")
    for row in results["figures"]:
        low, high = row["interval"]
        assert low <= row["value"] <= high and "random" in row and "majority" in row
    before = (tmp_path / "r.jsonl").read_bytes()
    assert run("--model", weights, "--task", name, "--data", data(name), "--shots", shots, "--output", output)[0] == 0
    assert (tmp_path / "r.jsonl").read_bytes() == before  # nothing was left to do


def on_a_rank(arguments: list[str]) -> None:
    code, _, err = run(*arguments)
    assert code == 0, err


@pytest.mark.parametrize("name", ["c3", "webqa"])
def test_four_processes_make_the_records_of_one(name: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two copies of the model on two processes each; of three examples one copy has two."""
    arguments = ["--model", str(weights), "--task", name, "--data", str(data(name)), "--shots", "1"]
    assert run(*arguments, "--output", tmp_path / "one.json")[0] == 0
    run_distributed(on_a_rank, 4, [*arguments, "--tensor-parallel", "2", "--output", str(tmp_path / "four.json")])
    one, four = records(tmp_path / "one.jsonl"), records(tmp_path / "four.jsonl")
    assert len(one) == len(four)
    for alone, split in zip(one, four, strict=True):
        assert alone.pop("losses", []) == pytest.approx(split.pop("losses", []), abs=1e-4)
        assert alone == split


def test_sampling_does_not_depend_on_the_batch(weights: Path, tmp_path: Path) -> None:
    arguments = ["--model", weights, "--task", "cmrc2018", "--data", DATA / "cmrc2018"]
    assert run(*arguments, "--output", tmp_path / "all.json")[0] == 0
    assert run(*arguments, "--limit", 1, "--output", tmp_path / "one.json")[0] == 0
    assert records(tmp_path / "one.jsonl") == records(tmp_path / "all.jsonl")[:1]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--task", "cmrc2018", "--data", DATA / "c3/d-dev.json"], "d-dev.json"),
        (["--task", "cmrc2018", "--data", DATA / "c3"], "none of cmrc2018_dev.json, dev.json is in it"),
        (["--task", "cmrc2018", "--data", "nowhere"], "nowhere: not found"),
        (["--task", "perplexity", "--data", DATA / "cmrc2018/cmrc2018_dev.json"], ".txt or .jsonl expected"),
        (["--task", "wplc", "--data", DATA / "wplc", "--shots", 2], "wplc has no training examples"),
        (["--task", "c3", "--data", DATA / "c3", "--shots", -1], "--shots -1: expected 0 or more"),
        (["--task", "c3", "--data", DATA / "c3", "--limit", 0], "--limit 0: expected 1 or more"),
        (["--task", "c3", "--data", DATA / "c3", "--tensor-parallel", 3], "3 processes do not divide the 4 attention heads"),
        (["--task", "c3", "--data", DATA / "c3", "--tensor-parallel", 2], "1 processes cannot be arranged"),
        (["--task", "c3", "--data", DATA / "c3", "--model", DATA / "c3"], "no known format"),
        (["--task", "c3", "--data", DATA / "c3", "--output", "results.txt"], "a name that ends in .json expected"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(arguments: list[Any], line: str, weights: Path, tmp_path: Path) -> None:
    code, out, err = run("--model", weights, "--output", tmp_path / "r.json", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and line in err
    assert list(tmp_path.iterdir()) == []


def test_another_runs_records_are_refused(weights: Path, tmp_path: Path) -> None:
    arguments = ["--model", weights, "--task", "afqmc", "--data", DATA / "afqmc", "--output", tmp_path / "r.json"]
    assert run(*arguments)[0] == 0
    code, _, err = run(*arguments, "--score", "full")
    assert code == 2 and "score = 'suffix', now 'full'" in err


def test_weights_that_changed_at_their_place_are_noticed(tmp_path: Path) -> None:
    arguments = ["--model", write_evaluation_model(tmp_path), "--task", "afqmc", "--data", DATA / "afqmc", "--output", tmp_path / "r.json"]
    assert run(*arguments)[0] == 0
    write_evaluation_model(tmp_path)
    code, _, err = run(*arguments)
    assert code == 2 and "another run (weights = " in err


CITIES = dict(
    pair.split()
    for pair in [
        "四川 成都",
        "湖北 武汉",
        "湖南 长沙",
        "江苏 南京",
        "浙江 杭州",
        "安徽 合肥",
        "福建 福州",
        "江西 南昌",
        "山东 济南",
        "河南 郑州",
        "广东 广州",
        "云南 昆明",
    ]
)


STEPS = 150


def write_trained_model(folder: Path) -> Path:
    """A model that has read, for some seconds, which city is which province's capital."""
    sentences = [f"{province}的省会是{city}。" for province, city in CITIES.items()]
    (folder / "corpus.txt").write_text("\n".join(sentences), "utf-8")
    tokenizer = train_tokenizer([folder / "corpus.txt"], 50, folder / "tokenizer")
    config = ModelConfig(
        num_layers=3, hidden_size=48, num_heads=4, vocab_size=50, max_positions=64, hidden_dropout=0.0, attention_dropout=0.0
    )
    model = PanguModel(config, ParallelContext(fill=random_weights(1))).train()
    # A text with its separator in front, and one that is a prompt, which has none: so small a model knows a text by its place.
    rows = [[*front, *tokenizer.encode(sentence)] for sentence in sentences for front in ([config.separator_id], [])]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [config.pad_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1.0] * (len(row) - 1) + [0.0] * (longest - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        loss = model(ids[:, :-1], torch.arange(longest - 1).expand(len(rows), -1), ids[:, 1:], mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    parameters = ((spec, partial(nullcontext, parameter)) for spec, parameter in canonical_parameters(model))
    groups = Groups.from_topology(Topology(tensor=1, pipeline=1, data=1), 0)
    write_weights(folder / "weights", config, groups, parameters, tokenizer=tokenizer.path)
    return folder / "weights"


def test_a_model_scores_far_above_chance_on_what_it_was_trained_on(tmp_path: Path) -> None:
    model = write_trained_model(tmp_path)
    idioms = list(CITIES.values())[:10]
    known = [(province, city) for province, city in CITIES.items() if city in idioms]
    lines = [{"content": [f"{province}的省会是#idiom{number:06}#。"], "candidates": idioms} for number, (province, _) in enumerate(known)]
    (tmp_path / "dev.json").write_text("\n".join(json.dumps(line) for line in lines), "utf-8")
    answers = {f"#idiom{number:06}#": idioms.index(city) for number, (_, city) in enumerate(known)}
    (tmp_path / "dev_answer.json").write_text(json.dumps(answers), "utf-8")
    for score in ("suffix", "full"):
        output = tmp_path / f"{score}.json"
        assert run("--model", model, "--task", "chid", "--data", tmp_path, "--score", score, "--output", output)[0] == 0
        [row] = json.loads(output.read_text("utf-8"))["figures"]
        assert row["value"] >= 0.9 and row["interval"][0] > 4 * row["random"] and row["majority"] <= 0.2
    (tmp_path / "text.txt").write_text("\n\n".join(f"{province}的省会是{city}。" for province, city in known), "utf-8")
    assert run("--model", model, "--task", "perplexity", "--data", tmp_path / "text.txt", "--output", tmp_path / "p.json")[0] == 0
    row = json.loads((tmp_path / "p.json").read_text("utf-8"))["figures"][0]
    assert row["metric"] == "perplexity per token" and row["value"] < 3 < row["random"] == pytest.approx(50)
