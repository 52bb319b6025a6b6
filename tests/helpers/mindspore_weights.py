"""Weights under the names and in the layout of MindSpore files, in every dialect."""

from __future__ import annotations

import numpy as np
import torch

from pangu.config import ModelConfig
from pangu.conversion import mindspore
from pangu.conversion.weights import Weights, model_specs
from pangu.tensor_files.lazy_tensor import LazyTensor

TABLE = "embedding_table"
# The original's name of each embedding and its name in the other dialects.
RENAMED = {
    "model zoo": {
        "backbone.word_embedding.": "backbone.embedding.word_embedding.",
        "backbone.position_embedding.": "backbone.embedding.position_embedding.",
    },
    "mindformers' converter": {
        f"backbone.word_embedding.{TABLE}": "word_embedding_table",
        f"backbone.position_embedding.{TABLE}": "position_embedding_table",
        f"backbone.top_query_embedding.{TABLE}": "query_embedding_table",
    },
    "pcl-pangu": {
        f"backbone.word_embedding.{TABLE}": TABLE,
        "backbone.position_embedding.": "backbone.embedding.embedding.position_embedding.",
        f"backbone.top_query_embedding.{TABLE}": "backbone.top_query_embedding_table",
    },
    "pipeline": {
        f"backbone.word_embedding.{TABLE}": TABLE,
        "backbone.position_embedding.": "backbone.pangu_alpha_embedding.position_embedding.",
        "backbone.top_query_layer.": "backbone.blocks.2.",
    },
}


def renamed(arrays: dict[str, np.ndarray], dialect: str) -> dict[str, np.ndarray]:
    out = {}
    for name, array in arrays.items():
        for old, new in RENAMED[dialect].items():
            name = name.replace(old, new)
        out[name] = array
    return out


def stored(weights: Weights) -> dict[str, np.ndarray]:
    """Under the original's names and in its layout."""
    names = mindspore.file_names(weights.config)
    return {name: mindspore.stored_layout(ours, weights.tensors[ours]).read().numpy() for ours, name in names.items()}


def tiny_config(**changes: object) -> ModelConfig:
    return ModelConfig(**{"num_layers": 2, "hidden_size": 8, "num_heads": 4, "vocab_size": 12, "max_positions": 5, **changes})  # type: ignore[arg-type]


def random_weights(dtype: torch.dtype = torch.float32, **changes: object) -> Weights:
    generator = torch.Generator().manual_seed(5)
    config = tiny_config(**changes)
    tensors = {}
    for name, spec in model_specs(config).items():
        tensor = torch.randn(spec.shape, generator=generator).to(dtype)
        tensors[name] = LazyTensor(spec.shape, dtype, lambda tensor=tensor: tensor)  # type: ignore[misc]
    return Weights(config, tensors, "random")
