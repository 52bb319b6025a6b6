"""The activations of the MLP: one row says all that differs between them.

A new one is a row here, and its name and function in the two files of `pangu/conversion/remote_code`, which travel with exported
weights and so import nothing of this project.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

ActivationName = Literal["tanh", "erf", "sigmoid"]
"""Values of `model.gelu`."""


@dataclass(frozen=True)
class Activation:
    """What the model, its formats and the planner need to know about one activation."""

    build: Callable[[], Callable[[Tensor], Tensor]]
    """Gives the elementwise function. torch is imported only then: the planner reads this table without it."""
    huggingface: tuple[str, ...]
    """Values of `activation_function` in config.json that mean it; the first is the one that is written."""
    megatron_flags: tuple[str, ...] | None
    """Arguments of the published PyTorch port that switch it on, any of them; empty: what it runs without; None: it cannot run it."""
    saved_tensors: int
    """Tensors as wide as the MLP that autograd keeps for the backward pass: its input, its output (the next layer's input) and others."""


def _tanh() -> Callable[[Tensor], Tensor]:
    from functools import partial

    from torch.nn.functional import gelu

    return partial(gelu, approximate="tanh")


def _erf() -> Callable[[Tensor], Tensor]:
    from torch.nn.functional import gelu

    return gelu


def _sigmoid() -> Callable[[Tensor], Tensor]:
    from torch import sigmoid

    return lambda x: x * sigmoid(1.702 * x)


ACTIVATIONS: dict[ActivationName, Activation] = {
    "tanh": Activation(_tanh, ("gelu_new", "gelu_pytorch_tanh"), ("openai_gelu", "bias_gelu_fusion"), saved_tensors=2),
    "erf": Activation(_erf, ("gelu",), (), saved_tensors=2),
    "sigmoid": Activation(_sigmoid, ("quick_gelu",), None, saved_tensors=3),
}
assert tuple(ACTIVATIONS) == get_args(ActivationName)
