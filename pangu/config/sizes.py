"""Number of parameters of a model or a rank, and the floating-point operations per token, by arithmetic: no module is built.

Everything here follows from one formula, `rank_parameters`. The sizes are those of the real model's parameters, in its order
(tests/pangu/config/test_rank_parameters.py builds both and compares).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from pangu.config.schema import ModelConfig

MAX_LAYERS, MAX_EXTENT = 512, 2**30
"""Upper bounds far above any real model. Even building only the shapes of a model takes a millisecond and 100 kB per layer."""


@dataclass(frozen=True)
class RankParameters:
    """Number of elements of each parameter that a rank holds, before ZeRO shards them, in the module's order."""

    matrices: tuple[int, ...]
    """Sizes of the matrices and embedding tables, to which weight decay applies: the optimizer's first parameter group."""
    vectors: tuple[int, ...]
    """Sizes of the biases and LayerNorm parameters: the optimizer's second parameter group."""

    @cached_property
    def groups(self) -> tuple[int, int]:
        """Number of elements of each parameter group."""
        return sum(self.matrices), sum(self.vectors)

    @property
    def total(self) -> int:
        """Number of elements of all parameters."""
        return sum(self.groups)


@lru_cache(maxsize=4096)
def rank_parameters(model: ModelConfig, tensor: int, num_layers: int, *, first: bool, last: bool) -> RankParameters:
    """Parameters of a rank of one pipeline stage.

    Args:
        model: the network.
        tensor: tensor-parallel size; it divides heads and MLP width. The vocabulary is padded.
        num_layers: transformer layers of the stage, the query layer included.
        first: the stage holds the embeddings.
        last: the stage holds the final LayerNorm, the query layer and the logits, whose weight is a copy of the tied table unless `first`.
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


def num_parameters(model: ModelConfig) -> int:
    """Exact number of trainable parameters, with the output layer tied to the word embedding and the vocabulary not padded.

    With ffn = 4h a layer has 12h² + 13h, and the model V·h + 2·P·h + L·(12h² + 13h) + 2h: word embedding, position and query embeddings,
    layers, final LayerNorm.
    """
    return rank_parameters(model, 1, model.num_layers, first=True, last=True).total


def layer_costs(model: ModelConfig) -> list[int]:
    """Cost of each transformer layer for balancing pipeline stages: its parameters, and those of what is always on the same stage.

    Time, memory and optimizer step of a layer are proportional to its parameters; so are those of the logits, and memory and optimizer
    step of the embedding.
    """
    middle, first, last = (
        rank_parameters(model, 1, 1, first=first, last=last).total for first, last in ((False, False), (True, False), (False, True))
    )
    costs = [middle] * model.num_layers
    costs[0] += first - middle
    costs[-1] += last - middle
    return costs


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations to train on one token: 6 per parameter that multiplies, and 12·L·H·S for attention.

    The convention of the field: recomputation is not counted, attention is counted as if not causal, position tables are left out.
    """
    multiplied = num_parameters(model) - 2 * model.max_positions * model.hidden_size
    return 6.0 * multiplied + 12.0 * model.num_layers * model.hidden_size * sequence_length


def check_sizes(config: ModelConfig) -> None:
    """Refuse a model so large that even building its shapes would take too much memory or time.

    Raises:
        ValueError: if a size is above MAX_LAYERS or MAX_EXTENT.
    """
    if config.num_layers > MAX_LAYERS:
        raise ValueError(f"{config.num_layers} layers, at most {MAX_LAYERS} expected")
    for key in ("hidden_size", "vocab_size", "max_positions", "ffn_hidden_size"):
        if getattr(config, key) >= MAX_EXTENT:
            raise ValueError(f"{key} = {getattr(config, key):.3g}, less than {MAX_EXTENT:,} expected")
