"""The training loop: from a configuration to trained weights."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from megatron_ext import accelerator
from megatron_ext.collectives import all_reduce_max, barrier, shutdown
from megatron_ext.context import Fill
from megatron_ext.initialize import random_weights
from megatron_ext.sharding import canonical_parameters
from megatron_ext.topology import Groups
from megatron_ext.watchdog import Watchdog
from pangu.config import Config, validate_layout
from pangu.conversion.export import write_weights
from pangu.conversion.formats import open_weights
from pangu.data.batches import Batch, micro_batches
from pangu.data.blending import BlendedDataset
from pangu.data.build import build_datasets
from pangu.data.sampler import Sampler
from pangu.errors import InputError, explain
from pangu.tokenizer import PanguTokenizer
from pangu.training.anomalies import HISTORY, decide, fault_of, loss_limit
from pangu.training.checkpoint import CheckpointSaver, Progress, claim_directory, find_checkpoint, load_checkpoint, verify
from pangu.training.engine import StepResult, TrainingEngine
from pangu.training.manifest import step_name
from pangu.training.metrics import Metrics
from pangu.training.replicas import ReplicaCheck
from pangu.training.report import flops_per_token, print_report
from pangu.training.schedule import learning_rate
from pangu.training.stopping import StopRequest

COLLECTIVE_TIMEOUT_SECONDS = 1800.0


def run_training(config: Config) -> None:
    """Train from start, or from the newest checkpoint, to `train.steps`, and write the weights.

    Every rank of the world calls this with the same configuration; the launcher's environment says which rank it is.

    Raises:
        InputError: one line about what the user can mend.
    """
    # All that can be refused is refused before any process waits for another.
    topology = validate_layout(config, int(os.environ.get("WORLD_SIZE", "1")))
    is_first = os.environ.get("RANK", "0") == "0"
    if is_first:
        print_report(config, topology, Console(soft_wrap=True, highlight=False))
    if not accelerator.supports(config.train.precision):
        raise InputError(
            f"train.precision = {config.train.precision}: {accelerator.device_name()} does not train in it. "
            f"Choose {' or '.join(precision for precision in ('bf16', 'fp16', 'fp32') if accelerator.supports(precision))}."
        )
    tokenizer = _open_tokenizer(config)
    training, validation = build_datasets(
        config.data.train,
        config.data.weights,
        seq_length=config.train.sequence_length,
        seed=config.train.seed,
        validation_fraction=config.data.validation_fraction,
        vocab_size=config.model.vocab_size,
        separator_id=config.model.separator_id,
        tokenizer_sha256=tokenizer.sha256 if tokenizer else None,
    )
    initial_weights = _initial_weights(config)
    patience = config.run.hang_timeout
    # The watchdog explains a hang better than a collective's own time-out, so that comes later.
    timeout = max(COLLECTIVE_TIMEOUT_SECONDS, 2 * patience)
    meeting = accelerator.initialize(timeout, join_seconds=patience or None)
    names = Groups.describe(topology, meeting.rank)
    with Watchdog(meeting, names, config.run.dir, patience, explain) as watchdog:
        groups = Groups.create(topology, timeout)
        with claim_directory(config, groups.world):
            _run(config, groups, watchdog, initial_weights, training, validation)
        shutdown()


def _run(
    config: Config,
    groups: Groups,
    watchdog: Watchdog,
    initial_weights: Fill,
    training: BlendedDataset,
    validation: BlendedDataset | None,
) -> None:
    """Resume or start, train, and write the weights."""
    checkpoint = find_checkpoint(config, groups.world)
    watchdog.beat(0, "building the model")
    engine = TrainingEngine(config, groups, initial_weights)
    watchdog.beat(0, "loading the checkpoint")
    progress = load_checkpoint(engine, checkpoint) if checkpoint else Progress()
    if groups.world.rank == 0:
        config.run.dir.mkdir(parents=True, exist_ok=True)
        (config.run.dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    metrics = Metrics(config, progress.step) if groups.world.rank == 0 else None
    if metrics:
        start = f"resumed from {checkpoint} at step {progress.step}" if checkpoint else "starting"
        metrics.say(f"{start}; optimizer {engine.optimizer_name}; {accelerator.device_name()}, {accelerator.backend()}")
    try:
        stopped_by = _train(config, engine, progress, checkpoint, training, validation, metrics, watchdog)
        if stopped_by:
            if metrics:
                metrics.say(f"{stopped_by}: saved at step {progress.step}; start the same command again to go on.")
        else:
            watchdog.beat(progress.step, "writing the weights")
            named = watchdog.each(canonical_parameters(engine.module))
            parameters = ((spec, lambda p=parameter: engine.whole(p)) for spec, parameter in named)
            weights = config.run.dir / "weights"
            write_weights(weights, config.model, groups, parameters, tokenizer=config.data.tokenizer)
            if metrics:
                metrics.say(f"trained {progress.step} steps, {progress.consumed_tokens:,} tokens; weights in {weights}")
    finally:
        if metrics:
            metrics.close()
    barrier(groups.world)


def _train(
    config: Config,
    engine: TrainingEngine,
    progress: Progress,
    checkpoint: Path | None,
    training: BlendedDataset,
    validation: BlendedDataset | None,
    metrics: Metrics | None,
    watchdog: Watchdog,
) -> str | None:
    """Step until `train.steps` or until a signal; save as configured. Returns the name of the signal that ended it."""
    train, groups = config.train, engine.groups
    stop = StopRequest()
    stopped_by = 0
    saver = CheckpointSaver(engine)
    check = ReplicaCheck(engine) if config.run.consistency_every else None

    def compare_replicas() -> None:
        try:
            if check:
                check(progress)
        except InputError:
            saver.finish()  # what is being written was taken when all was well
            raise

    compare_replicas()
    rollbacks = 0
    batches = watchdog.each(_batches(config, engine, training, progress.consumed_samples))
    peak = accelerator.peak_flops()
    tokens_per_step = train.global_batch_size * train.sequence_length
    while progress.step < train.steps:
        watchdog.beat(progress.step + 1, "training")
        began = time.perf_counter()
        rate = learning_rate(config, progress.step)
        limit = loss_limit(progress.recent_losses, train.spike_factor)
        result = engine.train_step(batches, rate, limit)
        accelerator.synchronize()
        seconds = time.perf_counter() - began
        progress.step += 1
        progress.consumed_samples += train.global_batch_size
        progress.consumed_tokens += tokens_per_step
        fault, decision = fault_of(result, limit), None
        if fault:
            progress.bad_steps += 1
            decision = decide(train.on_bad_step, in_a_row=progress.bad_steps, rollbacks=rollbacks, has_checkpoint=checkpoint is not None)
        elif not result.skipped:
            progress.bad_steps = 0
            progress.recent_losses = [*progress.recent_losses, result.loss][-HISTORY:]
        if metrics:
            speed = tokens_per_step / seconds
            mfu = speed * flops_per_token(config) / (peak * groups.topology.world_size) if peak else None
            metrics.step(_figures(result, progress, rate, seconds, speed, mfu) | {"fault": fault, "decision": decision})
            if decision:
                metrics.say(f"step {progress.step}: {fault}; its update was dropped on every rank: {decision}.")
        if check and (fault or progress.step % config.run.consistency_every == 0):
            compare_replicas()  # one that was corrupted is a better reason than the loss that it led to
        if decision in ("rollback", "stop"):
            saver.finish()
        if decision == "stop":
            kept = f"the newest checkpoint is {checkpoint}" if checkpoint else "nothing was saved"
            raise InputError(
                f"step {progress.step}: {fault}, {progress.bad_steps} bad steps in a row, {rollbacks} returns to a checkpoint; "
                f"train.on_bad_step = {train.on_bad_step} ends the run here. No such update reached the weights; {kept}. Lower optimizer.lr"
                " or optimizer.grad_clip, or look at the data of these steps, then start again."
            )
        if decision == "rollback":
            assert checkpoint is not None
            watchdog.beat(progress.step, "returning to a checkpoint")
            _roll_back(engine, progress, checkpoint)
            rollbacks += 1
            continue
        if validation is not None and train.eval_every and progress.step % train.eval_every == 0:
            watchdog.beat(progress.step, "evaluating")
            loss = engine.evaluate(watchdog.each(_batches(config, engine, validation, 0)), train.eval_batches)
            if metrics:
                perplexity = math.exp(min(loss, 700.0))
                metrics.evaluation({"step": progress.step, "validation_loss": loss, "validation_perplexity": perplexity})
        # One rank may have been told to stop and another not yet: all go by what any of them knows.
        stopped_by = int(all_reduce_max(torch.tensor(stop.received), groups.world))
        due = config.checkpoint.save_every and progress.step % config.checkpoint.save_every == 0
        if due or stopped_by or progress.step == train.steps:
            watchdog.beat(progress.step, "saving")
            compare_replicas()  # one that was corrupted must not push out good checkpoints
            saver.save(progress)
            checkpoint, rollbacks = config.checkpoint_dir / step_name(progress.step), 0
        else:
            saver.poll()
        if stopped_by and progress.step < train.steps:
            break
    saver.finish()
    return signal.Signals(stopped_by).name if stopped_by and progress.step < train.steps else None


def _roll_back(engine: TrainingEngine, progress: Progress, checkpoint: Path) -> None:
    """Return to a checkpoint in everything but the data: what was read since is not read again."""
    if problem := verify(checkpoint, engine.groups.world):
        raise InputError(f"{checkpoint}: the run would return to it, but {problem}. Start again: an older one will be taken.")
    saved = load_checkpoint(engine, checkpoint)
    progress.step, progress.recent_losses, progress.bad_steps = saved.step, saved.recent_losses, saved.bad_steps


def _figures(
    result: StepResult, progress: Progress, rate: float, seconds: float, speed: float, mfu: float | None
) -> dict[str, float | int | bool | str | None]:
    """One step's line of metrics.jsonl."""
    return {
        "step": progress.step,
        "loss": result.loss if math.isfinite(result.loss) else None,
        "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,
        "learning_rate": rate,
        "consumed_samples": progress.consumed_samples,
        "consumed_tokens": progress.consumed_tokens,
        "step_seconds": seconds,
        "tokens_per_second": speed,
        "mfu": mfu,
        "loss_scale": result.loss_scale,
        "skipped": True if result.skipped else None,
    }


