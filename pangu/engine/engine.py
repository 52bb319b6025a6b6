"""One training engine for every layout: DeepSpeed's pipeline engine where there are stages, its plain engine otherwise.

The silent errors of DeepSpeed that this file guards against are described at the code for each; each has a test.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ext import accelerator
from megatron_ext.collectives import all_reduce
from megatron_ext.context import ParallelContext, ParamInit
from megatron_ext.random import RngStreams, derive_seed
from megatron_ext.sharding import spec_of
from megatron_ext.topology import Groups
from pangu.config import Config
from pangu.config.layout import RunLayout
from pangu.data.batches import Batch
from pangu.engine.guard import StepGuard
from pangu.engine.optimizer import build_optimizer
from pangu.engine.pipeline import build_pipeline, quiet
from pangu.model.block import Block, RunOptions
from pangu.model.model import PanguModel


@dataclass(frozen=True)
class StepResult:
    """Outcome of one optimizer step, the same on every rank."""

    loss: float
    """Mean loss over the global batch, in nats per token."""
    grad_norm: float
    """Global norm of the gradient before clipping; infinite where the step was skipped."""
    skipped: bool
    """Whether the update was dropped on every rank, because the loss was not finite or above the limit, or the gradient not finite."""
    overflow: bool
    """fp16 only: whether the step was skipped because the gradient overflowed at a loss scale that can still be lowered."""
    loss_scale: float | None
    """fp16 only: the loss scale after the step."""


class TrainingEngine:
    """The model of one rank and its optimizer.

    Args:
        config: the run's configuration.
        layout: how the run is distributed over its processes.
        groups: this rank's process groups; torch.distributed must be initialised.
        fill: writes the initial weights.
    """

    def __init__(self, config: Config, layout: RunLayout, groups: Groups, fill: ParamInit) -> None:
        import deepspeed

        accelerator.keep_freed_memory()
        self.config, self.layout, self.groups = config, layout, groups
        self.rng = RngStreams(config.train.seed, groups.coordinates)
        self.has_pipeline = groups.topology.pipeline > 1
        settings = copy.deepcopy(layout.deepspeed)  # DeepSpeed writes into it
        self.micro_batches = layout.micro_batches
        if config.parallel.zero_stage == 0:
            # Without ZeRO, DeepSpeed clips but does not tell the norm; `_clip` does both.
            settings["gradient_clipping"] = 0.0
        context = ParallelContext(
            tensor=groups.tensor,
            sequence_parallel=config.parallel.sequence,
            device=accelerator.device(),
            fill=fill,
            rng=self.rng,
        )
        options = RunOptions(recompute=config.parallel.recompute, reset_at_document=config.data.eod_reset)
        mpu = None if self.has_pipeline or groups.topology.tensor == 1 else _ModelParallelUnit(groups)
        module: Any
        if self.has_pipeline:
            module = build_pipeline(config.model, context, options, groups.topology, layout.stage_layers)
        else:
            # ZeRO-3 shards each module as it is made, so that no rank ever holds the whole model. It must be given the group:
            # with the `mpu` alone it shards over all ranks, and one tensor rank's slices overwrite another's.
            sharded = (
                deepspeed.zero.Init(config_dict_or_path=settings, mpu=mpu, data_parallel_group=mpu and groups.data.handle)
                if config.parallel.zero_stage == 3
                else contextlib.nullcontext()
            )
            with quiet(), sharded:
                module = PanguModel(config.model, context, options)
        if config.train.compile:
            for layer in module.modules():
                if isinstance(layer, Block):
                    layer.compile_layer()
        offload = bool(settings["zero_optimization"].get("offload_optimizer"))
        optimizer, self.optimizer_name = build_optimizer(config.optimizer, module.parameters(), offload=offload)
        self.guard = StepGuard(module.parameters(), groups, self.micro_batches, accelerator.device())
        with quiet():
            self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, mpu=mpu)
        self.module = self.engine.module
        if config.parallel.zero_stage == 0 and groups.data.size == 1:
            # There is nobody to sum with, but DeepSpeed would copy every gradient into a bucket and back.
            self.engine.enable_backward_allreduce = False
        if config.parallel.zero_stage > 0:
            self.guard.judge_by_norm(self.engine.optimizer)
        if self.has_pipeline:
            loss_of = self.module.loss_fn
            self.module.loss_fn = lambda *args: self.guard.check_loss(loss_of(*args)) if self.module.training else loss_of(*args)
        zero = settings["zero_optimization"]
        # What DeepSpeed's files do not say and loads wrongly in silence: how its flat buffers are cut, and which optimizer wraps ours.
        self.buffer_form = f"{type(self.engine.optimizer).__name__}, sub-groups of {zero.get('sub_group_size', 'the default size')}"

    def train_step(self, batches: Iterator[Batch], learning_rate: float, loss_limit: float = math.inf) -> StepResult:
        """Consume one global batch: forward, backward, clip, update.

        Args:
            batches: this rank's micro-batches. A stage in the middle of a pipeline takes none.
            learning_rate: learning rate of this step.
            loss_limit: the update is dropped if the loss is above it, and also if the loss or the gradient is not finite.
        """
        for group in self.param_groups:
            group["lr"] = learning_rate
        scale_can_fall = self._scale_can_fall()
        grad_norm: float | None = None
        self.guard.begin(loss_limit)
        if self.has_pipeline:
            loss = float(self.engine.train_batch(data_iter=map(_pipeline_batch, batches)))
        else:
            self.engine.train()
            for _ in range(self.micro_batches):
                self.engine.backward(self.guard.check_loss(self.engine(*self._inputs(next(batches)))))
                if self.config.parallel.zero_stage == 0 and self.engine.is_gradient_accumulation_boundary():
                    grad_norm = self._clip()
                self.engine.step()
            loss = float(self.guard.mean_loss)
        if grad_norm is None:
            grad_norm = float(self.engine.get_global_grad_norm())
            assert math.isfinite(grad_norm) == self.engine.was_step_applied(), f"DeepSpeed applied a step of gradient norm {grad_norm}"
        skipped = not math.isfinite(grad_norm)
        return StepResult(
            loss=loss,
            grad_norm=math.inf if skipped else grad_norm,
            skipped=skipped,
            overflow=skipped and scale_can_fall and loss <= loss_limit and math.isfinite(loss),
            loss_scale=float(self.engine.optimizer.loss_scale) if self.config.train.precision == "fp16" else None,
        )

    def _scale_can_fall(self) -> bool:
        """Whether fp16's loss scale is above its minimum. On an overflow at the minimum DeepSpeed would raise; here the caller decides."""
        if self.config.train.precision != "fp16":
            return False
        scaler = self.engine.optimizer.loss_scaler
        scaler.raise_error_at_min_scale = False
        return bool(scaler.dynamic and scaler.loss_scale > scaler.min_scale)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups with their hyper-parameters."""
        return self.engine.optimizer.param_groups

    def count_from(self, step: int, samples: int) -> None:
        """Set DeepSpeed's counters of optimizer steps and samples to those of a checkpoint."""
        self.engine.global_steps, self.engine.global_samples = step, samples

    def reseed(self, step: int) -> None:
        """Seed the random streams for continuing on this layout from a step that was trained on another layout."""
        # In place: the layers hold this object.
        self.rng.load_state_dict(RngStreams(derive_seed(self.config.train.seed, step), self.groups.coordinates).state_dict())

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], num_global_batches: int) -> float:
        """Mean validation loss over `num_global_batches`, in nats per token, the same on every rank."""
        total = torch.zeros((), device=self.engine.device)
        self.module.eval()
        for _ in range(num_global_batches):
            if self.has_pipeline:
                # Leftovers of the last call would be added to this one's result, or break it on the last stage only.
                self.engine.total_loss, self.engine.fwd_outputs = None, []
                total += self.engine.eval_batch(map(_pipeline_batch, batches)).float().squeeze()
            else:
                for _ in range(self.micro_batches):
                    total += self.module(*self._inputs(next(batches))).float() / self.micro_batches
        self.module.train()
        if not self.has_pipeline:
            total = self._mean_over_data(total)
        return float(total) / num_global_batches

    def _inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        device = self.engine.device
        return tuple(x.to(device, non_blocking=True) for x in batch)

    def _mean_over_data(self, value: Tensor) -> Tensor:
        return all_reduce(value, self.groups.data) / self.groups.data.size

    def _clip(self) -> float:
        """Clip this step's averaged gradients by their global norm; returns the norm before clipping.

        Slices are summed over the tensor-parallel group and replicated parameters counted once, as their ShardSpecs say. Where the norm is
        not finite the gradients are dropped, so that the optimizer finds nothing to do.
        """
        squares = torch.zeros(2, device=self.engine.device)  # split, replicated
        gradients = []
        for parameter in self.module.parameters():
            assert parameter.grad is not None, spec_of(parameter).name
            gradients.append(parameter.grad)
            # By rows: no copy of the gradient, and no sum so long that fp32 loses what is added last.
            rows = torch.linalg.vector_norm(parameter.grad, dim=-1, dtype=torch.float32)
            squares[0 if spec_of(parameter).split_dim is not None else 1] += rows.square().sum()
        # Every rank counts its own replicated gradients, and hears whether another's are not finite: the norm is one on all.
        split, fault = all_reduce(torch.stack([squares[0], 0.0 * squares[1]]), self.groups.tensor)
        norm = float((split + fault + squares[1]).sqrt())
        if not math.isfinite(norm):
            for parameter in self.module.parameters():
                parameter.grad = None
        elif self.config.optimizer.grad_clip and norm > self.config.optimizer.grad_clip:
            for gradient in gradients:
                gradient.mul_(self.config.optimizer.grad_clip / norm)
        return norm

    @contextlib.contextmanager
    def whole(self, parameter: Any) -> Iterator[Tensor]:
        """A context in which this tensor rank's slice of a parameter is whole, even if ZeRO-3 has sharded it. All ranks must enter it."""
        if self.config.parallel.zero_stage != 3:
            yield parameter.detach()
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.detach()


def _pipeline_batch(batch: Batch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A micro-batch in the form of DeepSpeed's pipeline: (inputs of the first stage, labels of the last)."""
    return batch[:2], batch[2:]


class _ModelParallelUnit:
    """Megatron's `mpu` interface, through which DeepSpeed's plain engine learns about tensor parallelism, backed by our groups."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def get_model_parallel_rank(self) -> int:
        return self._groups.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self._groups.tensor.size

    def get_model_parallel_group(self) -> Any:
        return self._groups.tensor.handle

    def get_data_parallel_rank(self) -> int:
        return self._groups.data.rank

    def get_data_parallel_world_size(self) -> int:
        return self._groups.data.size

    def get_data_parallel_group(self) -> Any:
        return self._groups.data.handle

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
