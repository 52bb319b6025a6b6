"""The common form of weights, between all readers and writers: a model's tensors by canonical name, read one at a time.

A reader is a function `read(path, overrides) -> Weights`, a writer `write(weights, output, options)`; a format's file has one or both, so N
formats need N readers and N writers. A conversion holds one tensor in memory, whatever the model's size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.context import ParallelContext
from megatron_ext.sharding import ShardSpec, canonical_parameters
from pangu.config import ModelConfig
from pangu.config.presets import MODEL_PRESETS
from pangu.config.sizes import MAX_EXTENT, MAX_LAYERS, check_sizes
from pangu.errors import InputError, one_line
from pangu.model.model import PanguModel
from pangu.tensor_files.lazy_tensor import LazyTensor

VOCAB_SIZE = 40000
"""Number of ids of the published vocabulary; a table that the source's tool has padded is cut to it."""

# Heads cannot be seen in weights: every published size has its own (arXiv 2104.12369, Table 1).
_HEADS_BY_HIDDEN_SIZE = {preset["hidden_size"]: preset["num_heads"] for preset in MODEL_PRESETS.values()}


States = Mapping[str, Mapping[str, LazyTensor]]
"""Adam's states, by state (`exp_avg`, `exp_avg_sq`: running means of the gradient and of its square) and canonical name."""


@dataclass(frozen=True)
class Overrides:
    """Facts about the model that weights do not contain; None uses the format's default."""

    num_heads: int | None = None
    gelu: str | None = None
    final_norm: str | None = None
    problems: list[str] | None = None
    """For an inspection: problems are added to this list and reading continues. None: the first problem raises InputError."""

    @property
    def strict(self) -> bool:
        """Whether the first problem raises InputError."""
        return self.problems is None

    def report(self, where: Path, problems: Sequence[str], ending: str = "") -> None:
        """Raise InputError about the first problem and the number of further ones, or collect all of them.

        Raises:
            InputError: unless problems are collected.
        """
        if self.problems is not None:
            self.problems.extend(f"{where}: {problem}" for problem in problems)
        elif problems:
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise InputError(f"{where}: {one_line(problems[0])}{more}{ending}")


@dataclass(frozen=True)
class WriteOptions:
    """Options of a writer."""

    dtype: torch.dtype | None = None
    """Dtype of the written tensors; None keeps each tensor's own."""
    tensor_parallel: int = 1
    """Number of files into which a tensor-parallel format splits the model."""


@dataclass(frozen=True)
class Weights:
    """A complete model: every tensor of its configuration, with the right shape, and no other. Problems that were collected while it was
    read (`Overrides.problems`) name the exceptions.
    """

    config: ModelConfig
    """The model's configuration. If problems were collected, an unknown `num_heads` is 0, from which no model can be built."""
    tensors: Mapping[str, LazyTensor]
    source: str
    """Description of the format and the dialect."""
    step: int | None = None
    """Training step, if the source contains it."""
    left_out: Sequence[str] = field(default_factory=tuple)
    """Names in the source that are not weights: optimizer states, bookkeeping."""
    tokenizer: Path | None = None
    """Path of a `vocab.model` beside the weights."""
    files: Sequence[Path] = field(default_factory=tuple)
    """Files of the source, except configuration and tokenizer."""
    layout: Mapping[str, int] = field(default_factory=dict)
    """How the source is split: number of ranks, or training's tensor, pipeline and data sizes and ZeRO stage; empty if it is not split."""
    open_optimizer: Callable[[], States] | None = None
    """Opens the optimizer's states, if the source has them; one of them is `fp32`, the weights, if `tensors` are rounded."""
    optimizer: States = field(default_factory=dict)
    """Optimizer states to write with the weights."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in: that of the word embedding."""
        return self.tensors["transformer.wte.weight"].dtype

    def with_optimizer(self) -> Weights:
        """The same weights in fp32, with the states of the optimizer that trained them.

        Raises:
            InputError: if the source holds no optimizer states.
        """
        if self.open_optimizer is None:
            raise InputError(f"{self.source}: holds no optimizer states. Leave out --with-optimizer.")
        states = dict(self.open_optimizer())
        masters = states.pop("fp32", self.tensors)
        return replace(self, tensors={name: masters[name] for name in self.tensors}, optimizer=states)

    def refuse_other(self, model: ModelConfig, where: str) -> None:
        """Check that a model's configuration is that of these weights.

        Raises:
            InputError: begins with `where` and names the key that differs.
        """
        found = self.config.identity()
        for key, ours in model.identity().items():
            theirs = found[key]
            if ours != theirs:
                raise InputError(f"{where}: its {key} is {theirs}, but model.{key} = {ours}. Set model.{key}={theirs}.")

    def fill(self, local: Tensor, spec: ShardSpec, rank: int, size: int) -> None:
        """Copy one rank's slice of a tensor into `local` (a `ParamInit`), reading no more than that if the format allows it."""
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


Advance = Callable[[int], None]
"""Called with the number of bytes that were read since the last call."""


@dataclass(frozen=True)
class Checksums:
    """What a format keeps of its files to tell whether they are as they were written."""

    files: Callable[[Path, Weights | None], list[Path]]
    """The files that are covered, for a path and the weights that were read from it."""
    verify: Callable[[Path, list[Path], Advance], tuple[list[str], list[str]]]
    """Reads those files; returns a line for each problem, and notes."""
    without_weights: bool = False
    """Files can be verified where no weights can be read."""