def _batches(config: Config, engine: TrainingEngine, dataset: BlendedDataset, consumed_samples: int) -> Iterator[Batch]:
    """This rank's micro-batches; a stage in the middle of a pipeline reads nothing."""
    topology, place = engine.groups.topology, engine.groups.coordinates
    if 0 < place.pipe < topology.pipeline - 1:
        return iter(())
    sampler = Sampler(config.train.global_batch_size, config.train.micro_batch_size, topology.data, place.data)
    return micro_batches(
        dataset,
        sampler,
        consumed_samples,
        separator_id=config.model.separator_id,
        pad_id=config.model.pad_id,
        eod_reset=config.data.eod_reset,
    )


def _open_tokenizer(config: Config) -> PanguTokenizer | None:
    """The tokenizer of the data, checked against the model."""
    if config.data.tokenizer is None:
        return None
    tokenizer = PanguTokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"model.vocab_size = {config.model.vocab_size}, but the tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} ids. "
            f"Set model.vocab_size={tokenizer.vocab_size}."
        )
    if tokenizer.eot_id != config.model.separator_id:
        raise InputError(
            f"model.separator_id = {config.model.separator_id}, but <eot> of the tokenizer {config.data.tokenizer} is {tokenizer.eot_id}. "
            f"Set model.separator_id={tokenizer.eot_id}."
        )
    return tokenizer


def _initial_weights(config: Config) -> Fill:
    """Where a new run's weights come from. A resumed run overwrites them."""
    if config.checkpoint.init_from is None:
        return random_weights(config.train.seed)
    weights = open_weights(config.checkpoint.init_from)
    weights.refuse_other(config.model, f"checkpoint.init_from = {config.checkpoint.init_from}")
    return weights.fill
