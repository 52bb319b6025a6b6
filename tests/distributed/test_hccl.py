"""The whole training step on a backend named `hccl` that refuses what HCCL refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from helpers import fake_hccl
from helpers.harness import RankError, run_distributed
from helpers.layouts import allow_fp16, random_batches, small_config, start

from pangu.training.checkpoint import Progress, find_checkpoint, load_checkpoint, save_checkpoint


def train_on_hccl(directory: str, parallel: dict[str, Any], precision: str) -> list[float]:
    """Losses of 5 steps: three, a checkpoint, an evaluation, and two more after loading it."""
    allow_fp16()
    fake_hccl.install()
    config = small_config(parallel=parallel, train={"precision": precision}, checkpoint={"dir": directory})
    engine = start(config)
    assert torch.distributed.get_backend() == "hccl"
    batches = random_batches(config, engine.groups)
    losses = [engine.train_step(batches, 1e-2).loss for _ in range(3)]
    save_checkpoint(engine, Progress(step=3))
    engine.evaluate(random_batches(config, engine.groups), 2)
    found = find_checkpoint(config, engine.groups.world)
    assert found is not None
    load_checkpoint(engine, found)
    return losses + [engine.train_step(batches, 1e-2).loss for _ in range(2)]


def train_on_gloo(parallel: dict[str, Any], precision: str) -> list[float]:
    """The same steps without the save, and the gradient norm in float32 as there."""
    allow_fp16()
    type(get_accelerator()).is_fp64_supported = lambda self: False
    config = small_config(parallel=parallel, train={"precision": precision})
    engine = start(config)
    batches = random_batches(config, engine.groups)
    return [engine.train_step(batches, 1e-2).loss for _ in range(5)]


@pytest.mark.parametrize(
    ("world_size", "parallel", "precision"),
    [
        (4, {"tensor": 2, "pipeline": 2}, "fp32"),
        (4, {"tensor": 2, "pipeline": 2, "sequence": True, "recompute": "full"}, "fp32"),
        (2, {"zero_stage": 2}, "fp32"),
        (2, {"zero_stage": 3}, "fp32"),
        (2, {"zero_stage": 2}, "bf16"),
        (2, {"zero_stage": 2}, "fp16"),
    ],
    ids=str,
)
def test_training_asks_nothing_of_hccl_that_it_lacks(world_size: int, parallel: dict[str, Any], precision: str, tmp_path: Path) -> None:
    expected = run_distributed(train_on_gloo, world_size, parallel, precision)
    assert run_distributed(train_on_hccl, world_size, str(tmp_path), parallel, precision) == expected


def refused(what: str) -> None:
    """Ask the fake for something HCCL has not."""
    fake_hccl.install()
    start(small_config(parallel={"tensor": 2}))
    x = torch.ones(2, dtype=torch.float64 if what == "float64" else torch.float32)
    if what == "gather":
        torch.distributed.gather(x, [torch.empty(2)] * 2 if torch.distributed.get_rank() == 0 else None)
    else:
        torch.distributed.all_reduce(x, op=torch.distributed.ReduceOp.AVG if what == "average" else torch.distributed.ReduceOp.SUM)


@pytest.mark.parametrize("what", ["float64", "average", "gather"])
def test_the_fake_refuses(what: str) -> None:
    with pytest.raises(RankError, match="HCCL does not support"):
        run_distributed(refused, 2, what)
