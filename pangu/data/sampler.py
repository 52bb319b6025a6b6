"""Which samples a data-parallel rank reads. The only state is the number of samples the whole run has consumed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Sampler:
    """Divides global batches among the data-parallel ranks.

    With c samples consumed, the next global batch of G is samples c to c + G - 1. It is cut into micro-batches in that order, and each
    data-parallel rank takes an equal number of consecutive ones. A sample's place in the global batch therefore never depends on the
    layout.

    Args:
        global_batch_size: G, samples per optimizer step; a multiple of micro_batch_size * D, which `resolve` has checked.
        micro_batch_size: samples per forward pass.
        data_parallel_size: D.
        data_parallel_rank: 0 to D - 1.
    """

    global_batch_size: int
    micro_batch_size: int
    data_parallel_size: int = 1
    data_parallel_rank: int = 0

    def __post_init__(self) -> None:
        assert self.global_batch_size % (self.micro_batch_size * self.data_parallel_size) == 0
        assert 0 <= self.data_parallel_rank < self.data_parallel_size

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches this rank reads for one global batch (the number of gradient accumulation steps)."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def micro_batches(self, consumed_samples: int) -> Iterator[range]:
        """Yield the sample numbers of each of this rank's micro-batches, endlessly, from `consumed_samples` on."""
        per_rank = self.micro_batches_per_step * self.micro_batch_size
        while True:
            first = consumed_samples + self.data_parallel_rank * per_rank
            for start in range(first, first + per_rank, self.micro_batch_size):
                yield range(start, start + self.micro_batch_size)
            consumed_samples += self.global_batch_size
