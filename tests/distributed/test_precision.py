"""16-bit training: bf16 follows fp32 as far as its digits go; fp16 finds its loss scale and never applies an overflow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import run_distributed
from layouts import random_batches, small_config, start, train


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
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True  # slow on this CPU, not impossible
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
