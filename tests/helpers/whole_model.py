"""A small model in memory, to be written in any format."""

from __future__ import annotations

from pathlib import Path

import torch

from pangu.config import ModelConfig
from pangu.conversion.weights import Overrides, Weights, complete, model_specs
from pangu.tensor_files.lazy_tensor import LazyTensor


def small_weights(seed: int = 5, **sizes: int) -> Weights:
    """Weights with random values; `sizes` by `ModelConfig` key."""
    config = ModelConfig(**{"num_layers": 2, "hidden_size": 4, "num_heads": 2, "vocab_size": 12, "max_positions": 3, **sizes})
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(spec.shape, generator=generator) for name, spec in model_specs(config).items()}
    tensors = {name: LazyTensor(tuple(value.shape), value.dtype, lambda value=value: value) for name, value in values.items()}
    return complete(Path("memory"), tensors, Overrides(num_heads=config.num_heads), source="made here")


def equal(one: Weights, other: Weights) -> bool:
    """Whether two models have the same tensors, bit for bit."""
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(tensor.read(), other.tensors[name].read()) for name, tensor in one.tensors.items()
    )
