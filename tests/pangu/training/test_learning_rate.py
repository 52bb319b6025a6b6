"""The learning rate against the original's own curves, and the standard schedule against its definition."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.layouts import small_config

from pangu.training.learning_rate import learning_rate

CURVES = ["tiny_warm2_dec10_cos", "paper_2.6B", "paper_13B", "paper_200B"]


def run(name: str, *, peak: float, low: float, warmup: int, decay: int | None, steps: int = 20) -> Any:
    schedule = {"name": name, "warmup_steps": warmup, "min_lr": low, "decay_steps": decay}
    return small_config(optimizer={"lr": peak}, schedule=schedule, train={"steps": steps})


@pytest.mark.parametrize("curve", CURVES)
def test_original_schedule_is_the_released_codes(curve: str, shared: Path) -> None:
    golden = json.loads((shared / "oracle/A/lr_schedule.json").read_text())[curve]
    of = golden["args"]
    config = run(
        "original",
        peak=of["learning_rate"],
        low=of["end_learning_rate"],
        warmup=of["warmup_steps"],
        decay=of["decay_steps"],
    )
    assert len(golden["steps"]) >= 12
    for step, rate in zip(golden["steps"], golden["lr"], strict=True):
        assert learning_rate(config, step) == pytest.approx(rate, rel=2e-6), step  # the original computes in fp32


def test_original_schedule_of_the_trained_steps(shared: Path) -> None:
    golden = json.loads((shared / "oracle/A/train_clip1.json").read_text())
    of = golden["lr"]
    config = run("original", peak=of["learning_rate"], low=of["end_learning_rate"], warmup=of["warmup_steps"], decay=of["decay_steps"])
    for line in golden["log"]:
        assert learning_rate(config, line["step"]) == pytest.approx(line["lr"], rel=2e-6)


def test_original_schedule_starts_at_zero_and_never_quite_reaches_the_peak() -> None:
    config = run("original", peak=1e-2, low=1e-4, warmup=5, decay=20)
    rates = [learning_rate(config, step) for step in range(25)]
    assert rates[0] == 0.0 and max(rates) < 1e-2
    assert rates[4] == pytest.approx(0.8e-2)  # the last of the warm-up
    assert rates[5] == pytest.approx(1e-4 + 0.99e-2 * (1 + math.cos(math.pi / 4)) / 2)  # the cosine has counted from step 0
    assert rates[20:] == [pytest.approx(1e-4)] * 5


def test_cosine_schedule_reaches_the_peak_and_starts_its_cosine_there() -> None:
    config = run("cosine", peak=1e-2, low=1e-4, warmup=4, decay=20)
    rates = [learning_rate(config, step) for step in range(25)]
    assert rates[:4] == [pytest.approx(1e-2 * part / 4) for part in (1, 2, 3, 4)]
    assert rates[4] == pytest.approx(1e-2)
    assert rates[12] == pytest.approx((1e-2 + 1e-4) / 2)  # half way from step 4 to 20
    assert rates[8] == pytest.approx(1e-4 + 0.99e-2 * (1 + math.sqrt(0.5)) / 2)
    assert rates[20:] == [pytest.approx(1e-4)] * 5
    assert all(later <= earlier for earlier, later in pairwise(rates[4:]))


@pytest.mark.parametrize("name", ["original", "cosine"])
def test_without_warm_up_the_first_step_has_the_highest_rate(name: str) -> None:
    config = run(name, peak=1e-2, low=1e-4, warmup=0, decay=10)
    assert learning_rate(config, 0) == pytest.approx(1e-2)
    assert learning_rate(config, 5) == pytest.approx((1e-2 + 1e-4) / 2)


@pytest.mark.parametrize("name", ["original", "cosine"])
def test_the_decay_lasts_the_whole_run_unless_it_is_said(name: str) -> None:
    config = run(name, peak=1e-2, low=1e-4, warmup=2, decay=None, steps=40)
    assert learning_rate(config, 39) > 1e-4 * 1.0001
    assert learning_rate(config, 40) == pytest.approx(1e-4)


def test_a_run_that_is_all_warm_up_has_a_rate_at_every_step() -> None:
    for name in ("original", "cosine"):
        config = run(name, peak=1e-2, low=1e-4, warmup=30, decay=20)
        rates = [learning_rate(config, step) for step in range(40)]
        assert all(0.0 <= rate <= 1e-2 for rate in rates)
        assert rates[20] == pytest.approx(1e-2 * (20 if name == "original" else 21) / 30)
