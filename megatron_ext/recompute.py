"""Rematerialization: drop activations in the forward pass and compute them again in the backward pass, bit for bit.

A model recomputes its core attention only (`selective`, arXiv 2205.05198, section 5) or whole layers (`full`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_ext.random import RngStreams


def recompute(function: Callable[..., Tensor], *args: object, rng: RngStreams) -> Tensor:
    """Compute `function(*args)`, keeping only its arguments for the backward pass, which calls the function again.

    torch restores the default generator by itself, but not the tensor-parallel stream: without restoring that one too, dropout masks would
    differ in the second run and the gradients would be silently wrong.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), rng.replay(rng.tensor_parallel_state)

    y: Tensor = checkpoint(function, *args, use_reentrant=False, context_fn=contexts)
    return y
