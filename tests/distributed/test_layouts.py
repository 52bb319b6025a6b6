"""Every layout follows the single-process run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.harness import run_distributed
from helpers.layouts import small_config, train

LOSS_TOLERANCE = 5e-6
NORM_TOLERANCE = 1e-5  # relative

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2": (2, {"tensor": 2}),
    "tensor 2, no ZeRO": (2, {"tensor": 2, "zero_stage": 0}),
    "tensor 4": (4, {"tensor": 4}),
    "tensor 2, sequence parallel": (2, {"tensor": 2, "sequence": True}),
    "pipeline 2": (2, {"pipeline": 2}),
    "pipeline 4": (4, {"pipeline": 4}),
    "data 2, ZeRO-0": (2, {"zero_stage": 0}),
    "data 2, ZeRO-1": (2, {"zero_stage": 1}),
    "data 2, ZeRO-2": (2, {"zero_stage": 2}),
    "data 2, ZeRO-3": (2, {"zero_stage": 3}),
    "tensor 2 x data 2, ZeRO-3": (4, {"tensor": 2, "zero_stage": 3}),
    "tensor 2 x pipeline 2": (4, {"tensor": 2, "pipeline": 2}),
    "tensor 2 x pipeline 2, sequence parallel": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "tensor 2 x pipeline 2 x data 2": (8, {"tensor": 2, "pipeline": 2}),
    "tensor 2 x pipeline 2 x data 2, stages nearer": (8, {"tensor": 2, "pipeline": 2, "order": "tp-pp-dp"}),
    "pipeline 3, uneven": (3, {"pipeline": 3, "stage_layers": [1, 1, 2]}),
    "selective recompute": (1, {"recompute": "selective"}),
    "full recompute": (1, {"recompute": "full"}),
    "full recompute, tensor 2 x pipeline 2": (4, {"tensor": 2, "pipeline": 2, "recompute": "full"}),
    "full recompute, data 2, ZeRO-3": (2, {"zero_stage": 3, "recompute": "full"}),
}


@pytest.fixture(scope="module")
def reference() -> list[tuple[float, float]]:
    """One process, no ZeRO, no recompute."""
    return run_distributed(train, 1, small_config(parallel={"zero_stage": 0}))[0]


RECIPES = Path(__file__).parents[2] / "ds_configs"


@pytest.mark.parametrize(
    ("recipe", "zero_stage"),
    [
        ("zero1.json", 1),
        ("zero2.json", 2),
        ("zero3.json", 3),
        ("zero1-offload.json", 1),
        ("zero2-offload.json", 2),
        ("zero3-offload.json", 3),
    ],
)
def test_deepspeed_recipes_follow_the_single_process_run(recipe: str, zero_stage: int, reference: list[tuple[float, float]]) -> None:
    config = small_config(parallel={"zero_stage": zero_stage}).model_copy(update={"deepspeed": RECIPES / recipe})
    for results in run_distributed(train, 2, config):
        for (loss, norm), (expected_loss, expected_norm) in zip(results, reference, strict=True):
            assert abs(loss - expected_loss) < LOSS_TOLERANCE
            assert abs(norm - expected_norm) < NORM_TOLERANCE * expected_norm


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_follows_the_single_process_run(layout: str, reference: list[tuple[float, float]]) -> None:
    world_size, parallel = LAYOUTS[layout]
    for results in run_distributed(train, world_size, small_config(parallel=parallel)):
        for step, ((loss, norm), (expected_loss, expected_norm)) in enumerate(zip(results, reference, strict=True)):
            assert abs(loss - expected_loss) < LOSS_TOLERANCE, step
            assert abs(norm - expected_norm) < NORM_TOLERANCE * expected_norm, step


def test_gradients_larger_than_the_bucket_follow_too(tmp_path: Path, reference: list[tuple[float, float]]) -> None:
    """Each is then reduced by itself while the backward pass goes on."""
    json = tmp_path / "small.json"
    json.write_text('{"zero_optimization": {"stage": 1, "overlap_comm": true, "reduce_bucket_size": 500}}', encoding="utf-8")
    config = small_config(parallel={"zero_stage": 1}).model_copy(update={"deepspeed": json})
    for results in run_distributed(train, 2, config):
        for (loss, norm), (expected_loss, expected_norm) in zip(results, reference, strict=True):
            assert abs(loss - expected_loss) < LOSS_TOLERANCE
            assert abs(norm - expected_norm) < NORM_TOLERANCE * expected_norm