def model_specs(config: ModelConfig) -> dict[str, ShardSpec]:
    """The spec of every parameter of a model by its canonical name, in the model's order. Nothing is allocated."""
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
    num_layers: int = 0,
    described: Mapping[str, Any] | None = None,
    **rest: Any,
) -> Weights:
    """Build weights from what a reader found: sizes are inferred from the tensors, and the model must be complete.

    Args:
        where: the source, for messages.
        tensors: the tensors by canonical name.
        overrides: the user's settings.
        source: see `Weights.source`.
        gelu: the activation that the format or dialect implies.
        final_norm: the position of the final LayerNorm that the format or dialect implies.
        num_layers: number of layers in the source's names; a query layer without tensors would not show up in the canonical names.
        described: values from a configuration beside the tensors, by `ModelConfig` key. A size that the tensors contradict is refused.
        rest: other fields of `Weights`.

    Raises:
        InputError: naming the tensor that is missing, unknown or of the wrong shape, or the size that disagrees; and always, even where
            problems are collected, if what is there describes no PanGu model.
    """
    described = dict(described or {})
    for name, tensor in tensors.items():
        if not all(0 < extent < MAX_EXTENT for extent in tensor.shape):
            raise InputError(f"{where}: {name} has shape {list(tensor.shape)}, which no weight has.")
    sizes = _infer_sizes(where, tensors, num_layers)
    if overrides.strict and 8 * sizes["num_layers"] > len(tensors):  # half of them missing: not worth building the model to compare with
        raise InputError(f"{where}: holds tensors of layer {sizes['num_layers'] - 1}, but just {len(tensors)} in all; more are missing.")
    different = [key for key, inferred in sizes.items() if described.get(key, inferred) != inferred]
    overrides.report(
        where, [f"its configuration says {key} = {described[key]}, but its tensors have {sizes[key]}" for key in different], "."
    )
    hidden = sizes["hidden_size"]
    num_heads = overrides.num_heads or described.get("num_heads") or _HEADS_BY_HIDDEN_SIZE.get(hidden)
    if num_heads is None and overrides.strict:
        raise InputError(f"{where}: weights do not say how many attention heads hidden size {hidden} is cut into. Give --heads.")
    values = described | sizes | {"num_heads": num_heads or 1, "gelu": overrides.gelu or described.get("gelu", gelu)}
    values["final_norm"] = overrides.final_norm or described.get("final_norm", final_norm)
    try:
        config = ModelConfig.model_validate(values)
        check_sizes(config)
    except ValueError as error:
        raise InputError(f"{where}: {_first_problem(error)}") from None
    specs = model_specs(config)
    ending = f"; a model of {config.num_layers} layers has {len(specs)} tensors."
    unknown = sorted(tensors.keys() - specs.keys())
    overrides.report(where, [f"lacks {name}" for name in sorted(specs.keys() - tensors.keys())], ending)
    overrides.report(where, [f"holds unknown {name[:120]}" for name in unknown], ending)
    present = {name: tensors[name] for name in specs if name in tensors}
    wrong = [name for name, tensor in present.items() if tensor.shape != specs[name].shape]
    overrides.report(where, [f"{name} has shape {list(tensors[name].shape)}, expected {list(specs[name].shape)}" for name in wrong], ".")
    if num_heads is None:
        config = config.model_copy(update={"num_heads": 0})
    return Weights(config, present | {name: tensors[name] for name in unknown}, source, **rest)


def _infer_sizes(where: Path, tensors: Mapping[str, LazyTensor], num_layers: int) -> dict[str, int]:
    """Each size from the first tensor that shows it; one that is missing or has another is found when all are compared. What nothing shows
    is left to the configuration.
    """
    layers = {int(match[1]) for name in tensors if (match := re.match(r"transformer\.h\.(\d{1,4})\.", name))}
    if not layers:
        raise InputError(f"{where}: holds no layers; it is not a PanGu model.")
    num_layers = max(num_layers, max(layers) + 1)
    if num_layers > min(len(tensors), MAX_LAYERS):
        raise InputError(f"{where}: its names are those of {num_layers} layers, its tensors {len(tensors)}; it is not a PanGu model.")
    words, positions, queries = (f"transformer.{name}.weight" for name in ("wte", "wpe", "wqe"))
    widths = [(f"transformer.h.{layer}.mlp.c_fc.bias", 0, 1) for layer in sorted(layers)]
    shown = {  # tensor, its dimension that has the size, and how many dimensions there are
        "hidden_size": [(words, 1, 2), (positions, 1, 2), (queries, 1, 2), ("transformer.ln_f.weight", 0, 1)],
        "vocab_size": [(words, 0, 2)],
        "max_positions": [(positions, 0, 2), (queries, 0, 2)],
        "ffn_hidden_size": widths,
    }
    sizes = {"num_layers": num_layers}
    for key, candidates in shown.items():
        for name, dim, dims in candidates:
            if name in tensors and len(tensors[name].shape) == dims:
                sizes[key] = tensors[name].shape[dim]
                break
    if "hidden_size" not in sizes:
        raise InputError(f"{where}: lacks {words} and whatever else shows the hidden size; it is not a PanGu model.")
    return sizes


def _first_problem(error: ValueError) -> str:
    """pydantic's first error in one line."""
    problems = error.errors() if hasattr(error, "errors") else [{"msg": str(error), "loc": ()}]
    return f"{'.'.join(map(str, problems[0]['loc']))} {problems[0]['msg']}".strip() + "."
