"""Random-number streams of one rank.

Dropout draws from two streams. Activations that every tensor-parallel rank holds whole (the residual stream without sequence parallelism)
must get the same mask on all of them: it is drawn from the default generator, seeded by (seed, pipe, data). Activations that are split over
the ranks (attention heads, a slice of the sequence) must be masked independently: these masks are drawn from the tensor-parallel stream,
seeded by (seed, pipe, data, tensor).
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
    """A 63-bit seed derived by hashing from all the words, their order included."""
    return int(np.random.SeedSequence((*words, len(words))).generate_state(1, np.uint64)[0]) >> 1


class RngStreams:
    """The default stream and the tensor-parallel stream of one rank.

    Args:
        seed: the run's seed. None: both streams start from the default generator's current state, for models without dropout.
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
        """Apply dropout with probability `p` to `x`. `split`: whether each tensor-parallel rank holds a different part of `x`."""
        if not training or p == 0.0:
            return x
        if not split:
            return F.dropout(x, p)
        with self.tensor_parallel():
            return F.dropout(x, p)

    def state_dict(self) -> dict[str, Tensor]:
        """States of all generators of this rank (uint8 tensors)."""
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
        """Rewind the tensor-parallel stream to an earlier `state` inside the block, and restore it afterwards."""
        kept = self._tensor_parallel_state
        self._tensor_parallel_state = state
        try:
            yield
        finally:
            self._tensor_parallel_state = kept

    @property
    def tensor_parallel_state(self) -> Tensor:
        """The tensor-parallel stream's current state (uint8). States are replaced and never modified, so a reference is a snapshot."""
        return self._tensor_parallel_state
