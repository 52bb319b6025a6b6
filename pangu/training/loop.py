"""The training loop: step, check the step, evaluate, save, until the last step or a request to stop."""

from __future__ import annotations

import gc
import math
import signal
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_ext import accelerator
from megatron_ext.collectives import all_reduce_max
from megatron_ext.supervision.watchdog import Watchdog
from pangu.config.sizes import flops_per_token
from pangu.data.batches import Batch, micro_batches
from pangu.data.blending import BlendedDataset
from pangu.data.sampler import Sampler
from pangu.engine.engine import StepResult, TrainingEngine
from pangu.engine.manifest import Progress, step_name
from pangu.engine.replicas import ReplicaCheck
from pangu.errors import InputError
from pangu.training.anomalies import HISTORY, Policy, decide, fault_of, loss_limit
from pangu.training.checkpoint import CheckpointSaver, load_checkpoint, verify
from pangu.training.learning_rate import learning_rate
from pangu.training.metrics import Metrics, peak_memory_bytes
from pangu.training.step_profile import StepProfile
from pangu.training.stopping import StopRequest
from pangu.training.stragglers import StragglerReport

PACE_STEPS = 100
"""Steps that the time left is judged by."""


class TrainingLoop:
    """Trains one rank's engine. Every rank runs one, and all decisions depend only on numbers that are equal on all ranks.

    Args:
        engine: the rank's engine, new or restored from a checkpoint.
        progress: the run's progress; updated in place.
        checkpoint: the newest checkpoint, if there is one.
        training: the training data.
        validation: the validation data for `train.eval_every`.
        metrics: writes metrics.jsonl; None on all ranks but the first.
        watchdog: progress is reported to it.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        progress: Progress,
        checkpoint: Path | None,
        training: BlendedDataset,
        validation: BlendedDataset | None,
        metrics: Metrics | None,
        watchdog: Watchdog,
    ) -> None:
        self._config, self._engine, self._progress, self._checkpoint = engine.config, engine, progress, checkpoint
        self._training, self._validation = training, validation
        self._metrics, self._watchdog = metrics, watchdog
        self._saver = CheckpointSaver(engine)
        self._check = ReplicaCheck(engine) if self._config.run.consistency_every else None
        self._stragglers = StragglerReport(engine.groups)
        self._profile = StepProfile(self._config.train.profiled_steps, self._config.run.dir / "profile", engine.groups.world.rank)
        self._peak = accelerator.peak_flops()
        self._rollbacks = 0
        """Number of returns to `_checkpoint`."""
        self._ends: deque[float] = deque(maxlen=PACE_STEPS + 1)
        """Times at which the last steps were done; evaluations and checkpoints lie between them."""

    def run(self) -> str | None:
        """Train until `train.steps` or a signal, saving as configured. Returns the name of the signal that ended the run, or None."""
        train, progress = self._config.train, self._progress
        stop, stopped_by = StopRequest(), 0
        # What was imported and built stays: the garbage collector would look through it again and again, on each rank at another time.
        gc.collect()
        gc.freeze()
        self._compare_replicas()
        batches = self._watchdog.each(self._stragglers.timed(self._batches(self._training, progress.consumed_samples)))
        with self._profile:
            while progress.step < train.steps and not stopped_by:
                with self._profile.step(progress.step + 1):
                    decision = self._step(batches)
                if decision == "rollback":
                    self._roll_back()
                    continue
                if self._validation is not None and train.eval_every and progress.step % train.eval_every == 0:
                    self._evaluate(self._validation)
                # One rank may have been told to stop and another not yet: all go by what any of them knows.
                stopped_by = int(all_reduce_max(torch.tensor(stop.received), self._engine.groups.world))
                save_every = self._config.checkpoint.save_every
                if stopped_by or progress.step == train.steps or (save_every and progress.step % save_every == 0):
                    self._save()
                else:
                    self._saver.poll()
        self._saver.finish()
        return signal.Signals(stopped_by).name if stopped_by and progress.step < train.steps else None

    def _step(self, batches: Iterator[Batch]) -> Policy | None:
        """Take one optimizer step, check and record it; return the decision if the step was bad, else None.

        Raises:
            InputError: on every rank, if a bad step ends the run.
        """
        config, engine, progress = self._config, self._engine, self._progress
        self._watchdog.beat(progress.step + 1, "training")
        began = time.perf_counter()
        rate = learning_rate(config, progress.step)
        limit = loss_limit(progress.recent_losses, config.train.spike_factor)
        result = engine.train_step(batches, rate, limit)
        accelerator.synchronize()
        self._ends.append(time.perf_counter())
        seconds = self._ends[-1] - began
        progress.step += 1
        progress.consumed_samples += config.train.global_batch_size
        progress.consumed_tokens += config.train.global_batch_size * config.train.sequence_length

        fault, decision = fault_of(result, limit), None
        if fault:
            progress.bad_steps += 1
            has_checkpoint = self._checkpoint is not None
            decision = decide(
                config.train.on_bad_step, in_a_row=progress.bad_steps, rollbacks=self._rollbacks, has_checkpoint=has_checkpoint
            )
        elif not result.skipped:
            progress.bad_steps = 0
            progress.recent_losses = [*progress.recent_losses, result.loss][-HISTORY:]
        if self._metrics:
            self._metrics.step(self._figures(result, rate, seconds) | {"fault": fault, "decision": decision})
            if decision:
                self._metrics.say(f"step {progress.step}: {fault}; its update was dropped on every rank: {decision}.")
        regular = config.run.consistency_every and progress.step % config.run.consistency_every == 0
        if regular:
            for line in self._stragglers():
                if self._metrics:
                    self._metrics.note(progress.step, "straggler", line)
        if regular or fault:
            self._compare_replicas()  # one that was corrupted is a better reason than the loss that it led to
        if decision == "stop":
            self._saver.finish()
            kept = f"the newest checkpoint is {self._checkpoint}" if self._checkpoint else "nothing was saved"
            raise InputError(
                f"step {progress.step}: {fault}, {progress.bad_steps} bad steps in a row, {self._rollbacks} returns to a checkpoint; "
                f"train.on_bad_step = {config.train.on_bad_step} ends the run here. No such update reached the weights; {kept}. Lower "
                "optimizer.lr or optimizer.grad_clip, or look at the data of these steps, then start again."
            )
        return decision

    def _compare_replicas(self) -> None:
        try:
            if self._check:
                self._check(self._progress)
        except InputError:
            self._saver.finish()  # what is being written was taken when all was well
            raise

    def _roll_back(self) -> None:
        """Restore all state from the newest checkpoint except the position in the data: what was read since is not read again."""
        assert self._checkpoint is not None
        self._watchdog.beat(self._progress.step, "returning to a checkpoint")
        self._saver.finish()
        if problem := verify(self._checkpoint, self._engine.groups.world):
            raise InputError(f"{self._checkpoint}: the run would return to it, but {problem}. Start again: an older one will be taken.")
        saved = load_checkpoint(self._engine, self._checkpoint)
        self._progress.step, self._progress.bad_steps = saved.step, saved.bad_steps
        self._progress.recent_losses = saved.recent_losses
        self._rollbacks += 1

    def _evaluate(self, validation: BlendedDataset) -> None:
        self._watchdog.beat(self._progress.step, "evaluating")
        batches = self._watchdog.each(self._batches(validation, 0))
        loss = self._engine.evaluate(batches, self._config.train.eval_batches)
        if self._metrics:
            perplexity = math.exp(min(loss, 700.0))
            self._metrics.evaluation({"step": self._progress.step, "validation_loss": loss, "validation_perplexity": perplexity})

    def _save(self) -> None:
        self._watchdog.beat(self._progress.step, "saving")
        self._compare_replicas()  # one that was corrupted must not push out good checkpoints
        self._saver.save(self._progress)
        self._checkpoint, self._rollbacks = self._config.checkpoint_dir / step_name(self._progress.step), 0

    def _batches(self, dataset: BlendedDataset, consumed_samples: int) -> Iterator[Batch]:
        """Iterator over this rank's micro-batches; empty on a middle stage of a pipeline, which reads no data."""
        config, topology, place = self._config, self._engine.groups.topology, self._engine.groups.coordinates
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

    def _figures(self, result: StepResult, rate: float, seconds: float) -> dict[str, float | int | bool | str | None]:
        """The metrics of one step, a line of metrics.jsonl."""
        config, progress = self._config, self._progress
        speed = config.train.global_batch_size * config.train.sequence_length / seconds
        # The first step of a process warms up and says nothing of the later ones.
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) if len(self._ends) > 1 else None
        return {
            "step": progress.step,
            "loss": result.loss if math.isfinite(result.loss) else None,
            "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,
            "learning_rate": rate,
            "consumed_samples": progress.consumed_samples,
            "consumed_tokens": progress.consumed_tokens,
            "step_seconds": seconds,
            "tokens_per_second": speed,
            "seconds_left": pace * (config.train.steps - progress.step) if pace is not None else None,
            "peak_memory_bytes": peak_memory_bytes(),
            "consumed_epochs": progress.consumed_tokens / self._training.tokens_per_epoch,
            "mfu": speed
            * flops_per_token(config.model, config.train.sequence_length)
            / (self._peak * self._engine.groups.topology.world_size)
            if self._peak
            else None,
            "loss_scale": result.loss_scale,
            "skipped": True if result.skipped else None,
        }
