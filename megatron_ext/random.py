"""Random-number streams of one rank.

Two streams drive dropout. What every tensor-parallel rank holds whole (the residual stream without sequence parallelism) must be masked
alike on all of them: that is the default generator, seeded by (seed, pipe, data). What each rank holds a part of (attention heads, a
slice of the sequence) must be masked independently: that is the tensor-parallel stream, seeded by (seed, pipe, data, tensor).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext import accelerator
from megatron_ext.topology import Coordinates


def derive_seed(*words: int) -> int:
    """A 63-bit seed that depends on every word and collides with no simple sum of them."""
    return int(np.random.SeedSequence((*words, len(words))).generate_state(1, np.uint64)[0]) >> 1


class RngStreams:
    """The default stream and the tensor-parallel stream of one rank.

    Args:
        seed: the run's seed. None seeds nothing: both streams start where the default generator stands, for models that drop nothing.
        place: this rank's coordinates.
    """

    def __init__(self, seed: int | None, place: Coordinates) -> None:
        if seed is None:
            self._tensor_parallel_state = accelerator.get_rng_state()
            return
        torch.manual_seed(derive_seed(seed, place.pipe, place.data, 0, place.tensor))
        self._tensor_parallel_state = accelerator.get_rng_state()
        torch.manual_seed(derive_seed(seed, place.pipe, place.data, 1))

    @contextmanager
    def tensor_parallel(self) -> Iterator[None]:
        """Draw from the tensor-parallel stream inside the block."""
        default = accelerator.get_rng_state()
        accelerator.set_rng_state(self._tensor_parallel_state)
        try:
            yield
        finally:
            self._tensor_parallel_state = accelerator.get_rng_state()
            accelerator.set_rng_state(default)

    def dropout(self, x: Tensor, p: float, *, training: bool, split: bool) -> Tensor:
        """Dropout of `x` with probability `p`; `split` says that each tensor-parallel rank holds another part of `x`."""
        if not training or p == 0.0:
            return x
        if not split:
            return F.dropout(x, p)
        with self.tensor_parallel():
            return F.dropout(x, p)

    def state_dict(self) -> dict[str, Tensor]:
        """States of every generator of this rank (uint8 tensors)."""
        return {
            "cpu": torch.get_rng_state(),
            "device": accelerator.get_rng_state(),
            "tensor_parallel": self._tensor_parallel_state.clone(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from saved states."""
        torch.set_rng_state(state["cpu"])
        accelerator.set_rng_state(state["device"])
        self._tensor_parallel_state = state["tensor_parallel"].clone()

    @contextmanager
    def replay(self, state: Tensor) -> Iterator[None]:
        """Draw the tensor-parallel stream from an earlier `state` inside the block, and leave the stream as it was found."""
        kept = self._tensor_parallel_state
        self._tensor_parallel_state = state
        try:
            yield
        finally:
            self._tensor_parallel_state = kept

    @property
    def tensor_parallel_state(self) -> Tensor:
        """The tensor-parallel stream's state now. Streams replace their state and never write into it, so a reference is a snapshot."""
        return self._tensor_parallel_state
