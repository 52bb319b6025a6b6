"""Saving and resuming: bit for bit on the same layout, and never from a damaged checkpoint."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.harness import RankError, run_distributed
from helpers.layouts import random_batches, small_config, start

from megatron_ext.topology import SINGLE
from pangu.engine.manifest import read_manifest
from pangu.errors import InputError
from pangu.training.checkpoint import Progress, find_checkpoint, load_checkpoint, save_checkpoint
from pangu.training.learning_rate import learning_rate

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tensor 2 x pipeline 2": (4, {"tensor": 2, "pipeline": 2}),
    "tensor 2, sequence parallel, full recompute": (2, {"tensor": 2, "sequence": True, "recompute": "full"}),
    "pipeline 2 x data 2, stages nearer, uneven": (4, {"pipeline": 2, "order": "tp-pp-dp", "stage_layers": [3, 1]}),
    "data 2, ZeRO-3": (2, {"zero_stage": 3}),
    "data 2, no ZeRO": (2, {"zero_stage": 0}),
}


def train_and_save(directory: str, parallel: dict[str, Any], save_at: list[int], num_steps: int, fail_rank: int | None = None) -> list[Any]:
    """Resume if there is a checkpoint, train to `num_steps`, saving after the given steps; (step, loss, norm) of each step as bits."""
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    config = small_config(model=dropout, parallel=parallel, checkpoint={"dir": directory, "keep": 2})
    engine = start(config)
    checkpoint = find_checkpoint(config, engine.groups.world)
    progress = load_checkpoint(engine, checkpoint) if checkpoint else Progress()
    batches = random_batches(config, engine.groups, first_step=progress.step)
    results = []
    while progress.step < num_steps:
        result = engine.train_step(batches, learning_rate(config, progress.step))
        progress.step += 1
        progress.consumed_samples += config.train.global_batch_size
        results.append((progress.step, result.loss.hex(), result.grad_norm.hex()))
        if progress.step in save_at:
            if fail_rank == engine.groups.world.rank:
                os.kill(os.getpid(), signal.SIGKILL)
            save_checkpoint(engine, progress)
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_run_is_bit_identical(layout: str, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    unbroken = run_distributed(train_and_save, world_size, str(tmp_path / "a"), parallel, [], 6)[0]
    first = run_distributed(train_and_save, world_size, str(tmp_path / "b"), parallel, [3], 3)[0]
    second = run_distributed(train_and_save, world_size, str(tmp_path / "b"), parallel, [], 6)[0]
    assert first + second == unbroken


def test_a_rank_killed_while_saving_loses_only_the_new_checkpoint(tmp_path: Path) -> None:
    parallel = {"tensor": 2}
    run_distributed(train_and_save, 2, str(tmp_path), parallel, [2], 2)
    with pytest.raises(RankError):
        run_distributed(train_and_save, 2, str(tmp_path), parallel, [4], 4, 1, timeout=30)
    assert (tmp_path / "latest").read_text().strip() == "step_00000002"
    resumed = run_distributed(train_and_save, 2, str(tmp_path), parallel, [4], 4)[0]
    assert [step for step, _, _ in resumed] == [3, 4]
    assert (tmp_path / "latest").read_text().strip() == "step_00000004"
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000002", "step_00000004"]


def test_damaged_checkpoints_are_passed_over_and_all_damaged_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_distributed(train_and_save, 1, str(tmp_path), {}, [1, 2], 2)
    config = small_config(checkpoint={"dir": str(tmp_path)})
    newest = tmp_path / "step_00000002"
    assert find_checkpoint(config, SINGLE) == newest
    victim = next(newest.glob("zero_*"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert find_checkpoint(config, SINGLE) == tmp_path / "step_00000001"
    assert victim.name in capsys.readouterr().out
    next((tmp_path / "step_00000001").glob("mp_rank*")).unlink()
    with pytest.raises(InputError, match="none of its 1 checkpoints is intact"):
        find_checkpoint(config, SINGLE)


def save_twice(directory: str) -> None:
    engine, progress = start(small_config(checkpoint={"dir": directory})), Progress(step=1)
    for progress.consumed_samples in (8, 16):
        save_checkpoint(engine, progress)


def test_a_step_that_is_done_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    run_distributed(save_twice, 1, str(tmp_path))
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_00000001"]
    assert read_manifest(tmp_path / "step_00000001").progress.consumed_samples == 16


def test_a_run_whose_only_checkpoint_lost_its_manifest_does_not_start_anew_in_silence(tmp_path: Path) -> None:
    run_distributed(train_and_save, 1, str(tmp_path), {}, [2], 2)
    (tmp_path / "step_00000002/manifest.json").unlink()
    with pytest.raises(RankError, match="none of its 1 checkpoints is intact"):
        run_distributed(train_and_save, 1, str(tmp_path), {}, [2], 2)


def test_mixed_runs_are_refused(tmp_path: Path) -> None:
    run_distributed(train_and_save, 1, str(tmp_path), {}, [2], 2)
    with pytest.raises(InputError, match="checkpoints would mix"):
        find_checkpoint(small_config(checkpoint={"dir": str(tmp_path), "resume": "never"}), SINGLE)
    with pytest.raises(InputError, match=r"no readable manifest\.json"):
        find_checkpoint(small_config(checkpoint={"dir": str(tmp_path), "resume": str(tmp_path / "elsewhere")}), SINGLE)
