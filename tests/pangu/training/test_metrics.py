"""metrics.jsonl: one whole line a step, through interruptions and resumption."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.layouts import small_config

from pangu.config import Config
from pangu.training.metrics import HEADING_EVERY, Metrics, peak_memory_bytes


def run_in(directory: Path, **run: Any) -> Config:
    return small_config(run={"dir": str(directory), "tensorboard": False, **run})


def figures(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 10.0 / step,
        "grad_norm": 0.5,
        "learning_rate": 1e-4,
        "consumed_samples": 8 * step,
        "consumed_tokens": 128 * step,
        "step_seconds": 0.25,
        "tokens_per_second": 512.0,
        "mfu": None,
        "loss_scale": None,
        "skipped": None,
        **changes,
    }


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def record(directory: Path, steps: range, **run: Any) -> None:
    metrics = Metrics(run_in(directory, **run), steps.start - 1)
    for step in steps:
        metrics.step(figures(step))
    metrics.close()


def test_a_step_is_a_line_of_what_is_known(tmp_path: Path) -> None:
    record(tmp_path / "run", range(1, 4))
    known = {key: value for key, value in figures(2).items() if value is not None}
    assert lines(tmp_path / "run")[1] == known
    assert "mfu" not in known and set(known) >= {"step", "loss", "grad_norm", "learning_rate", "consumed_samples", "consumed_tokens"}
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3]


def test_every_step_is_in_the_file_at_once(tmp_path: Path) -> None:
    metrics = Metrics(run_in(tmp_path), 0)
    for step in (1, 2):
        metrics.step(figures(step))
        assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
        assert lines(tmp_path)[-1]["step"] == step
    metrics.close()


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    record(tmp_path, range(1, 4))
    record(tmp_path, range(3, 6))  # resumed from step 2: step 3 is done again, and its last line counts
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 3, 4, 5]


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_line_that_a_kill_cut_does_not_swallow_the_next(kept: int, tmp_path: Path) -> None:
    record(tmp_path, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_text().splitlines(keepends=True)
    path.write_text(first + second[:kept])
    record(tmp_path, range(2, 4))
    text = path.read_text().splitlines()
    assert text[0] == first.strip() and text[1] == second[:kept]
    assert [json.loads(line)["step"] for line in text[2:]] == [2, 3]


def test_fp16_figures_are_kept(tmp_path: Path) -> None:
    metrics = Metrics(run_in(tmp_path), 0)
    metrics.step(figures(1, grad_norm=None, loss_scale=4096.0, skipped=True))
    metrics.close()
    (line,) = lines(tmp_path)
    assert line["loss_scale"] == 4096.0 and line["skipped"] is True and "grad_norm" not in line


def test_an_evaluation_is_a_line_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(run_in(tmp_path), 0)
    metrics.evaluation({"step": 4, "validation_loss": 2.0, "validation_perplexity": math.exp(2.0)})
    metrics.close()
    assert lines(tmp_path) == [{"step": 4, "validation_loss": 2.0, "validation_perplexity": math.exp(2.0)}]
    assert "validation loss 2.0000  perplexity 7.39" in capsys.readouterr().out


def test_the_screen_gets_the_first_every_nth_and_the_last_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, range(1, 21), log_every=8)
    heading, *shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert heading == "step" and shown == ["1/20", "8/20", "16/20", "20/20"]
    assert len(lines(tmp_path)) == 20
    record(tmp_path, range(11, 13), log_every=8)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["step", "11/20"]  # the first after a resumption


def test_the_heading_is_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, range(1, HEADING_EVERY + 2))
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert [number for number, word in enumerate(shown) if word == "step"] == [0, HEADING_EVERY + 1]


def test_a_line_on_the_screen_has_its_figures_under_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(run_in(tmp_path, log_every=4), 0)
    known = {"seconds_left": 7500.0, "peak_memory_bytes": 3 * 2**29, "consumed_epochs": 0.0123}
    metrics.step(figures(1))
    metrics.step(figures(4, mfu=0.4321, tokens_per_second=12345.6, loss_scale=65536.0, **known))
    metrics.close()
    assert capsys.readouterr().out.splitlines() == [
        "step     loss      lr  norm  tokens/s   left   memory epochs",
        "1/20  10.0000 1.0e-04   0.5       512      -        -      -",
        "4/20   2.5000 1.0e-04   0.5    12,346  2h05m  1.5 GiB 0.0123 43.2%  2^16",
    ]


def test_a_line_on_the_screen_is_80_columns_wide_in_the_longest_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(run={"dir": str(tmp_path), "tensorboard": False}, train={"steps": 999_999})
    metrics = Metrics(config, 999_998)
    large = {"seconds_left": 99.9 * 86400, "peak_memory_bytes": 139.9 * 2**30, "consumed_epochs": 123.456, "mfu": 0.4321}
    metrics.step(figures(999_999, loss=12.34567, grad_norm=1234.5, tokens_per_second=9_999_999.0, loss_scale=2.0**32, **large))
    metrics.close()
    assert [len(line) for line in capsys.readouterr().out.splitlines()] == [80, 80]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0:00"), (59.9, "0:59"), (3599.0, "59:59"), (3600.0, "1h00m"), (90000.0, "1d01h"), (1e7, "115d17h")]
)
def test_a_time_that_is_left(seconds: float, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(run_in(tmp_path), 0)
    metrics.step(figures(1, seconds_left=seconds))
    metrics.close()
    assert capsys.readouterr().out.splitlines()[-1].split()[5] == text


def test_the_peak_of_memory_is_this_processs_own() -> None:
    before = peak_memory_bytes()
    ballast = np.ones(2**26, np.int8)
    after = peak_memory_bytes()
    assert before is not None and after is not None and 2**25 < before <= after < 2**36
    del ballast
    assert (peak_memory_bytes() or 0) > after - 2**20  # the kernel counts pages roughly, but it has not forgotten 64 MiB


def test_tensorboard_holds_the_same_figures(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    record(tmp_path, range(1, 4), tensorboard=True)
    record(tmp_path, range(3, 5), tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert losses == {step: pytest.approx(10.0 / step) for step in range(1, 5)}
    assert "consumed_samples" not in events.Tags()["scalars"]
