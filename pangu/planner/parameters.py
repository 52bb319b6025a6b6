"""Which parameters a rank holds, by arithmetic: no module is built.

The sizes are those of the real model's parameters, in its order (tests/pangu/planner/test_parameters.py builds both and compares).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from pangu.config import ModelConfig


@dataclass(frozen=True)
class RankParameters:
    """Elements of each parameter that a rank holds before ZeRO shards them, in the module's order."""

    matrices: tuple[int, ...]
    """Matrices and tables: what weight decay applies to, the optimizer's first group."""
    vectors: tuple[int, ...]
    """Biases and LayerNorms: its second group."""

    @cached_property
    def groups(self) -> tuple[int, int]:
        """Elements of each group."""
        return sum(self.matrices), sum(self.vectors)

    @property
    def total(self) -> int:
        """Elements in all."""
        return sum(self.groups)


@lru_cache(maxsize=4096)
def rank_parameters(model: ModelConfig, tensor: int, num_layers: int, *, first: bool, last: bool) -> RankParameters:
    """Parameters of a rank of one pipeline stage.

    Args:
        model: what the network is.
        tensor: tensor-parallel size; it divides heads and MLP width. The vocabulary is padded.
        num_layers: transformer layers of the stage, the query layer included.
        first: the stage holds the embeddings.
        last: the stage holds the final LayerNorm, the query layer and the logits: the tied table's copy where it is not the first too.
    """
    h, f = model.hidden_size, model.ffn_hidden_size
    words, positions = -(-model.vocab_size // tensor) * h, model.max_positions * h
    # Query, key, value and output projection; the two matrices of the MLP.
    layer_matrices = (h * h // tensor,) * 4 + (f * h // tensor,) * 2
    layer_norm, output_bias = (h, h), (h,)
    attention_biases, mlp_bias = (h // tensor,) * 3, (f // tensor,)
    layer_vectors = layer_norm + attention_biases + output_bias + layer_norm + mlp_bias + output_bias

    matrices = layer_matrices * num_layers
    vectors = layer_vectors * num_layers
    if first:
        matrices = (words, positions, *matrices)
    if last:
        matrices += (positions,) if first else (positions, words)
        vectors = layer_vectors * (num_layers - 1) + layer_norm + layer_vectors
    return RankParameters(matrices, vectors)


def stage_parameters(model: ModelConfig, tensor: int, stage_layers: tuple[int, ...]) -> list[RankParameters]:
    """`rank_parameters` of every stage."""
    last = len(stage_layers) - 1
    return [rank_parameters(model, tensor, n, first=stage == 0, last=stage == last) for stage, n in enumerate(stage_layers)]
