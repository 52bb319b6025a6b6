"""tools/plan_parallel.py as a user runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLUSTERS = "ds_configs/clusters"


def plan(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/plan_parallel.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_papers_cluster_as_json() -> None:
    done = plan("--model", "200B", "--cluster", f"{CLUSTERS}/ascend910_2048.yaml", "--global-batch-size", "2048", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["devices"] == 2048 and result["precision"] == "fp16" and result["parameters"] > 2e11
    best = result["plans"][0]
    assert best["parallel.tensor"] * best["parallel.pipeline"] * best["data_parallel_size"] == 2048
    assert sum(best["seconds"].values()) == pytest.approx(best["step_seconds"])
    assert best["total_gib"] < 32
    assert {"region", "reason"} == set(result["left_out"][0])


def test_a_plan_becomes_a_recipe_and_the_dry_run_says_the_same(tmp_path: Path) -> None:
    recipe = tmp_path / "sub" / "my.yaml"
    asked = ("--model", "13B", "--cluster", f"{CLUSTERS}/ascend910_2048.yaml", "--devices", "64", "--global-batch-size", "512")
    done = plan(*asked, "--write", recipe, "--json", "--top", "1")
    assert done.returncode == 0, done.stderr
    best = json.loads(done.stdout)["plans"][0]
    command = [sys.executable, "-m", "pangu.train", "--dry-run", "--config", recipe, "--world-size", "64"]
    dry = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert dry.returncode == 0, dry.stderr
    assert f"tensor {best['parallel.tensor']} x pipeline {best['parallel.pipeline']} x data {best['data_parallel_size']}" in dry.stdout
    totals = [float(total) for total in re.findall(r"(\d+\.\d+)\s*(?:│\s*)?$", dry.stdout, re.MULTILINE)]
    assert max(totals) == pytest.approx(best["total_gib"], abs=0.006)


def test_a_plan_is_explained() -> None:
    asked = ("--model", "200B", "--cluster", f"{CLUSTERS}/ascend910_2048.yaml", "--global-batch-size", "2048")
    slower = plan(*asked, "--explain", "parallel.tensor=8", "parallel.recompute=full")
    assert slower.returncode == 0, slower.stderr
    assert re.search(r"takes \d\.\d\d times as long as the best", slower.stdout) and "recompute, seconds" in slower.stdout
    impossible = plan(*asked, "--explain", "parallel.pipeline=16", "parallel.zero_stage=0", "--json")
    verdict = json.loads(impossible.stdout)["explained"]["verdict"]
    assert "does not fit" in verdict and "pangu.train refuses it: parallel.zero_stage = 0" in verdict


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plans.png"
    done = plan("--model", "2.6B", "--cluster", f"{CLUSTERS}/a100_80.yaml", "--devices", "8", "--chart", picture)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--model", "2.7B", "--cluster", f"{CLUSTERS}/h100.yaml"),
            "--model 2.7B: neither 350M, 2.6B, 13B, 200B nor the file of a recipe.",
        ),
        (("--model", "13B", "--cluster", "none.yaml"), "none.yaml: cannot be read"),
        (("--model", "13B", "--cluster", f"{CLUSTERS}/a100_80.yaml", "--devices", "17"), "17 devices do not fill whole servers of 8"),
        (("--model", "200B", "--cluster", f"{CLUSTERS}/h100.yaml", "--devices", "1"), "The smallest cluster of them with a plan has "),
        (("--model", "13B", "--cluster", f"{CLUSTERS}/h100.yaml", "--top", "0"), "--top 0: expected 1 or more."),
        (("--model", "13B", "--cluster", f"{CLUSTERS}/h100.yaml", "--explain", "tensor=2"), "--explain tensor=2: KEY=VALUE is expected"),
        (("--model", "13B", "--cluster", f"{CLUSTERS}/h100.yaml", "--explain", "parallel.tensor=3"), "does not divide num_heads = 40"),
        (("--model", "13B", "--cluster", f"{CLUSTERS}/h100.yaml", "--explain", "parallel.tensor=x"), "a value such as 8 is expected"),
        (("--model", "13B", "--cluster", f"{CLUSTERS}/v100_64.yaml", "train.precision=bf16"), "has no peak_tflops for it"),
        (("--model", "13B", "--cluster", f"{CLUSTERS}/h100.yaml", "--write", "/proc/none.yaml"), "/proc/none.yaml: cannot be written"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], message: str) -> None:
    done = plan(*words)
    assert done.returncode == 2, done.stdout
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
