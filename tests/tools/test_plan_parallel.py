"""`plan_parallel.py` as users start it."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from helpers.published_runs import table

from pangu.config import load_config
from pangu.config.layout import resolve
from pangu.planner.hardware import load_cluster
from pangu.planner.memory import CPU
from pangu.planner.plan import workload_of
from pangu.planner.profile import Profile, load_profile
from pangu.planner.search import Search
from pangu.training.overview import stage_reports

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "ds_configs" / "clusters"
CLUSTER = CLUSTERS / "cpu_gloo.yaml"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def plan_parallel(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["plan_parallel.py", *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / "tools" / "plan_parallel.py"), run_name="__main__")
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def test_validate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "runs.csv"
    shorter = {"id": "three", "pp": "6", "dp": "8"}
    file.write_text(table({}, {"id": "two", "micro_batch": "1", "iter_s": "143.31"}, shorter, {"id": "[/x]", "seq": ""}), encoding="utf-8")
    profile = tmp_path / "profile.yaml"
    assert plan_parallel(monkeypatch, "validate", "--fit", file, "--runs", file, "--output", profile, "--json") == 0
    printed = capsys.readouterr()
    rows = json.loads(printed.out)
    assert [sorted(row) for row in rows] == [["feasible", "id", "measured_iter_s", "predicted_iter_s"]] * 4
    assert [row["id"] for row in rows] == ["one", "two", "three", "[/x]"]
    assert rows[0]["predicted_iter_s"] == pytest.approx(123.69, rel=0.1)
    assert rows[0]["feasible"] is True
    assert rows[3] == {"id": "[/x]", "feasible": None, "predicted_iter_s": None, "measured_iter_s": None}
    assert "[/x]: seq is empty (not predicted)" in printed.err
    assert plan_parallel(monkeypatch, "validate", "--profile", profile, "--runs", file) == 0
    assert "pairs of one family and day are in order" in capsys.readouterr().out


def test_validate_reads_the_runs_that_ship(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_parallel(monkeypatch, "validate") == 0
    assert "of 69 runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calibrate", "--output", "/nowhere/p.yaml"], "there is no folder /nowhere"),
        (["validate", "--runs", "nowhere.csv", "--fit", "nowhere.csv"], "nowhere.csv: cannot be read"),
        (["validate", "--cross", "--runs", "nowhere.csv"], "--cross predicts runs of the file that is fitted"),
        (["validate", "--runs", "nowhere.csv"], "nowhere.csv: cannot be read"),
    ],
)
def test_refused_options(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_parallel(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("trains", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_measure_this_machine(trains: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not trains:
        monkeypatch.setattr("pangu.calibration.calibrate_command.measure_training", lambda profile, *_: profile)
    output = tmp_path / "profile.yaml"
    assert plan_parallel(monkeypatch, "calibrate", "--output", output, "--processes", "2", "--seconds", "1") == 0
    profile = load_profile(output)
    assert len(profile.engines) == (5 if trains else 0)
    assert profile.sharing >= 1.0
    assert len(profile.matmuls) >= 3
    assert all(1e-4 < product.tflops < 100 for product in profile.matmuls)
    [link] = profile.links
    assert (link.level, link.ranks) == ("server", 2)
    assert 0.001 < link.bandwidth < 1000
    assert 0.1 < link.latency_us < 1e6


def test_what_the_processes_refuse_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(CLUSTER.read_text(encoding="utf-8").replace("levels:", "layers:"), encoding="utf-8")
    arguments = ["calibrate", "--cluster", cluster, "--output", tmp_path / "p.yaml"]
    assert plan_parallel(monkeypatch, *arguments) == 2
    assert "unknown key layers" in capsys.readouterr().err
    assert plan_parallel(monkeypatch, *arguments, "--processes", "0") == 2
    assert "--processes must be 1 or more" in capsys.readouterr().err


def test_plans_are_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--model", ROOT / "ds_configs" / "quickstart.yaml", "--global-batch-size", "4", "model.num_layers=2")
    assert plan_parallel(monkeypatch, "measure", *model, "--processes", "2", "--plans", "2", "--steps", "1", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert len({row["plan"] for row in result["plans"]}) == 2
    assert all(0 < row[key] < 60 for row in result["plans"] for key in ("predicted_step_seconds", "measured_step_seconds"))
    assert abs(result["rank_correlation"]) == pytest.approx(1.0)
    assert plan_parallel(monkeypatch, "measure", *model, "--plans", "1") == 2
    assert "expected 2 or more plans" in capsys.readouterr().err


def test_measured_plans_differ() -> None:
    from pangu.calibration.measure_command import rank_correlation, spread

    workload, cluster = workload_of(load_config(ROOT / "ds_configs" / "quickstart.yaml")), load_cluster(CLUSTER)
    candidates = Search(workload, cluster, Profile(), CPU).run().candidates
    plans = [one.plan for one in spread(candidates, 10)]
    assert plans[0] == candidates[0].plan
    assert {plan.layout.tensor for plan in plans} == {plan.layout.pipeline for plan in plans} == {1, 2, 4}
    assert len({plan.zero_stage for plan in plans}) >= 3
    assert len({plan.recompute for plan in plans}) == len({plan.sequence_parallel for plan in plans}) == 2
    assert rank_correlation([1, 2, 3, 4], [10, 20, 15, 99]) == pytest.approx(0.8)


def planned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What a search prints."""
    assert plan_parallel(monkeypatch, *arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


PAPER = ("--model", "200B", "--cluster", CLUSTERS / "ascend910_2048.yaml", "--global-batch-size", "2048")


def test_the_papers_cluster_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(planned(monkeypatch, capsys, *PAPER, "--json"))
    assert result["devices"] == 2048 and result["precision"] == "fp16" and result["parameters"] > 2e11
    best = result["plans"][0]
    assert best["parallel.tensor"] * best["parallel.pipeline"] * best["data_parallel_size"] == 2048
    assert sum(best["seconds"].values()) == pytest.approx(best["step_seconds"])
    assert best["total_gib"] < 32
    assert set(result["left_out"][0]) == {"region", "reason"}


def test_a_plan_becomes_a_recipe_and_the_dry_run_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "sub" / "my.yaml"
    asked = ("--model", "13B", "--cluster", CLUSTERS / "ascend910_2048.yaml", "--devices", "64", "--global-batch-size", "512")
    best = json.loads(planned(monkeypatch, capsys, *asked, "--write", recipe, "--json", "--top", "1"))["plans"][0]
    config = load_config(recipe)
    reports = stage_reports(config, resolve(config, 64))
    assert max(report.memory.total for report in reports) / 2**30 == best["total_gib"]
    assert reports[best["fullest_stage"]].memory.total == max(report.memory.total for report in reports)
    assert "# predicted: " in recipe.read_text(encoding="utf-8")


def test_a_plan_is_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    slower = planned(monkeypatch, capsys, *PAPER, "--explain", "parallel.tensor=8", "parallel.recompute=full")
    assert re.search(r"takes \d\.\d\d times as long as the best", slower) and "recompute, seconds" in slower
    impossible = planned(monkeypatch, capsys, *PAPER, "--explain", "parallel.pipeline=16", "parallel.zero_stage=0", "--json")
    verdict = json.loads(impossible)["explained"]["verdict"]
    assert "does not fit" in verdict and "pangu.train refuses it: parallel.zero_stage = 0" in verdict


def test_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plans.png"
    planned(monkeypatch, capsys, "--model", "2.6B", "--cluster", CLUSTERS / "a100_80.yaml", "--devices", "8", "--chart", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


H100 = ("--model", "13B", "--cluster", CLUSTERS / "h100.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "2.7B", "--cluster", CLUSTERS / "h100.yaml"), "--model 2.7B: neither 350M, 2.6B, 13B, 200B nor the file of a recipe."),
        (("--model", "13B", "--cluster", "none.yaml"), "none.yaml: cannot be read"),
        (("--model", "13B", "--cluster", CLUSTERS / "a100_80.yaml", "--devices", "17"), "17 devices do not fill whole servers of 8"),
        (("--model", "200B", "--cluster", CLUSTERS / "h100.yaml", "--devices", "1"), "The smallest cluster of them with a plan has "),
        ((*H100, "--top", "0"), "--top 0: expected 1 or more."),
        ((*H100, "--explain", "tensor=2"), "--explain tensor=2: KEY=VALUE is expected"),
        ((*H100, "--explain", "parallel.tensor=3"), "does not divide num_heads = 40"),
        ((*H100, "--explain", "parallel.tensor=x"), "a value such as 8 is expected"),
        (("--model", "13B", "--cluster", CLUSTERS / "v100_64.yaml", "train.precision=bf16"), "has no peak_tflops for it"),
        ((*H100, "--write", "/proc/none.yaml"), "/proc/none.yaml: cannot be written"),
    ],
)
def test_searches_that_are_refused(
    words: tuple[str | Path, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_parallel(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
