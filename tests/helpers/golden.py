"""The golden configuration, batches and weights, and the map from the project's canonical names to the original's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_ext.context import ParallelContext
from megatron_ext.sharding import ShardSpec
from pangu.config import ModelConfig
from pangu.model.block import RunOptions
from pangu.model.model import PanguModel

SIZES = {"num_layers": 3, "hidden_size": 64, "num_heads": 4, "vocab_size": 512, "max_positions": 32}

_IN_BLOCK = {
    "ln_1.weight": "layernorm1.gamma",
    "ln_1.bias": "layernorm1.beta",
    "ln_2.weight": "layernorm2.gamma",
    "ln_2.bias": "layernorm2.beta",
    "attn.q_proj": "attention.dense1",
    "attn.k_proj": "attention.dense2",
    "attn.v_proj": "attention.dense3",
    "attn.c_proj": "attention.projection",
    "mlp.c_fc": "output.mapping",
    "mlp.c_proj": "output.projection",
}
_TRANSPOSED = ("attention.projection.weight", "output.mapping.weight", "output.projection.weight")


def mindspore_name(name: str) -> str:
    """The original name of a canonical parameter of the three-layer golden model."""
    embedding = {"wte": "word_embedding", "wpe": "position_embedding", "wqe": "top_query_embedding"}
    if match := re.fullmatch(r"transformer\.(wte|wpe|wqe)\.weight", name):
        return f"backbone.{embedding[match[1]]}.embedding_table"
    if match := re.fullmatch(r"transformer\.ln_f\.(weight|bias)", name):
        return "backbone.layernorm." + {"weight": "gamma", "bias": "beta"}[match[1]]
    match = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", name)
    assert match, name
    block = "backbone.top_query_layer." if match[1] == "2" else f"backbone.blocks.{match[1]}."
    rest = match[2]
    for ours, theirs in _IN_BLOCK.items():
        if rest.startswith(ours):
            return block + rest.replace(ours, theirs)
    raise AssertionError(name)


def to_mindspore(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Canonical full tensors under the original names and in the original layout."""
    out = {}
    for name, tensor in tensors.items():
        theirs = mindspore_name(name)
        out[theirs] = tensor.detach().numpy().T if theirs.endswith(_TRANSPOSED) else tensor.detach().numpy()
    return out


def fill_from(arrays: dict[str, np.ndarray]) -> Any:
    """A `ParamInit` that writes the original's arrays into each slice."""

    def fill(local: Tensor, spec: ShardSpec, rank: int, size: int) -> None:
        theirs = mindspore_name(spec.name)
        array = arrays[theirs].T if theirs.endswith(_TRANSPOSED) else arrays[theirs]
        local.copy_(spec.slice(torch.from_numpy(np.ascontiguousarray(array)), rank, size))

    return fill


def golden_weights(shared: Path) -> dict[str, np.ndarray]:
    """The original's weights."""
    return dict(np.load(shared / "oracle/A/weights.npz"))


def golden_model(
    shared: Path, *, context: dict[str, Any] | None = None, recompute: str = "none", reset_at_document: bool = False, **model: Any
) -> PanguModel:
    """The model with the original's weights, without dropout."""
    config = ModelConfig(**{**SIZES, "hidden_dropout": 0.0, "attention_dropout": 0.0, **model})
    options = RunOptions(recompute=recompute, reset_at_document=reset_at_document)
    return PanguModel(config, ParallelContext(fill=fill_from(golden_weights(shared)), **(context or {})), options)


def golden_batch(case: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens, position ids, labels, loss mask."""
    ids = torch.from_numpy(case["input_ids"]).long()
    return ids[:, :-1], torch.from_numpy(case["position_ids"]).long(), ids[:, 1:], torch.from_numpy(case["loss_mask"])
