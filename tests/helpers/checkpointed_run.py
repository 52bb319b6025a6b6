"""A run that saves checkpoints and resumes from them, without data files and without the program."""

from __future__ import annotations

from typing import Any

from helpers.layouts import random_batches, small_config, start
from pangu.config import Config
from pangu.engine.engine import TrainingEngine
from pangu.training.checkpoint import CheckpointSaver, Progress, claim_directory, find_checkpoint, load_checkpoint
from pangu.training.learning_rate import learning_rate

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
Bits = list[tuple[int, str, str]]


def train(directory: str, parallel: dict[str, Any], save_at: list[int], num_steps: int, checkpoint: dict[str, Any] | None = None) -> Bits:
    """Claim the directory, resume if there is a checkpoint, train and save; (step, loss, norm) of each step as bits."""
    config = small_config(model=DROPOUT, parallel=parallel, checkpoint={"dir": directory, **(checkpoint or {})})
    engine = start(config)
    with claim_directory(config, engine.groups.world):
        return claimed(config, engine, save_at, num_steps)


def claimed(config: Config, engine: TrainingEngine, save_at: list[int], num_steps: int) -> Bits:
    found = find_checkpoint(config, engine.groups.world)
    progress = load_checkpoint(engine, found) if found else Progress()
    batches = random_batches(config, engine.groups, first_step=progress.step)
    saver, results = CheckpointSaver(engine), []
    while progress.step < num_steps:
        result = engine.train_step(batches, learning_rate(config, progress.step))
        progress.step += 1
        progress.consumed_samples += config.train.global_batch_size
        results.append((progress.step, result.loss.hex(), result.grad_norm.hex()))
        if progress.step in save_at:
            saver.save(progress)
        else:
            saver.poll()
    saver.finish()
    return results
