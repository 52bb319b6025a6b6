"""The files of this project's training checkpoints, read without starting an engine, from whatever layout and ZeRO stage saved them.

    step_00000100/manifest.json                                      what the model and the layout were (pangu.training.checkpoint)
    step_00000100/mp_rank_TT_model_states.pt                         no pipeline: the weights of tensor rank TT
    step_00000100/layer_LL-model_TT-model_states.pt                  pipeline: those of one layer
    step_00000100/[bf16_]zero_pp_rank_D_mp_rank_TT_optim_states.pt   ZeRO-3: the fp32 weights, a D-th of each parameter

The weights are those the model computes with: 16-bit ones where it trained in 16 bits, as training itself exports them. Optimizer states
and fp32 master copies stay behind. Under ZeRO-3 only fp32 partitions are saved, and rounding these gives the same bits. Which parameter a
tensor is, and how it was cut, is what the model's own parts say when they are built without memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ext import accelerator
from megatron_ext.context import ParallelContext
from megatron_ext.errors import LayoutError
from megatron_ext.sharding import ShardSpec, spec_of
from pangu.config import ModelConfig
from pangu.config.sizes import check_sizes
from pangu.engine.manifest import MANIFEST, Progress, complete_steps, read_manifest
from pangu.engine.pipeline import pipeline_layers, quiet
from pangu.errors import InputError
from pangu.model.block import RunOptions
from pangu.model.model import PanguModel
from pangu.tensor_files.lazy_tensor import LazyTensor, merged
from pangu.tensor_files.torch_file import StoredTensor, load

_LAYOUT = {"tensor": "parallel.tensor", "pipeline": "parallel.pipeline", "data": "data-parallel size", "zero": "parallel.zero_stage"}


@dataclass
class Checkpoint:
    """The directory of one training checkpoint, with the content of its manifest."""

    folder: Path
    sizes: dict[str, int]
    """Size of every file in bytes, from the manifest."""
    layout: dict[str, int]
    model: dict[str, Any]
    """The model's configuration, by `ModelConfig` key."""
    stage_layers: Any
    """Layers of each pipeline stage from the manifest, unchecked; None in an older manifest."""
    precision: str
    progress: Progress
    opened: set[str] = field(default_factory=set)

    @property
    def config(self) -> ModelConfig:
        """The model's configuration, which is checked only by itself: readers compare it with the files before they build the model."""
        try:
            config = ModelConfig.model_validate(self.model)
            check_sizes(config)
            return config
        except ValueError:
            raise InputError(f"{self.folder / MANIFEST}: describes an impossible model: {json.dumps(self.model)[:200]}.") from None

    def load(self, name: str) -> dict[Any, Any]:
        """Load the content of a file.

        Raises:
            InputError: if the file is missing, has another size than the manifest says, or is damaged.
        """
        file = self.folder / name
        if name not in self.sizes or not file.is_file() or file.stat().st_size != self.sizes[name]:
            expected = f"{self.sizes[name]:,} bytes" if name in self.sizes else "listed in the manifest"
            raise InputError(f"{file}: missing or changed; expected {expected}. The checkpoint is not complete: copy it again.")
        self.opened.add(name)
        root = load(file)
        if not isinstance(root, dict):
            raise InputError(f"{file}: is not a checkpoint file of DeepSpeed.")
        return root


def locate(path: Path) -> Path:
    """The checkpoint directory for a path: the path itself, or the newest complete checkpoint in it.

    Raises:
        InputError: if there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    for folder in (path, path / "checkpoints"):
        if steps := complete_steps(folder):
            return folder / steps[-1]
    raise InputError(f"{path}: no training checkpoint: neither it nor a step_N in it or in its checkpoints/ has a {MANIFEST}.")


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint that a path names, or the newest in it; only its manifest is read.

    Raises:
        InputError: if there is none, or its manifest is not one.
    """
    folder = locate(path)
    try:
        manifest = read_manifest(folder)
        identity: dict[str, Any] = manifest.identity
        sizes = {name: described.bytes for name, described in manifest.files.items()}
        layout = {key: identity[stored] for key, stored in _LAYOUT.items()}
        model = {key: identity[f"model.{key}"] for key in ModelConfig.model_fields if f"model.{key}" in identity}
        stage_layers = identity.get("parallel.stage_layers")
        precision = identity["train.precision"]
    except (OSError, ValueError, KeyError):
        raise InputError(f"{folder / MANIFEST}: not the manifest of a complete checkpoint.") from None
    lowest = {"tensor": 1, "pipeline": 1, "data": 1, "zero": 0}
    whole = all(type(value) is int and lowest[key] <= value <= len(sizes) + 3 for key, value in layout.items())
    if not whole or precision not in ("fp32", "bf16", "fp16"):
        raise InputError(f"{folder / MANIFEST}: describes an impossible layout: {json.dumps(layout)[:200]}.")
    return Checkpoint(folder, sizes, layout, model, stage_layers, precision, manifest.progress)


