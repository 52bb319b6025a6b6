"""Compiled layers train as others do."""

from __future__ import annotations

import os
from typing import Any

import pytest
from helpers.harness import run_distributed
from helpers.layouts import small_config, train

from pangu.config import Config

STEPS = 6
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {"zero_stage": 0}),
    "tensor 2": (2, {"tensor": 2}),
    "tensor 2, sequence parallel": (2, {"tensor": 2, "sequence": True}),
    "pipeline 2": (2, {"pipeline": 2}),
    "data 2, ZeRO-3": (2, {"zero_stage": 3}),
    "selective recompute": (1, {"recompute": "selective"}),
    "full recompute, tensor 2": (2, {"tensor": 2, "recompute": "full"}),
}


def train_compiled(config: Config) -> tuple[list[tuple[float, float]], int]:
    """(loss, gradient norm) of each step, and how many graphs were compiled."""
    del os.environ["TORCHDYNAMO_DISABLE"]  # the tests' environment switches it off
    import torch._dynamo.utils

    torch._dynamo.config.disable = False
    results = train(config, STEPS)
    return results, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def reference() -> list[tuple[float, float]]:
    """One process, nothing compiled."""
    return run_distributed(train, 1, small_config(parallel={"zero_stage": 0}), STEPS)[0]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_layers_follow_the_others(layout: str, reference: list[tuple[float, float]]) -> None:
    world_size, parallel = LAYOUTS[layout]
    config = small_config(parallel=parallel, train={"compile": True})
    for results, num_graphs in run_distributed(train_compiled, world_size, config, timeout=300.0):
        assert num_graphs > 0
        for step, ((loss, norm), (expected_loss, expected_norm)) in enumerate(zip(results, reference, strict=True)):
            assert abs(loss - expected_loss) < 1e-5, step
            assert abs(norm - expected_norm) < 2e-5 * expected_norm, step


@pytest.mark.slow
def test_recomputed_layers_drop_the_same_when_compiled() -> None:
    """Each tensor rank drops on its own. Were other masks drawn again, the gradients would be others, and so the next losses."""

    def losses(recompute: str) -> list[float]:
        config = small_config(
            model={"hidden_dropout": 0.1, "attention_dropout": 0.1},
            parallel={"tensor": 2, "sequence": True, "recompute": recompute},
            train={"compile": True},
        )
        (first, _), (second, _) = run_distributed(train_compiled, 2, config, timeout=300.0)
        assert first == second
        return [loss for loss, _ in first]

    assert losses("full") == pytest.approx(losses("none"), abs=1e-5)
