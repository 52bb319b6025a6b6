"""`pangu.train` as users start it: alone, under torchrun, under deepspeed; interrupted; and given what it must refuse."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_run import figures, values, write_recipe

from pangu.config import load_config
from pangu.conversion import huggingface
from pangu.conversion.weights import Overrides
from pangu.data.indexed import IndexedDataset
from pangu.train import main as train_program
from pangu.training.checkpoint import finished_step

BIN = Path(sys.executable).parent
PYTHON = [sys.executable, "-m", "pangu.train"]
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node"]
QUIET_DEEPSPEED = [str(BIN / "deepspeed"), "--log_level", "warning"]
TIMEOUT = 180


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny recipe over a data set of random documents."""
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def launch(command: list[str], recipe: Path, run_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    words = [*command, "--config", str(recipe), f"run.dir={run_dir}", *overrides]
    return subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"})


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    opened = huggingface.read(run_dir / "weights", Overrides())
    return {name: tensor.read() for name, tensor in opened.tensors.items()}


@pytest.fixture(scope="module")
def alone(recipe: Path) -> Path:
    """The run directory of one process."""
    run_dir = recipe.parent / "alone"
    result = launch(PYTHON, recipe, run_dir)
    assert result.returncode == 0, result.stderr
    assert "parameters: " in result.stdout
    assert "layout: 1 processes" in result.stdout
    assert max(map(len, result.stdout.splitlines()[:4])) <= 80 and "num_layers:" not in result.stdout
    return run_dir


def test_one_process_writes_what_is_promised(alone: Path) -> None:
    lines = [line for line in figures(alone) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    expected = {"step", "loss", "grad_norm", "learning_rate", "consumed_samples", "consumed_tokens", "step_seconds", "tokens_per_second"}
    assert expected <= lines[-1].keys()
    assert "seconds_left" not in lines[0] and lines[1]["seconds_left"] > lines[-1]["seconds_left"] == 0.0
    assert lines[-1]["peak_memory_bytes"] >= lines[0]["peak_memory_bytes"] > 2**25
    assert lines[-1]["consumed_samples"] == 48
    assert lines[-1]["consumed_tokens"] == 48 * 16
    held_out = 20  # of 200 documents
    tokens = IndexedDataset(alone.parent / "corpus").sizes[:-held_out].sum()
    assert lines[-1]["consumed_epochs"] == pytest.approx(48 * 16 / tokens)
    assert len(values(alone, "validation_perplexity")) == 2
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "weights"} <= {path.name for path in alone.iterdir()}


@pytest.mark.parametrize(
    ("command", "overrides"),
    [
        ([*TORCHRUN, "4", "-m", "pangu.train"], ["parallel.tensor=2", "parallel.pipeline=2"]),
        ([*QUIET_DEEPSPEED, "--num_gpus", "2", "--master_port", "29713", "--module", "pangu.train"], ["parallel.zero_stage=2"]),
        ([str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "29714", "pangu/train.py"], ["parallel.zero_stage=3"]),
    ],
    ids=["torchrun", "deepspeed module", "deepspeed file"],
)
def test_launchers_give_the_numbers_of_one_process(
    recipe: Path, alone: Path, command: list[str], overrides: list[str], tmp_path: Path
) -> None:
    result = launch(command, recipe, tmp_path / "run", *overrides)
    assert result.returncode == 0, result.stderr
    if "warning" in command:
        assert "[INFO]" not in result.stdout + result.stderr
    for key in ("loss", "validation_loss"):
        assert np.abs(np.subtract(values(tmp_path / "run", key), values(alone, key))).max() < 5e-6
    expected = weights(alone)
    for name, tensor in weights(tmp_path / "run").items():
        if not name.endswith("k_proj.bias"):  # its gradient is rounding noise, which Adam turns into whole steps
            assert (tensor - expected[name]).abs().max() < 1e-4, name


def test_interrupted_run_saves_and_goes_on_bit_for_bit(recipe: Path, tmp_path: Path) -> None:
    dropout = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1", "train.steps=30", "train.eval_every=0", "parallel.tensor=2"]
    command = [*TORCHRUN, "2", "-m", "pangu.train"]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert launch(command, recipe, unbroken, *dropout).returncode == 0
    process = subprocess.Popen(
        [*command, "--config", str(recipe), f"run.dir={broken}", *dropout], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + TIMEOUT
    while not ((broken / "metrics.jsonl").exists() and len((broken / "metrics.jsonl").read_text().splitlines()) > 5):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert "SIGTERM: saved at step" in output
    assert 5 < len(values(broken, "loss")) < 30
    again = launch(command, recipe, broken, *dropout)
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stdout
    assert values(broken, "loss") == values(unbroken, "loss")
    assert values(broken, "step") == list(range(1, 31))
    expected = weights(unbroken)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(broken).items())


def test_a_complete_run_says_so_and_does_nothing(recipe: Path, alone: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(alone, run_dir)  # keeps the times of the files

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}

    before = contents()
    again = launch([*TORCHRUN, "2", "-m", "pangu.train"], recipe, run_dir, "train.profile=2:4", "parallel.tensor=2")
    assert again.returncode == 0, again.stderr
    (line,) = again.stdout.splitlines()
    assert line.startswith(f"complete: 6 of 6 steps are done, weights in {run_dir / 'weights'}.")
    assert line.endswith("train.profile = 2:4: nothing is recorded.")
    assert contents() == before

    shutil.rmtree(run_dir / "weights")  # as if it had been ended before it could write them
    again = launch(PYTHON, recipe, run_dir, "train.profile=2:4")
    assert again.returncode == 0 and f"trained 6 steps, 768 tokens; weights in {run_dir / 'weights'}\n" in again.stdout
    assert "train.profile = 2:4: these steps are done, so nothing is recorded." in again.stdout
    assert all(torch.equal(tensor, weights(alone)[name]) for name, tensor in weights(run_dir).items())


@pytest.mark.parametrize(
    ("overrides", "finished"),
    [([], 6), (["train.steps=5"], 6), (["train.steps=7"], None), (["checkpoint.resume=never"], None), (["model.gelu=erf"], None)],
    ids=str,
)
def test_when_a_run_is_complete(recipe: Path, alone: Path, overrides: list[str], finished: int | None) -> None:
    assert finished_step(load_config(recipe, [f"run.dir={alone}", *overrides])) == finished


def test_weights_that_are_older_than_the_last_checkpoint_do_not_make_a_run_complete(recipe: Path, alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone, tmp_path / "run")
    os.utime(tmp_path / "run/weights/config.json", (0, 0))
    assert finished_step(load_config(recipe, [f"run.dir={tmp_path / 'run'}"])) is None


def test_a_new_run_starts_from_weights(recipe: Path, alone: Path, tmp_path: Path) -> None:
    standing_still = ["optimizer.lr=1e-12", "schedule.min_lr=0", "train.steps=1", "train.eval_every=1"]
    result = launch(PYTHON, recipe, tmp_path / "run", f"checkpoint.init_from={alone / 'weights'}", *standing_still)
    assert result.returncode == 0, result.stderr
    assert values(tmp_path / "run", "validation_loss")[0] == values(alone, "validation_loss")[-1]
    expected = weights(alone)
    assert all(torch.allclose(tensor, expected[name], atol=1e-7) for name, tensor in weights(tmp_path / "run").items())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.stepz=3"], "unknown key train.stepz"),
        (["--tensor-model-parallel-size=2"], "--tensor-model-parallel-size: unknown option"),
        (["--learning-rate", "1e-4"], "Nearest: optimizer.lr."),
        (["parallel.tensor=3"], "parallel.tensor = 3 does not divide"),
        (["parallel.pipeline=2"], "1 processes cannot be arranged"),
        (["parallel.pipeline=2", "parallel.zero_stage=2"], "does not work with parallel.pipeline"),
        (["train.micro_batch_size=3"], "train.global_batch_size = 8 is not a multiple"),
        (["data.train=missing"], "missing.idx"),
        (["model.vocab_size=40"], "at most model.vocab_size = 40 expected"),
        (["data.tokenizer=missing"], "missing"),
        (["train.precision=fp16"], "CPU does not train in it"),
        (["checkpoint.init_from=missing"], "missing"),
        (["checkpoint.init_from=ALONE", "model.hidden_size=64"], "its hidden_size is 32, but model.hidden_size = 64"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_one_line(
    recipe: Path,
    alone: Path,
    overrides: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = [override.replace("ALONE", str(alone / "weights")) for override in overrides]
    monkeypatch.setattr(sys, "argv", ["pangu.train", "--config", str(recipe), f"run.dir={tmp_path / 'run'}", *overrides])
    with pytest.raises(SystemExit) as refusal:
        train_program()
    assert refusal.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and expected in errors[0]
    assert not (tmp_path / "run").exists()


def test_refusal_ends_a_launched_program_with_code_2(recipe: Path, tmp_path: Path) -> None:
    result = launch(PYTHON, recipe, tmp_path / "run", "checkpoint.resume=missing")
    assert result.returncode == 2
    assert result.stderr.startswith("error: checkpoint.resume = missing: it has no readable manifest.json")


def test_the_resolved_configuration_is_printed_and_nothing_started(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", str(recipe), f"run.dir={tmp_path / 'run'}", "train.steps=9", "--print-config"]
    monkeypatch.setattr(sys, "argv", ["pangu.train", *words])
    train_program()
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(recipe, words[2:4])
    assert not (tmp_path / "run").exists()


def test_dry_run_of_the_200b_plan(recipe: Path) -> None:
    root = Path(__file__).parents[2]
    command = [*PYTHON, "--dry-run", "--config", str(root / "ds_configs/200B.yaml"), "--world-size", "2048"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "2048 processes = tensor 8 x pipeline 16 x data 16, ZeRO-1" in result.stdout
    assert "206,861,008,896" in result.stdout
    stages = [line.split() for line in result.stdout.splitlines() if line.split() and line.split()[0].isdigit()]
    assert [stage[1] for stage in stages] == ["4"] * 16
