"""Trains some steps of a plan, in processes on this machine and with random tokens, and measures the time per step.

    seconds = try_plan(config, world_size=4, steps=20)

The ranks are forks of one server that has torch and DeepSpeed loaded, so that a trial starts in a second.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator

import numpy as np

from megatron_ext import accelerator
from megatron_ext.supervision import rendezvous
from megatron_ext.supervision.local_ranks import RankError, run_ranks
from pangu.config import Config
from pangu.data.batches import Batch, collate
from pangu.data.sampler import Sampler
from pangu.engine.preload import MODULES
from pangu.errors import InputError, one_line

WARM_UP_STEPS = 3
TIMEOUT_SECONDS = 300.0


def try_plan(config: Config, world_size: int, steps: int, timeout: float = TIMEOUT_SECONDS) -> float:
    """Median seconds per step of a configuration, after a few warm-up steps.

    Args:
        config: the run's configuration; none of the files that it names is read or written.
        world_size: number of processes to start.
        steps: number of steps to measure.
        timeout: seconds after which the processes are killed.

    Raises:
        InputError: a process failed, or they have not ended in time.
    """
    if world_size > 1:
        os.environ["OMP_NUM_THREADS"] = "1"  # as torchrun has it; read when torch is imported
    os.environ.setdefault("DS_ACCELERATOR", accelerator.name())  # the server need not look for one
    # A device that a fork server has touched cannot be used by its forks.
    start_method = "forkserver" if accelerator.name() == "cpu" else "spawn"
    preload = [*MODULES, __name__]  # a trial would spend most of its time on these imports
    try:
        answers = run_ranks(_median_seconds, world_size, config, steps, timeout=timeout, preload=preload, start_method=start_method)
    except RankError as error:
        if error.rank is None:
            raise InputError(f"the processes have not finished their steps after {timeout:.0f} s; measure fewer.") from None
        reason = error.reason or "ended early; lower the sizes if memory ran out"
        raise InputError(one_line(f"process {error.rank}: {reason}")) from None
    return float(answers[0])


def _median_seconds(config: Config, steps: int) -> float:
    return statistics.median(step_seconds(config, steps))


def step_seconds(config: Config, steps: int) -> list[float]:
    """Train on this rank as `pangu.train` does; return the seconds of each step except the warm-up steps."""
    from megatron_ext import collectives
    from megatron_ext.initialize import random_weights
    from megatron_ext.topology import Groups
    from pangu.config.layout import resolve
    from pangu.engine.engine import TrainingEngine

    world_size = int(os.environ["WORLD_SIZE"])
    layout = resolve(config, world_size)
    rendezvous.initialize(TIMEOUT_SECONDS)
    groups = Groups.create(layout.topology, TIMEOUT_SECONDS)
    engine = TrainingEngine(config, layout, groups, random_weights(config.train.seed))
    seconds = []
    for step in range(WARM_UP_STEPS + steps):
        collectives.barrier(groups.world)
        accelerator.synchronize()
        start = time.perf_counter()
        engine.train_step(random_batches(config, layout.topology.data, groups.coordinates.data, step), config.optimizer.lr)
        accelerator.synchronize()
        collectives.barrier(groups.world)
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP_STEPS:]


def random_batches(config: Config, data_size: int, data_rank: int, step: int) -> Iterator[Batch]:
    """A rank's micro-batches of random tokens for a step; each sample is the same in every layout."""
    train, model = config.train, config.model
    sampler = Sampler(train.global_batch_size, train.micro_batch_size, data_size, data_rank)
    first = min(10, model.vocab_size - 1)  # neither separator nor padding
    for indices in sampler.micro_batches(step * train.global_batch_size):
        samples = [np.random.default_rng(index).integers(first, model.vocab_size, train.sequence_length + 1) for index in indices]
        yield collate(np.stack(samples), separator_id=model.separator_id, pad_id=model.pad_id, eod_reset=config.data.eod_reset)
