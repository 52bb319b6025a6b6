"""Weights that leave no parameter out, and files as the published PyTorch port writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.small_model import sharp_weights, small_config
from megatron_ext.context import ParallelContext
from megatron_ext.sharding import canonical_parameters
from pangu.config import ModelConfig
from pangu.conversion import megatron
from pangu.conversion.megatron import FILE
from pangu.conversion.weights import Weights
from pangu.model.model import PanguModel
from pangu.tensor_files.lazy_tensor import LazyTensor


def tensors_of(config: ModelConfig) -> dict[str, Tensor]:
    """Tensors none of which is zero or constant, biases included."""
    model = PanguModel(config, ParallelContext(fill=sharp_weights(3)))
    return {spec.name: parameter.detach() for spec, parameter in canonical_parameters(model)}


def weights_of(tensors: dict[str, Tensor], config: ModelConfig, **rest: Any) -> Weights:
    lazy = {name: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor) for name, tensor in tensors.items()}
    return Weights(config, lazy, "a test", **rest)


def config_8(**changes: Any) -> ModelConfig:
    return small_config(num_heads=8, **changes)


def assert_same(found: Weights, expected: dict[str, Tensor]) -> None:
    assert list(found.tensors) == list(expected)
    for name, tensor in expected.items():
        lazy = found.tensors[name]
        value = lazy.read()
        assert (lazy.shape, lazy.dtype) == (tuple(value.shape), value.dtype) == (tuple(tensor.shape), tensor.dtype), name
        assert torch.equal(value, tensor), name


def port_files(
    folder: Path,
    tensors: dict[str, Tensor],
    ranks: int = 1,
    *,
    pad_to: int = 1,
    padding: float = 1.0,
    legacy: bool = False,
    change: Callable[[dict[str, Any]], Any] = lambda root: None,
    **root: Any,
) -> Path:
    """Files as the port and its tools write them, made with torch alone."""
    num_layers = len({name.split(".")[2] for name in tensors if ".h." in name})
    for rank in range(ranks):
        model: dict[str, Any] = {}
        for ours, place in megatron._port_names(num_layers).items():
            tensor = tensors[ours]
            if ours == "transformer.wte.weight":
                missing = -tensor.shape[0] % (pad_to * ranks)
                tensor = torch.cat([tensor, torch.full((missing, tensor.shape[1]), padding, dtype=tensor.dtype)])
            split_dim = SPLIT_DIMS.get(".".join(ours.split(".")[-3:]) if ".h." in ours else ours)
            inner = model
            for section in place[:-1]:
                inner = inner.setdefault(section, {})
            inner[place[-1]] = tensor if split_dim is None else tensor.chunk(ranks, split_dim)[rank].clone()
        values = {"iteration": 5, "model": {"language_model": model}, **root}
        change(values)
        (folder / f"mp_rank_{rank:02d}").mkdir(parents=True)
        torch.save(values, folder / f"mp_rank_{rank:02d}" / FILE, _use_new_zipfile_serialization=not legacy)
    return folder


# What the port cuts along which dimension (facts of the format, written down apart from the code under test).
SPLIT_DIMS = {"transformer.wte.weight": 0, "attn.c_proj.weight": 1, "mlp.c_proj.weight": 1} | {
    f"{layer}.{kind}": 0 for layer in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.c_fc") for kind in ("weight", "bias")
}
