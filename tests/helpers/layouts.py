"""A small run in any layout, for tests that compare layouts. Runs inside a rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from megatron_ext.collectives import world_size
from megatron_ext.initialize import random_weights
from megatron_ext.supervision import rendezvous
from megatron_ext.topology import Groups
from pangu.config import Config
from pangu.config.layout import resolve
from pangu.data.batches import Batch, collate
from pangu.data.sampler import Sampler
from pangu.engine.engine import TrainingEngine

VOCAB, SEQUENCE = 50, 16


def small_config(**sections: Any) -> Config:
    """Two layers and a query layer; 8 samples a step in micro-batches of 2; clipping on. The vocabulary divides by neither 4 nor 8."""
    values: dict[str, Any] = {
        "model": {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "vocab_size": VOCAB, "max_positions": SEQUENCE}
        | {"hidden_dropout": 0.0, "attention_dropout": 0.0},
        "train": {"micro_batch_size": 2, "global_batch_size": 8, "steps": 20, "seed": 7},
        "optimizer": {"lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.1, "grad_clip": 1.0},
        "schedule": {"name": "cosine", "warmup_steps": 3, "min_lr": 1e-4},
        "parallel": {"zero_stage": 1},
        "data": {"train": ["unused"]},
        "run": {"dir": "unused"},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
    return Config.model_validate(values)


def random_batches(config: Config, groups: Groups, first_step: int = 0) -> Iterator[Batch]:
    """Samples that depend on their number alone, with separators in them."""
    sampler = Sampler(config.train.global_batch_size, config.train.micro_batch_size, groups.data.size, groups.data.rank)
    for indices in sampler.micro_batches(first_step * config.train.global_batch_size):
        samples = np.stack([np.random.default_rng(i).integers(0, VOCAB, config.train.sequence_length + 1) for i in indices])
        yield collate(samples, separator_id=config.model.separator_id, pad_id=config.model.pad_id, eod_reset=config.data.eod_reset)


def start(config: Config) -> TrainingEngine:
    """Join the world and build the engine."""
    rendezvous.initialize(60)
    groups = Groups.create((layout := resolve(config, world_size())).topology)
    return TrainingEngine(config, layout, groups, random_weights(config.train.seed))


def allow_fp16() -> None:
    """DeepSpeed refuses fp16 on most CPUs: it is slow there, not impossible."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True


def train(config: Config, num_steps: int = 20) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    from pangu.training.learning_rate import learning_rate

    torch.set_num_threads(1)
    engine = start(config)
    batches = random_batches(config, engine.groups)
    results = [engine.train_step(batches, learning_rate(config, step)) for step in range(num_steps)]
    return [(result.loss, result.grad_norm) for result in results]
