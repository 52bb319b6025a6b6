"""`plan_parallel.py` as users start it."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from published_runs import table

from pangu.planner.profile import load_profile

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "ds_configs" / "clusters" / "cpu_gloo.yaml"


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["validate"], "nothing to predict"),
        (["validate", "--cross"], "--cross predicts runs of the file that is fitted"),
        (["validate", "--runs", "nowhere.csv"], "nowhere.csv: cannot be read"),
    ],
)
def test_refused_options(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_parallel(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_two_processes_measure_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "profile.yaml"
    assert plan_parallel(monkeypatch, "calibrate", "--cluster", CLUSTER, "--output", output, "--processes", "2", "--seconds", "1") == 0
    profile = load_profile(output)
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
