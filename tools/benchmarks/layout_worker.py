"""A process of `layouts`: builds what it is told to, then takes a step whenever a line comes in, and answers with its seconds and loss."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_ext import accelerator
from megatron_ext.context import ParallelContext
from megatron_ext.initialize import random_weights
from megatron_ext.topology import Groups
from pangu.config import Config
from pangu.data.batches import Batch, collate
from pangu.data.sampler import Sampler
from pangu.layout import validate_layout
from pangu.model.model import PanguModel
from pangu.training.engine import TrainingEngine
from pangu.training.optimizer import build_optimizer


def batches(config: Config, data_size: int, data_rank: int, step: int) -> Iterator[Batch]:
    """A rank's micro-batches of random tokens; a sample is the same in every layout."""
    train, model = config.train, config.model
    sampler = Sampler(train.global_batch_size, train.micro_batch_size, data_size, data_rank)
    for indices in sampler.micro_batches(step * train.global_batch_size):
        samples = [np.random.default_rng(index).integers(10, model.vocab_size, train.sequence_length + 1) for index in indices]
        yield collate(np.stack(samples), separator_id=model.separator_id, pad_id=model.pad_id, eod_reset=config.data.eod_reset)


def bare_loop(config: Config) -> Callable[[int], float]:
    """A step as one would write it without any framework."""
    model = PanguModel(config.model, ParallelContext(device=accelerator.device(), fill=random_weights(config.train.seed)))
    optimizer, _ = build_optimizer(config.optimizer, model.parameters(), offload=False)
    micro_batches = config.train.global_batch_size // config.train.micro_batch_size

    def step(number: int) -> float:
        source, total = batches(config, 1, 0, number), 0.0
        for _ in range(micro_batches):
            batch = next(source)
            loss = model(*(x.to(accelerator.device()) for x in (batch.tokens, batch.position_ids, batch.labels, batch.loss_mask)))
            (loss / micro_batches).backward()
            total += float(loss.detach()) / micro_batches
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def engine(config: Config) -> Callable[[int], float]:
    """A step as `pangu.train` takes it."""
    topology = validate_layout(config, int(os.environ["WORLD_SIZE"]))
    accelerator.initialize(600.0)
    groups = Groups.create(topology, 600.0)
    trainer = TrainingEngine(config, groups, random_weights(config.train.seed))
    place = groups.coordinates

    def step(number: int) -> float:
        return trainer.train_step(batches(config, topology.data, place.data, number), config.optimizer.lr).loss

    return step


def main() -> None:
    """Build, then answer lines until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    config = Config.model_validate(json.loads(sys.argv[1]))
    with contextlib.redirect_stdout(sys.stderr):
        step = (bare_loop if "--bare" in sys.argv else engine)(config)
        for number, _ in enumerate(sys.stdin):
            began = time.perf_counter()
            loss = step(number)
            accelerator.synchronize()
            print(json.dumps({"seconds": time.perf_counter() - began, "loss": loss}), file=answers, flush=True)


if __name__ == "__main__":
    main()
