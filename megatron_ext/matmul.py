"""Matrix products with the faster of the two libraries that torch has on a CPU.

On processors that are not Intel's, MKL does not use the wide instructions that oneDNN uses there, but torch calls oneDNN only in 16 bits.
Everywhere else, and for products so small that the call costs more than the product, these are torch's own products.

Shapes: M, K, N sides of a product; I input features, O output features.
"""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_PRODUCTS = 2**22
"""M · K · N from which oneDNN was measured to be faster, its call included."""


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b, with gradients: [..., I] -> [..., O]."""
    if _is_faster(x, x.numel() * len(weight_OI)):
        y: Tensor = _Linear.apply(x, weight_OI, bias_O)  # type: ignore[no-untyped-call]
        return y
    return F.linear(x, weight_OI, bias_O)


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a b, without gradients: [M, K] and [K, N] -> [M, N]."""
    return _product(a_MK, b_KN) if _is_faster(a_MK, a_MK.numel() * b_KN.shape[1]) else torch.mm(a_MK, b_KN)


def add_product_(sum_MN: Tensor, a_MK: Tensor, b_KN: Tensor, *, is_first: bool) -> None:
    """sum += a b, in place; with `is_first`, sum = a b. The sum may have a wider dtype than the factors."""
    if sum_MN.dtype == a_MK.dtype and not _is_faster(a_MK, a_MK.numel() * b_KN.shape[1]):
        sum_MN.addmm_(a_MK, b_KN, beta=0 if is_first else 1)
    elif is_first:
        sum_MN.copy_(product(a_MK, b_KN))
    else:
        sum_MN.add_(product(a_MK, b_KN))


def has_onednn() -> bool:
    """Whether this torch has oneDNN and the processor is an x86, the architecture on which it was measured."""
    return platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()


@lru_cache(maxsize=1)
def has_fast_onednn() -> bool:
    """Whether oneDNN is faster than MKL for matrices that are not packed beforehand: on x86 processors that are not Intel's."""
    if not has_onednn():
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _is_faster(x: Tensor, products: int) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and products >= MIN_PRODUCTS and has_fast_onednn()


def _product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    return _linear(a_MK, b_KN.t(), None)


def _linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """oneDNN's x Wᵀ + b."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return _linear(x, weight_OI, bias_O)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        grad_MO = grad.flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _product(grad_MO, weight_OI).view_as(x) if needs_x else None,
            _product(grad_MO.t(), x.flatten(0, -2)) if needs_weight else None,
            grad_MO.sum(dim=0) if needs_bias else None,
        )
