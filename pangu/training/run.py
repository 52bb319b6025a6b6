"""Runs training from a configuration to trained weights."""

from __future__ import annotations

import os

from megatron_ext import accelerator
from megatron_ext.collectives import barrier, broadcast_object, shutdown
from megatron_ext.context import ParamInit
from megatron_ext.initialize import random_weights
from megatron_ext.sharding import canonical_parameters
from megatron_ext.supervision import rendezvous
from megatron_ext.supervision.watchdog import Watchdog
from megatron_ext.topology import Groups
from pangu.config import Config
from pangu.config.layout import RunLayout
from pangu.conversion.export import write_weights
from pangu.conversion.formats import open_weights
from pangu.data.blending import BlendedDataset
from pangu.data.build import build_datasets
from pangu.engine.engine import TrainingEngine
from pangu.engine.manifest import Progress
from pangu.errors import InputError, explain
from pangu.files import write_durably
from pangu.planner.memory import ACCELERATOR, CPU
from pangu.text.tokenizer import PanguTokenizer
from pangu.training.checkpoint import claim_directory, find_checkpoint, finished_step, load_checkpoint
from pangu.training.loop import TrainingLoop
from pangu.training.metrics import Metrics
from pangu.training.overview import stage_reports, summary

COLLECTIVE_TIMEOUT_SECONDS = 1800.0


def run_training(config: Config, layout: RunLayout) -> None:
    """Train from the start, or from the newest checkpoint, to `train.steps`, and write the weights.

    Every rank of the world calls this with the same configuration; the launcher's environment says which rank it is.

    Raises:
        InputError: if the configuration, the data or a checkpoint cannot be used.
    """
    # All that can be refused is refused before any process waits for another.
    is_first = os.environ.get("RANK", "0") == "0"
    finished = finished_step(config) if is_first else None
    if is_first and finished is None:
        platform = CPU if accelerator.name() == "cpu" else ACCELERATOR
        print(*summary(config, layout, stage_reports(config, layout, platform)), sep="\n", flush=True)
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
    found = rendezvous.initialize(timeout, join_seconds=patience or None)
    names = Groups.from_topology(layout.topology, found.rank)
    with Watchdog(found, names, config.run.dir, patience, explain, packages={"megatron_ext", "pangu"}) as watchdog:
        groups = Groups.create(layout.topology, timeout)
        if (step := broadcast_object(finished, groups.world)) is None:
            with claim_directory(config, groups.world):
                _run(config, layout, groups, watchdog, initial_weights, training, validation)
        elif is_first:
            unprofiled = f" train.profile = {config.train.profile}: nothing is recorded." if config.train.profile else ""
            print(
                f"complete: {step} of {config.train.steps} steps are done, weights in {config.run.dir / 'weights'}. Raise train.steps to "
                f"go on, or set run.dir to another directory to start anew.{unprofiled}",
                flush=True,
            )
        shutdown()


def _run(
    config: Config,
    layout: RunLayout,
    groups: Groups,
    watchdog: Watchdog,
    initial_weights: ParamInit,
    training: BlendedDataset,
    validation: BlendedDataset | None,
) -> None:
    """Resume or start, train, and write the weights."""
    checkpoint = find_checkpoint(config, groups.world)
    watchdog.beat(0, "building the model")
    engine = TrainingEngine(config, layout, groups, initial_weights)
    watchdog.beat(0, "loading the checkpoint")
    progress = load_checkpoint(engine, checkpoint) if checkpoint else Progress()
    if groups.world.rank == 0:
        config.run.dir.mkdir(parents=True, exist_ok=True)
        write_durably(config.run.dir / "config.yaml", config.to_yaml())
    metrics = Metrics(config, progress.step) if groups.world.rank == 0 else None
    if metrics:
        epochs = config.train.steps * config.train.global_batch_size * config.train.sequence_length / training.tokens_per_epoch
        metrics.say(f"data: {training.tokens_per_epoch:,} tokens, read {epochs:.3g} times in {config.train.steps} steps")
        metrics.say(f"run: {config.run.dir} (config.yaml, metrics.jsonl)")
        start = f"resumed from {checkpoint} at step {progress.step}" if checkpoint else "starting"
        metrics.say(f"{start}; optimizer {engine.optimizer_name}; {accelerator.device_name()}, {accelerator.backend()}")
        if (profiled := config.train.profiled_steps) and profiled[-1] <= progress.step:
            metrics.say(f"train.profile = {config.train.profile}: these steps are done, so nothing is recorded. Name later ones.")
    try:
        stopped_by = TrainingLoop(engine, progress, checkpoint, training, validation, metrics, watchdog).run()
        if stopped_by:
            if metrics:
                metrics.say(f"{stopped_by}: saved at step {progress.step}; start the same command again to continue.")
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


def _open_tokenizer(config: Config) -> PanguTokenizer | None:
    """Open the tokenizer of the data and check it against the model's configuration."""
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


def _initial_weights(config: Config) -> ParamInit:
    """Initializer of a new run's weights, which a resumed run overwrites."""
    if config.checkpoint.init_from is None:
        return random_weights(config.train.seed)
    weights = open_weights(config.checkpoint.init_from)
    weights.refuse_other(config.model, f"checkpoint.init_from = {config.checkpoint.init_from}")
    return weights.fill
