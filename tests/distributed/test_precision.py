"""16-bit training: bf16 follows fp32 as far as its digits go; fp16 finds its loss scale and never applies an overflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.harness import run_distributed
from helpers.layouts import allow_fp16, random_batches, small_config, start, train

from pangu.training.checkpoint import Progress, find_checkpoint, load_checkpoint, save_checkpoint


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(1, {}), (4, {"tensor": 2, "pipeline": 2}), (2, {"zero_stage": 2}), (2, {"zero_stage": 3})],
    ids=str,
)
def test_bf16_follows_fp32(world_size: int, parallel: dict[str, Any]) -> None:
    expected = run_distributed(train, 1, small_config(parallel={"zero_stage": 0}), 8)[0]
    results = run_distributed(train, world_size, small_config(parallel=parallel, train={"precision": "bf16"}), 8)
    assert all(result == results[0] for result in results)
    for (loss, norm), (expected_loss, expected_norm) in zip(results[0], expected, strict=True):
        assert abs(loss - expected_loss) < 0.02
        assert abs(norm - expected_norm) < 0.05 * expected_norm


def train_fp16(parallel: dict[str, Any]) -> list[tuple[float, bool, float | None, bool]]:
    """(loss, skipped, loss scale, whether the weights changed) of each step."""
    allow_fp16()
    config = small_config(parallel=parallel, train={"precision": "fp16"}, optimizer={"lr": 1e-3})
    engine = start(config)
    batches = random_batches(config, engine.groups)

    def weights() -> torch.Tensor:
        parts = []
        for parameter in engine.module.parameters():
            with engine.whole(parameter) as whole:
                parts.append(whole.float().flatten().clone())
        return torch.cat(parts)

    results = []
    for _ in range(40):
        before = weights()
        result = engine.train_step(batches, 1e-3)
        results.append((result.loss, result.skipped, result.loss_scale, not torch.equal(before, weights())))
    return results


@pytest.mark.parametrize(("world_size", "parallel"), [(2, {"tensor": 2}), (2, {"pipeline": 2}), (2, {"zero_stage": 3})], ids=str)
def test_fp16_skips_overflows_everywhere_alike(world_size: int, parallel: dict[str, Any]) -> None:
    ranks = run_distributed(train_fp16, world_size, parallel)
    outcomes = [[(skipped, scale, changed) for _, skipped, scale, changed in steps] for steps in ranks]
    assert all(outcome == outcomes[0] for outcome in outcomes)
    skipped = [skipped for skipped, _, _ in outcomes[0]]
    assert skipped[0] and not skipped[-1]  # a loss scale of 2^32 overflows, and is halved until it does not
    assert all(changed != skip for skip, _, changed in outcomes[0])
    scales = [scale for _, scale, _ in outcomes[0]]
    assert scales == sorted(scales, reverse=True) and 1 < scales[-1] < 2**31


def train_fp16_and_save(directory: str, parallel: dict[str, Any], num_steps: int, deepspeed: Path | None = None) -> list[Any]:
    """Resume if there is a checkpoint, train to `num_steps`, save; what each step did, as bits."""
    allow_fp16()
    config = small_config(parallel=parallel, train={"precision": "fp16"}, checkpoint={"dir": directory})
    engine = start(config.model_copy(update={"deepspeed": deepspeed}))
    checkpoint = find_checkpoint(config, engine.groups.world)
    progress = load_checkpoint(engine, checkpoint) if checkpoint else Progress()
    batches = random_batches(config, engine.groups, first_step=progress.step)
    results = []
    while progress.step < num_steps:
        result = engine.train_step(batches, 1e-3)
        progress.step += 1
        results.append((result.loss.hex(), result.grad_norm.hex(), result.skipped, result.overflow, result.loss_scale))
    save_checkpoint(engine, progress)
    return results


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(2, {"pipeline": 2}), (2, {"tensor": 2}), pytest.param(2, {"zero_stage": 3}, marks=pytest.mark.slow)],
    ids=str,
)
def test_fp16_resumes_in_the_midst_of_its_search(world_size: int, parallel: dict[str, Any], tmp_path: Path) -> None:
    unbroken = run_distributed(train_fp16_and_save, world_size, str(tmp_path / "a"), parallel, 24)
    first = run_distributed(train_fp16_and_save, world_size, str(tmp_path / "b"), parallel, 4)
    second = run_distributed(train_fp16_and_save, world_size, str(tmp_path / "b"), parallel, 24)
    assert unbroken == [unbroken[0]] * world_size
    assert [before + after for before, after in zip(first, second, strict=True)] == unbroken
    skipped = [skipped for _, _, skipped, _, _ in unbroken[0]]
    assert all(skipped[:6]) and not skipped[-1]  # the resumed run has overflows and good steps
    assert all(overflow == skipped for _, _, skipped, overflow, _ in unbroken[0])


def test_an_overflow_at_the_lowest_loss_scale_is_a_fault(tmp_path: Path) -> None:
    recipe = tmp_path / "fp16.json"
    recipe.write_text(json.dumps({"fp16": {"initial_scale_power": 32, "min_loss_scale": 2**31, "hysteresis": 1}}))
    for results in run_distributed(train_fp16_and_save, 2, str(tmp_path / "run"), {}, 3, recipe):
        outcomes = [outcome for _, _, *outcome in results]
        assert outcomes == [[True, True, 2.0**31], [True, False, 2.0**31], [True, False, 2.0**31]]
