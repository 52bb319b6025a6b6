"""What every format of weights is read into and written from: a model's tensors by canonical name, read one at a time.

A reader is a function `read(path, overrides) -> Weights`, a writer `write(weights, output, options)`; a format's file has one or both, so N
formats need N readers and N writers. A conversion holds one tensor in memory, whatever the model's size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.context import ParallelContext
from megatron_ext.sharding import ShardSpec, canonical_parameters
from pangu.config import ModelConfig
from pangu.errors import InputError
from pangu.model.model import PanguModel

MAX_LAYERS, MAX_EXTENT = 512, 2**30
"""Bounds that no model comes near: to build one, if only its shapes, costs a millisecond and 100 kB a layer."""
VOCAB_SIZE = 40000
"""Rows of the published vocabulary; a table with more of them that the source's tool padded is cut to it."""

# Heads cannot be seen in weights: every published size has its own (arXiv 2104.12369, Table 1).
HEADS_BY_HIDDEN_SIZE = {1024: 16, 2560: 32, 5120: 40, 16384: 128}


@dataclass(frozen=True)
class LazyTensor:
    """A full tensor in the canonical layout that is read when it is asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Reads it. The result may be a view of a memory-mapped file: do not write into it, and drop it before reading the next."""
    read_part: Callable[[int, int, int], Tensor] | None = None
    """Reads [begin, end) along a dimension, where the format can do that without reading all: (dimension, begin, end)."""


@dataclass(frozen=True)
class Overrides:
    """What weights do not say about the model; None takes the format's own answer."""

    num_heads: int | None = None
    gelu: str | None = None
    final_norm: str | None = None


@dataclass(frozen=True)
class WriteOptions:
    """How a writer writes."""

    dtype: torch.dtype | None = None
    """Of the written tensors; None keeps each tensor's own."""
    tensor_parallel: int = 1
    """Number of files a tensor-parallel format splits the model into."""


@dataclass(frozen=True)
class Weights:
    """A complete model: every tensor of its configuration, with the right shape, and no other."""

    config: ModelConfig
    tensors: Mapping[str, LazyTensor]
    source: str
    """Format and dialect, in words."""
    step: int | None = None
    """Training step, where the source says it."""
    left_out: Sequence[str] = field(default_factory=tuple)
    """Names in the source that are no weights: optimizer states, bookkeeping."""
    tokenizer: Path | None = None
    """A `vocab.model` that lies beside the weights."""

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in: that of the word embedding."""
        return self.tensors["transformer.wte.weight"].dtype

    def fill(self, local: Tensor, spec: ShardSpec, rank: int, size: int) -> None:
        """Write one rank's slice of a tensor into `local` (a `megatron_ext.context.Fill`), reading no more than that if the format can."""
        tensor = self.tensors[spec.name]
        if spec.split_dim is None or size == 1 or tensor.read_part is None:
            local.copy_(spec.slice(tensor.read(), rank, size))
            return
        width, whole = local.shape[spec.split_dim], spec.shape[spec.split_dim]
        begin = min(spec.offset(rank, size), whole)
        end = min(begin + width, whole)
        local.zero_()  # a rank may hold padding
        if begin < end:
            local.narrow(spec.split_dim, 0, end - begin).copy_(tensor.read_part(spec.split_dim, begin, end))


def model_specs(config: ModelConfig) -> dict[str, ShardSpec]:
    """Every parameter of a model by its canonical name, in the model's order. Nothing is allocated."""
    model = PanguModel(config, ParallelContext(device=torch.device("meta")))
    return {spec.name: spec for spec, _ in canonical_parameters(model)}


