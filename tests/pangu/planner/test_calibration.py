"""Calibration as users start it, on two processes; and what its numbers must be like, whatever the machine."""

from pathlib import Path

import pytest
from test_validation import plan_parallel

from pangu.planner.profile import load_profile

CLUSTER = Path(__file__).parents[3] / "ds_configs" / "clusters" / "cpu_gloo.yaml"


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