# --- what each layout left ----------------------------------------------------------------------------------------------------------------


def read_tensors(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """Every weight of a checkpoint by canonical name, whatever layout saved it.

    Raises:
        InputError: naming the file that is missing, damaged or is not what the manifest says.
    """
    try:
        if checkpoint.layout["pipeline"] > 1:
            return _pipeline_tensors(checkpoint)
        if checkpoint.layout["zero"] == 3:
            return _partitioned_tensors(checkpoint)
        return _plain_tensors(checkpoint)
    except LayoutError as error:
        raise InputError(f"{checkpoint.folder}: its {MANIFEST} describes an impossible layout: {error}") from None


def _plain_tensors(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """No pipeline, ZeRO 0 to 2: one file per tensor rank holds its slice of the whole model."""
    modules = [
        section(checkpoint, name, checkpoint.load(name), "module")
        for name in (f"mp_rank_{rank:02d}_model_states.pt" for rank in range(checkpoint.layout["tensor"]))
    ]
    specs = model_parameters(checkpoint, len(modules[0]))
    return merge(checkpoint, specs, [_stored(checkpoint, module, specs) for module in modules])


def _pipeline_tensors(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """A pipeline: one file per layer and tensor rank. A layer that is tied to an earlier one has no file."""
    if checkpoint.config.num_layers > len(checkpoint.sizes):
        raise InputError(f"{checkpoint.folder}: {checkpoint.config.num_layers} layers, but just {len(checkpoint.sizes)} files.")
    tensors: dict[str, LazyTensor] = {}
    for index, specs in enumerate(pipeline_parameters(checkpoint.config)):
        if all(spec.name in tensors for spec in specs.values()):
            continue
        names = [f"layer_{index:02d}-model_{rank:02d}-model_states.pt" for rank in range(checkpoint.layout["tensor"])]
        tensors |= merge(checkpoint, specs, [_stored(checkpoint, checkpoint.load(name), specs) for name in names])
    return tensors


def _partitioned_tensors(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """ZeRO-3: every data rank holds an equal part of each parameter, rounded up, one after the other in flat fp32 buffers."""
    slices = []
    specs: dict[str, ShardSpec] = {}
    for tensor_rank in range(checkpoint.layout["tensor"]):
        # Every data rank's model file is the same: which parameters in which order. Its tensors are empty, but have the model's dtype.
        name = f"zero_pp_rank_0_mp_rank_{tensor_rank:02d}_model_states.pt"
        root = checkpoint.load(name)
        module = section(checkpoint, name, root, "module")
        groups = root.get("param_shapes")
        if type(groups) is not list or not all(isinstance(group, dict) for group in groups):
            raise InputError(f"{checkpoint.folder / name}: does not contain the order of its parameters.")
        order = [key for group in groups for key in group]
        specs = specs or model_parameters(checkpoint, len(module))
        flats = [_flat_weights(checkpoint, data_rank, tensor_rank) for data_rank in range(checkpoint.layout["data"])]
        if set(order) != specs.keys() or len(order) != len(specs):
            raise InputError(f"{checkpoint.folder / name}: its parameters are not the {len(specs)} of the model in the manifest.")
        pieces: dict[str, LazyTensor] = {}
        begin = 0
        for key in order:
            shape = specs[key].local_shape(checkpoint.layout["tensor"])
            dtype = module[key].dtype if isinstance(module.get(key), StoredTensor) else torch.float32
            share = -(-math.prod(shape) // len(flats))
            pieces[key] = LazyTensor(shape, dtype, partial(_join, flats, begin, share, shape, dtype))
            begin += share
        for flat in flats:
            if flat.numel != begin:
                raise InputError(
                    f"{checkpoint.folder}: a rank holds {flat.numel:,} fp32 weights, {begin:,} expected (tensor {tensor_rank})."
                )
        slices.append(pieces)
    return merge(checkpoint, specs, slices)


def merge(checkpoint: Checkpoint, specs: dict[str, ShardSpec], slices: list[dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
    """Full tensors by canonical name from each tensor rank's slices by parameter name."""
    tensors = {}
    for key, spec in specs.items():
        pieces = [pieces_of_rank[key] for pieces_of_rank in slices]
        expected = spec.local_shape(len(slices))
        for piece in pieces:
            if piece.shape != expected or piece.dtype != pieces[0].dtype or not piece.dtype.is_floating_point:
                found = f"{piece.dtype} {list(piece.shape)}"
                raise InputError(f"{checkpoint.folder}: {spec.name} is saved as {found}, expected {list(expected)} on each tensor rank.")
        tensors[spec.name] = merged(pieces, spec.split_dim, spec.shape)
    return tensors


def _stored(checkpoint: Checkpoint, module: dict[Any, Any], specs: dict[str, ShardSpec]) -> dict[str, LazyTensor]:
    """The tensors of a file; they must be exactly the expected ones."""
    for key in specs.keys() ^ module.keys():
        where = "is missing" if key in specs else "is unknown"
        raise InputError(f"{checkpoint.folder}: parameter {str(key)[:80]!r} {where}; expected the model that {MANIFEST} describes.")
    tensors = {}
    for key, value in module.items():
        if not isinstance(value, StoredTensor):
            raise InputError(f"{checkpoint.folder}: parameter {key!r} is not a tensor.")
        tensors[key] = LazyTensor(value.shape, value.dtype, value.read)
    return tensors


def section(checkpoint: Checkpoint, name: str, root: dict[Any, Any], key: str) -> dict[Any, Any]:
    """The dictionary under a key in the content of the file `name`."""
    value = root.get(key)
    if not isinstance(value, dict):
        raise InputError(f"{checkpoint.folder / name}: holds no {key}.")
    return value


# --- parameters and their names -----------------------------------------------------------------------------------------------------------


def model_parameters(checkpoint: Checkpoint, num_tensors: int) -> dict[str, ShardSpec]:
    """The spec of every parameter of the model by its name in the module."""
    config = checkpoint.config
    if config.num_layers > num_tensors:
        raise InputError(f"{checkpoint.folder}: {config.num_layers} layers in its {MANIFEST}, but just {num_tensors} tensors.")
    return _parameters(PanguModel(config, ParallelContext(device=torch.device("meta"))))


def pipeline_parameters(config: ModelConfig) -> Iterator[dict[str, ShardSpec]]:
    """For each layer of the pipeline, the spec of every parameter by its name in the layer."""
    accelerator.name()  # imports DeepSpeed without the warning that there is no GPU
    with quiet():
        layers = pipeline_layers(config, ParallelContext(device=torch.device("meta")), RunOptions())
    for layer in layers:
        with quiet():
            module = layer.build()
        yield _parameters(module)


def _parameters(module: nn.Module) -> dict[str, ShardSpec]:
    return {name: spec_of(parameter) for name, parameter in module.named_parameters()}


# --- ZeRO-3's flat buffers ----------------------------------------------------------------------------------------------------------------


@dataclass
class Flat:
    """One-dimensional buffers of one rank, read as if they were concatenated."""

    buffers: list[StoredTensor]

    @property
    def numel(self) -> int:
        """Elements of all buffers."""
        return sum(buffer.shape[0] for buffer in self.buffers)

    def copy_to(self, target: Tensor, begin: int) -> None:
        """Copy `target.numel()` elements from `begin` on."""
        at = 0
        for buffer in self.buffers:
            first, last = max(begin, at), min(begin + target.numel(), at + buffer.shape[0])
            if first < last:
                target[first - begin : last - begin].copy_(buffer.read()[first - at : last - at])
            at += buffer.shape[0]


def load_optimizer(checkpoint: Checkpoint, data_rank: int, model_rank: int) -> tuple[str, dict[Any, Any]]:
    """Name of the file with one rank's optimizer, and ZeRO's states in it; model rank = stage x T + tensor rank."""
    name = f"zero_pp_rank_{data_rank}_mp_rank_{model_rank:02d}_optim_states.pt"
    name = f"bf16_{name}" if f"bf16_{name}" in checkpoint.sizes else name
    return name, section(checkpoint, name, checkpoint.load(name), "optimizer_state_dict")


def flat_buffers(checkpoint: Checkpoint, name: str, buffers: Any) -> list[StoredTensor]:
    """Check that `buffers`, from the file `name`, is a list of one-dimensional tensors."""
    if type(buffers) is not list or not all(isinstance(buffer, StoredTensor) and len(buffer.shape) == 1 for buffer in buffers):
        raise InputError(f"{checkpoint.folder / name}: its optimizer states are not those that DeepSpeed writes.")
    return buffers


def _flat_weights(checkpoint: Checkpoint, data_rank: int, tensor_rank: int) -> Flat:
    name, state = load_optimizer(checkpoint, data_rank, tensor_rank)
    return Flat(flat_buffers(checkpoint, name, state.get("fp32_flat_groups")))


def _join(flats: list[Flat], begin: int, share: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A parameter joined from every data rank's share of it; the end of the last rank's share is padding."""
    whole = torch.empty(share * len(flats), dtype=torch.float32)
    for number, flat in enumerate(flats):
        flat.copy_to(whole[number * share : (number + 1) * share], begin)
    return whole[: math.prod(shape)].view(shape).to(dtype)
