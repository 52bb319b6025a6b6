"""The optimizers, the original's Adam without bias correction and standard AdamW, in the fastest implementation available."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from megatron_ext import accelerator
from megatron_ext.sharding import spec_of
from pangu.config import OptimizerConfig

# Every bias correction 1 - beta**t with beta <= 0.9999 is exactly 1 from here on.
_STEP_WITHOUT_BIAS_CORRECTION = 1_000_000.0


class PanguAdam(AdamW):
    """Adam with decoupled weight decay and no bias correction, as the original was trained (MindSpore's AdamWeightDecay).

    p -= lr · (m / (√v + eps) + weight_decay · p), with m and v the running means of the gradient and its square.

    AdamW computes just this once its step count is so large that the bias corrections are 1, so its count starts there, and torch's fused
    kernels serve both optimizers.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply one step to every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if parameter.grad is not None and not state:
                    device = parameter.device if group["fused"] or group["capturable"] else "cpu"
                    state["step"] = torch.tensor(_STEP_WITHOUT_BIAS_CORRECTION, dtype=torch.float32, device=device)
                    state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return super().step(closure)


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameters in two groups: matrices and embedding tables decay; biases and LayerNorm, the one-dimensional ones, do not."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in parameters:
        (decayed if len(spec_of(parameter).shape) > 1 else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]  # a pipeline stage may hold none of a kind; DeepSpeed rejects empty groups


def build_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter], *, offload: bool) -> tuple[Optimizer, str]:
    """The configured optimizer in the fastest available implementation, and its name for the log.

    Args:
        config: the optimizer section.
        parameters: this rank's parameters, each with its ShardSpec.
        offload: the optimizer runs on the host (DeepSpeed's `offload_optimizer`).
    """
    groups = decay_groups(parameters, config.weight_decay)
    common: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    correct = config.name == "adamw"
    device = "cpu" if offload else accelerator.name()
    if device == "cuda":
        for source in (_apex_fused_adam, _deepspeed_fused_adam):
            if (fused := source()) is not None:
                return fused(groups, bias_correction=correct, adam_w_mode=True, **common), f"{fused.__module__}.{fused.__name__}"
    if device == "npu" and correct and (fused := _npu_fused_adamw()) is not None:
        return fused(groups, **common), f"{fused.__module__}.{fused.__name__}"
    kind = AdamW if correct else PanguAdam
    # torch's fused kernel exists on these devices; elsewhere its own default chooses.
    return kind(groups, fused=True if device in ("cpu", "cuda") else None, **common), f"torch {kind.__name__}"


def start_states(optimizer: Optimizer, parameter: Tensor, step: float, *, group: int | None = None) -> dict[str, Tensor]:
    """Create a parameter's optimizer states as after its first step, to be overwritten with saved ones.

    Args:
        optimizer: an optimizer that `build_optimizer` made.
        parameter: one of its parameters, or a flat buffer that holds several.
        step: the saved optimizer's step count.
        group: index of the parameter's group, if the parameter is not in the optimizer's groups.

    Returns:
        `exp_avg` and `exp_avg_sq`, zero.
    """
    groups = optimizer.param_groups
    own = groups[group] if group is not None else next(each for each in groups if any(one is parameter for one in each["params"]))
    if isinstance(optimizer, PanguAdam) and step < _STEP_WITHOUT_BIAS_CORRECTION:
        step += _STEP_WITHOUT_BIAS_CORRECTION  # counted by a kernel that needs no such trick
    state = optimizer.state[parameter]
    if isinstance(optimizer, AdamW):
        device = parameter.device if own["fused"] or own["capturable"] else "cpu"
        state["step"] = torch.tensor(step, dtype=torch.float32, device=device)
    else:
        state["step"] = own["step"] = int(step)  # fused kernels of others keep it in one of the two places
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return {name: state[name] for name in ("exp_avg", "exp_avg_sq")}


def _apex_fused_adam() -> Any:
    try:
        # Test the symbol: the `apex` on PyPI is another project and imports too.
        from apex.optimizers import FusedAdam
    except ImportError:
        return None
    return FusedAdam


def _deepspeed_fused_adam() -> Any:
    try:
        from deepspeed.ops.adam import FusedAdam
        from deepspeed.ops.op_builder import FusedAdamBuilder

        FusedAdamBuilder().load(verbose=False)  # compiles with nvcc at first use
    except Exception:  # no compiler, no CUDA toolkit, or a build that fails: torch's fused kernel is as good
        return None
    return FusedAdam


def _npu_fused_adamw() -> Any:
    try:
        from torch_npu.optim import NpuFusedAdamW
    except ImportError:
        return None
    return NpuFusedAdamW