def complete(
    where: Path,
    tensors: Mapping[str, LazyTensor],
    overrides: Overrides,
    *,
    source: str,
    gelu: str = "tanh",
    final_norm: str = "before_query",
    described: Mapping[str, Any] | None = None,
    **rest: Any,
) -> Weights:
    """Weights from what a reader found: sizes are inferred from the tensors, and the model must be whole.

    Args:
        where: the source, for messages.
        tensors: by canonical name.
        overrides: the user's.
        source: see `Weights.source`.
        gelu: what the format or dialect implies.
        final_norm: likewise.
        described: what a configuration beside the tensors says, by `ModelConfig` key. A size that the tensors contradict is refused.
        rest: other fields of `Weights`.

    Raises:
        InputError: naming the tensor that is missing, unknown or of the wrong shape, or the size that disagrees.
    """
    described = dict(described or {})
    for name, tensor in tensors.items():
        if not all(0 < extent < MAX_EXTENT for extent in tensor.shape):
            raise InputError(f"{where}: {name} has shape {list(tensor.shape)}; no weight has.")
    sizes = _infer_sizes(where, tensors)
    for key, inferred in sizes.items():
        if described.get(key, inferred) != inferred:
            raise InputError(
                f"{where}: its configuration says {key} = {described[key]}, but its tensors have {inferred}. One of them is wrong."
            )
    hidden = sizes["hidden_size"]
    num_heads = overrides.num_heads or described.get("num_heads") or HEADS_BY_HIDDEN_SIZE.get(hidden)
    if num_heads is None:
        raise InputError(f"{where}: weights do not say how many attention heads hidden size {hidden} is cut into. Give --heads.")
    values = described | sizes | {"num_heads": num_heads, "gelu": overrides.gelu or described.get("gelu", gelu)}
    values["final_norm"] = overrides.final_norm or described.get("final_norm", final_norm)
    try:
        config = ModelConfig.model_validate(values)
        check_sizes(config)
    except ValueError as error:
        raise InputError(f"{where}: {_first_problem(error)}") from None
    specs = model_specs(config)
    for what, names in (("lacks", specs.keys() - tensors.keys()), ("holds unknown", tensors.keys() - specs.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{where}: {what} {min(names)}{more}; a model of {config.num_layers} layers has {len(specs)} tensors.")
    for name, spec in specs.items():
        if tensors[name].shape != spec.shape:
            raise InputError(f"{where}: {name} has shape {list(tensors[name].shape)}, expected {list(spec.shape)}.")
    return Weights(config, {name: tensors[name] for name in specs}, source, **rest)


def _infer_sizes(where: Path, tensors: Mapping[str, LazyTensor]) -> dict[str, int]:
    def shape(name: str, dims: int) -> tuple[int, ...]:
        if name not in tensors:
            raise InputError(f"{where}: lacks {name}; it is no complete PanGu model.")
        if len(tensors[name].shape) != dims:
            raise InputError(f"{where}: {name} has shape {list(tensors[name].shape)}, expected {dims} dimensions.")
        return tensors[name].shape

    layers = {int(match[1]) for name in tensors if (match := re.match(r"transformer\.h\.(\d{1,4})\.", name))}
    if not layers:
        raise InputError(f"{where}: holds no layers; it is no PanGu model.")
    if 16 * (max(layers) + 1) > len(tensors):
        raise InputError(
            f"{where}: holds tensors of layer {max(layers)}, but just {len(tensors)} in all; {max(layers) + 1} layers have more."
        )
    vocab_size, hidden = shape("transformer.wte.weight", 2)
    return {
        "num_layers": max(layers) + 1,
        "hidden_size": hidden,
        "vocab_size": vocab_size,
        "max_positions": shape("transformer.wpe.weight", 2)[0],
        "ffn_hidden_size": shape("transformer.h.0.mlp.c_fc.weight", 2)[0],
    }


def check_sizes(config: ModelConfig) -> None:
    """Refuse a model that would cost memory or time by its description alone.

    Raises:
        ValueError: if a size is out of all proportion.
    """
    if config.num_layers > MAX_LAYERS:
        raise ValueError(f"{config.num_layers} layers, at most {MAX_LAYERS} expected")
    for key in ("hidden_size", "vocab_size", "max_positions", "ffn_hidden_size"):
        if getattr(config, key) >= MAX_EXTENT:
            raise ValueError(f"{key} = {getattr(config, key):.3g}, less than {MAX_EXTENT:,} expected")


def _first_problem(error: ValueError) -> str:
    """pydantic's first complaint in one line."""
    problems = error.errors() if hasattr(error, "errors") else [{"msg": str(error), "loc": ()}]
    return f"{'.'.join(map(str, problems[0]['loc']))} {problems[0]['msg']}".strip() + "."
