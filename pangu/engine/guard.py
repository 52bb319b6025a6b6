"""Drops the update of a step whose loss or gradient is not finite, or whose loss is above a limit, on every layout and on all ranks alike.

One number decides, the global gradient norm, which every rank reads anyway: where it is not finite no rank updates. DeepSpeed's ZeRO
optimizers do that by themselves, provided that the norm reflects every fault:

- A loss may be infinite and its gradient finite. So the last micro-batch's loss passes through a gate whose backward turns the gradient
  into NaN, on the device and without waiting, where the mean loss of the global batch is not finite or over the limit.
- For a parameter that all tensor-parallel ranks hold, the norm counts the first rank's gradient only: a NaN on another rank would enter
  that rank's weights. So such gradients are checked as they appear, and the result is added to the norm.
- DeepSpeed detects overflows in bf16 and fp16 by a reduction of uint8, which HCCL refuses, before the norm, which finds them too. So
  that check is left out, and the norm is always checked, whatever the DeepSpeed JSON says.

Without ZeRO, `TrainingEngine._clip` computes the norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ext.collectives import all_reduce
from megatron_ext.sharding import spec_of
from megatron_ext.topology import Groups


class StepGuard:
    """The guard of one rank's engine.

    Args:
        parameters: this rank's parameters, before DeepSpeed registers its own hooks, which remove gradients.
        groups: this rank's process groups.
        micro_batches: number of micro-batches per step.
        device: device of losses and gradients.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], groups: Groups, micro_batches: int, device: torch.device) -> None:
        self._groups, self._micro_batches = groups, micro_batches
        self._replicated = torch.zeros((), device=device)  # 0, or NaN once a gradient was not finite
        self._seen, self._limit = 0, math.inf
        self.mean_loss = torch.zeros((), device=device)
        """Mean loss of the global batch, once the step's last micro-batch has passed the gate on this rank."""
        if groups.tensor.size > 1:
            for parameter in parameters:
                if spec_of(parameter).split_dim is None:
                    parameter.register_post_accumulate_grad_hook(self._look)

    def _look(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._replicated += 0.0 * parameter.grad.sum(dtype=torch.float32)

    def begin(self, loss_limit: float) -> None:
        """Start a step. An update whose mean loss is above `loss_limit` is dropped."""
        self._limit, self._seen = loss_limit, 0
        self.mean_loss = torch.zeros_like(self.mean_loss)
        self._replicated.zero_()

    def check_loss(self, loss: Tensor) -> Tensor:
        """Pass a micro-batch's loss through, unchanged, before the backward pass. Every data-parallel rank passes all its micro-batches."""
        self.mean_loss += loss.detach().float() / self._micro_batches
        self._seen += 1
        if self._seen < self._micro_batches:
            return loss
        self.mean_loss = all_reduce(self.mean_loss, self._groups.data) / self._groups.data.size
        return _Gate.apply(loss, self.mean_loss.isfinite() & (self.mean_loss <= self._limit))

    def judge_by_norm(self, optimizer: Any) -> None:
        """Make a ZeRO optimizer of DeepSpeed decide by the gradient norm alone whether to drop a step.

        Each of DeepSpeed's three kinds computes the norm in a method of a different name; all treat a norm that is not finite as an
        overflow.
        """
        optimizer.check_grad_overflow = optimizer.compute_grad_norm = True
        optimizer.check_overflow = lambda *_, **__: None
        if hasattr(optimizer, "scaled_global_norm"):  # ZeRO-1 and 2
            optimizer.scaled_global_norm = self._and_replicated(optimizer.scaled_global_norm, lambda norm, found: norm + found)
        elif hasattr(optimizer, "_get_norm_groups"):  # ZeRO-3: a norm for each group of parameters
            optimizer._get_norm_groups = self._and_replicated(optimizer._get_norm_groups, lambda norms, found: [*norms, found])
        else:  # bf16 with gradients accumulated in fp32: the gradients, without experts and with
            optimizer.get_grads_for_norm = self._and_replicated(
                optimizer.get_grads_for_norm, lambda gradients, found: ([*gradients[0], found], gradients[1])
            )

    def _and_replicated(self, method: Callable[..., Any], join: Callable[[Any, Tensor], Any]) -> Callable[..., Any]:
        """The method's result together with what was found in the gradients that the norm does not count."""
        if self._groups.tensor.size == 1:
            return method

        def both(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            if kwargs.get("for_clipping"):
                return result
            for group in (self._groups.tensor, self._groups.data, self._groups.pipeline):
                all_reduce(self._replicated, group)
            return join(result, self._replicated)

        return both


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, is_open: Tensor) -> Tensor:
        ctx.save_for_backward(is_open)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (is_open,) = ctx.saved_tensors
        return torch.where(is_open, gradient, torch.nan), None
