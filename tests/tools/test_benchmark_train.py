"""tools/benchmark.py: training steps are measured in turns by processes that wait, and the processes are gone afterwards."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_comparison
import pytest
from helpers.result_form import check_form
from rich.console import Console

from pangu.benchmarks import growth, layouts, train, workers
from pangu.errors import InputError

ROOT = Path(__file__).parents[2]
SHAPE = {"batch": 2, "sequence": 8, "layers": 2, "hidden": 64, "vocab": 50}
STEP = {**SHAPE, "heads": 2, "repeats": 3}


def shown(table: Any) -> str:
    console = Console(width=120, record=True)
    console.print(table)
    return console.export_text()


def test_training_is_measured_in_turns_next_to_gpt2() -> None:
    words = [word for name, value in STEP.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, ROOT / "tools/benchmark.py", "train", "--json", "--threads", "1", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    check_form(result)
    assert result["model"].items() >= {**STEP, "dropout": 0.0, "precision": "fp32", "threads": 1}.items()
    assert list(result["peers"]) == [train.BARE, train.GPT2, train.TUNED]
    assert [result["model"]["allocators"][name] for name in ("ZeRO-0", train.GPT2, train.TUNED)] == ["kept", "default", "tuned"]
    for peer, theirs in result["peers"].items():
        for name in train.OURS:
            own = result["ours"][f"all_tokens_per_second, {name}"]
            ratios = sorted(one / other for one, other in zip(own, theirs["all_tokens_per_second"], strict=True))
            assert len(ratios) == 3 and result["ratios"][peer][f"tokens_per_second, {name}"] == ratios[1]
            peak = result["ours"][f"peak_bytes, {name}"]
            assert result["ratios"][peer][f"peak_bytes, {name}"] == theirs["peak_bytes"] / peak and 50 * 2**20 < peak < 2 * 2**30
    assert f"{result['ratios'][train.GPT2]['tokens_per_second, ZeRO-0']:.2f}x" in shown(train.table(result))


def test_impossible_steps_are_refused() -> None:
    options = {**STEP, "threads": None, "dropout": 0.0}
    for changed in ({"batch": 0}, {"dropout": 1.0}, {"heads": 3}):
        with pytest.raises(InputError, match=f"--{next(iter(changed))} "):
            train.measure(argparse.Namespace(**options | changed))
    for changed in ({"hidden": 65}, {"doublings": 0}):
        with pytest.raises(InputError, match=f"--{next(iter(changed))} "):
            growth.measure(argparse.Namespace(**{**SHAPE, "doublings": 1, "repeats": 1, "threads": 1, "chart": None} | changed))


def test_layouts_are_compared_at_the_same_work() -> None:
    options = {**STEP, "repeats": 1, "cores": 2, "only": ["tensor", "engine"]}
    result = {**layouts.measure(argparse.Namespace(**options)), "device": "a CPU"}
    check_form(result)
    assert set(result["ours"]) == {"step_seconds, engine: ZeRO-0", "step_seconds, engine: ZeRO-1", "step_seconds, tensor: tensor 2"}
    assert result["ratios"]["tensor: one process"].keys() == {"step_seconds, tensor: tensor 2"}
    assert result["ratios"]["engine: bare loop, default allocator"].keys() == {f"step_seconds, engine: ZeRO-{stage}" for stage in (0, 1)}
    assert f"{result['ours']['step_seconds, tensor: tensor 2']:.3f}" in shown(layouts.table(result))


def test_growth_is_compared_with_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without training: steps that take a nanosecond an operation, in processes that need what is expected and a megabyte."""

    def pretended(ways: list[workers.Way], repeats: int) -> dict[str, workers.Course]:
        operations, peak = growth.expect(shapes.pop(0))
        return {ways[0].name: workers.Course([operations * 1e-9] * repeats, [1.0] * repeats, peak + 10**6)}

    shapes = [SHAPE, *({**SHAPE, name: SHAPE[name] * factor} for name in growth.BASE for factor in (2, 4))]
    monkeypatch.setattr(growth, "take_turns", pretended)
    options = argparse.Namespace(**SHAPE, doublings=2, repeats=1, threads=1, chart=tmp_path / "growth.png")
    result = {**growth.measure(options), "device": "a CPU"}
    check_form(result)
    assert list(result["ratios"][growth.PEER].values()) == pytest.approx([1.0] * 20)
    assert growth.exponent(result, "batch 8", result["ours"]) == pytest.approx(1.0)
    assert 1.0 < growth.exponent(result, "sequence 32", result["ours"]) < 2.0
    assert "sequence 32" in shown(growth.table(result)) and options.chart.stat().st_size > 1000
    options.chart = tmp_path / "growth.nothing"
    with pytest.raises(InputError, match=r"growth\.nothing: cannot be written"):
        growth.draw(result, options.chart)


def test_a_process_that_ends_is_told_and_none_is_left(capfd: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(**STEP, dropout=0.0, precision="fp32", compile=False)
    way = workers.Way("sound", train.settings(options, 0), "bare")
    with workers.started(way) as processes:
        course = workers.Course()
        assert workers.step("sound", processes, course) > 0 and course.peak_bytes > 50 * 2**20
    assert processes[0].returncode is not None
    broken = dataclasses.replace(way, config={**way.config, "model": {**way.config["model"], "num_heads": 3}})
    with pytest.raises(InputError, match="a process of 'sound' ended"):
        workers.take_turns([broken], 1)
    assert "num_heads" in capfd.readouterr().err
    with pytest.raises(AssertionError, match="not the same work"):
        workers.same_work({"a": workers.Course(losses=[1.0]), "b": workers.Course(losses=[1.1])}, ["a", "b"])
    assert not any(Path(f"/proc/{process.pid}").exists() for process in processes)


def test_the_gpu_comparison_goes_on_without_a_peer_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretended(ways: list[workers.Way], repeats: int) -> dict[str, workers.Course]:
        if ways[0].program == failing:
            raise InputError("no memory")
        return {ways[0].name: workers.Course([0.5] * repeats, [1.0] * repeats, 10**6)}

    monkeypatch.setattr(workers, "take_turns", pretended)
    monkeypatch.setattr(gpu_comparison, "OPTIONAL", {"torch": "torch"})
    options = argparse.Namespace(**{**gpu_comparison.COMMON, **gpu_comparison.SHAPES["350M"]}, repeats=2, compile=False)
    failing = "megatron"
    result = gpu_comparison.compare(options)
    check_form(result)
    assert result["failed"] == [gpu_comparison.MEGATRON] and gpu_comparison.MEGATRON not in result["peers"]
    assert result["ratios"][train.GPT2]["tokens_per_second, ZeRO-1"] == 1.0 and train.GPT2 in shown(train.table(result))
    failing = "engine"
    with pytest.raises(InputError, match="no memory"):
        gpu_comparison.compare(options)


def test_the_gpu_comparison_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_comparison.py", "--output", str(tmp_path / "gpu.json")])
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(gpu_comparison, "PEERS", {"no_such.package": "no-such"})
        gpu_comparison.main()
    assert "error: not installed: no-such. Run pip install no-such" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_comparison.main()
    assert "no GPU or NPU was found" in capsys.readouterr().err
