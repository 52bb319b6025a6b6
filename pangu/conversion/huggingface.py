"""Canonical weights: a directory in HuggingFace's form that training writes and that training, generation and conversion read.

`config.json`, `model-0000i-of-0000n.safetensors`, `model.safetensors.index.json` and the tokenizer's `vocab.model`. Names are the
community's (`transformer.h.{i}.attn.q_proj.weight` …, the query layer being the last `h`); the output layer is tied and not stored.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_ext.collectives import all_gather, all_gather_objects, barrier
from megatron_ext.context import ParallelContext
from megatron_ext.sharding import ShardSpec, canonical_parameters
from megatron_ext.topology import Groups
from pangu.config import ModelConfig
from pangu.errors import InputError
from pangu.model.model import PanguModel

CONFIG, INDEX, TOKENIZER = "config.json", "model.safetensors.index.json", "vocab.model"
SHARD_BYTES = 2 * 2**30
"""A file holds about so much; so much is what the writer of a pipeline stage holds in host memory."""

# Our name of each field of config.json that means the same.
_FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
    "hidden_size": "hidden_size",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "intermediate_size": "ffn_hidden_size",
    "final_norm": "final_norm",
    "eos_token_id": "separator_id",
    "pad_token_id": "pad_id",
}
_GELU = {"gelu_new": "tanh", "gelu": "erf", "quick_gelu": "sigmoid"}


def model_specs(config: ModelConfig) -> dict[str, ShardSpec]:
    """Every parameter of a model by its canonical name. Nothing is allocated."""
    model = PanguModel(config, ParallelContext(device=torch.device("meta")))
    return {spec.name: spec for spec, _ in canonical_parameters(model)}


class WeightsDirectory:
    """A weights directory, opened and checked; tensors are read when they are asked for, slice by slice.

    Args:
        path: the directory.

    Raises:
        InputError: if it is no weights directory, or its tensors are not just the model's.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = _read_config(self.path / CONFIG)
        self._files = self._locate()
        specs = model_specs(self.config)
        for what, names in (("lacks", specs.keys() - self._files.keys()), ("holds unknown", self._files.keys() - specs.keys())):
            if names:
                first, more = min(names), f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise InputError(f"{self.path}: {what} {first}{more}; expected the {len(specs)} tensors that {CONFIG} describes.")

    @property
    def dtype(self) -> torch.dtype:
        """The stored tensors' dtype, as config.json names it (`torch_dtype` until transformers 5); fp32 where it names none."""
        values = json.loads((self.path / CONFIG).read_text(encoding="utf-8"))
        names = {"float16": torch.float16, "bfloat16": torch.bfloat16}
        return names.get(values.get("dtype") or values.get("torch_dtype"), torch.float32)

    def _locate(self) -> dict[str, Path]:
        index = self.path / INDEX
        if not index.exists():
            single = self.path / "model.safetensors"
            with self._open(single) as file:
                return dict.fromkeys(file.keys(), single)
        try:
            entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        except (ValueError, KeyError, AttributeError, TypeError):
            raise InputError(f"{index}: not an index of safetensors files; expected an object with a weight_map.") from None
        for name, file in entries:
            # Never follow a path out of the directory.
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise InputError(f"{index}: {name} points to {file!r}; expected the name of a file beside it.")
        return {name: self.path / file for name, file in entries}

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be read as safetensors ({error}). Copy or convert the weights again.") from None

    def fill(self, local: Tensor, spec: ShardSpec, rank: int, size: int) -> None:
        """Read one rank's slice of a tensor into `local` (a `megatron_ext.context.Fill`); only the slice is read.

        Raises:
            InputError: if the tensor is not in its file, or has another shape than the model's.
        """
        path = self._files[spec.name]
        with self._open(path) as file:
            try:
                stored = file.get_slice(spec.name)
            except SafetensorError:
                raise InputError(f"{path}: lacks {spec.name}, which {INDEX} says it holds. Copy or convert the weights again.") from None
            if tuple(stored.get_shape()) != spec.shape:
                raise InputError(f"{path}: {spec.name} has shape {stored.get_shape()}, expected {list(spec.shape)}.")
            if spec.split_dim is None:
                local.copy_(stored[...])
                return
            width = local.shape[spec.split_dim]
            begin = min(spec.offset(rank, size), spec.shape[spec.split_dim])
            end = min(begin + width, spec.shape[spec.split_dim])
            local.zero_()
            if begin < end:
                part = stored[begin:end] if spec.split_dim == 0 else stored[:, begin:end]
                local.narrow(spec.split_dim, 0, end - begin).copy_(part)


def _read_config(path: Path) -> ModelConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a weights directory with config.json.") from None
    except ValueError:
        raise InputError(f"{path}: not valid JSON.") from None
    if not isinstance(values, dict) or values.get("model_type") not in ("gpt_pangu", "pangu"):
        raise InputError(f'{path}: describes no PanGu model; expected "model_type": "gpt_pangu".')
    activation = values.get("activation_function")
    if not isinstance(activation, str) or activation not in _GELU:
        raise InputError(f"{path}: activation_function = {activation!r}; expected one of {', '.join(_GELU)}.")
    ours = {key: values[theirs] for theirs, key in _FIELDS.items() if values.get(theirs) is not None}
    try:
        return ModelConfig.model_validate({"gelu": _GELU[activation], **ours})
    except ValidationError as error:
        problem = error.errors()[0]
    if problem["type"] == "value_error":
        raise InputError(f"{path}: {problem['ctx']['error']}")
    key = next(theirs for theirs, key in _FIELDS.items() if key == problem["loc"][0])
    if problem["type"] == "missing":
        raise InputError(f"{path}: {key} is missing.")
    raise InputError(f"{path}: {key} = {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}.")


def _config_json(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "model_type": "gpt_pangu",
        **{theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()},
        "bos_token_id": config.separator_id,
        "activation_function": next(theirs for theirs, ours in _GELU.items() if ours == config.gelu),
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": config.hidden_dropout,
        "resid_pdrop": config.hidden_dropout,
        "attn_pdrop": config.attention_dropout,
        "tie_word_embeddings": True,
        "dtype": str(dtype).removeprefix("torch."),
    }


def write_weights(
    path: Path,
    config: ModelConfig,
    groups: Groups,
    parameters: Iterable[tuple[ShardSpec, Callable[[], Any]]],
    *,
    tokenizer: Path | None = None,
) -> None:
    """Write the weights of a running model as a canonical directory, whole or not at all. Every rank must call this.

    Each pipeline stage writes its own files, one parameter at a time: its slices are gathered over the tensor-parallel group, and the first
    rank of the stage holds at most one file's worth of tensors.

    Args:
        path: the directory; one that exists is replaced once the new one is complete.
        config: the model.
        groups: this rank's groups.
        parameters: this rank's, in the same order on every rank of a stage: the spec, and a context manager that gives the rank's slice.
        tokenizer: a `vocab.model` to put beside the weights, or the directory that holds it.
    """
    partial = path.with_name(path.name + ".partial")
    if groups.world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier(groups.world)
    is_writer = groups.data.rank == 0 and groups.tensor.rank == 0
    stage, last = groups.coordinates.pipe, groups.topology.pipeline - 1
    files: list[tuple[str, dict[str, int]]] = []  # temporary name, bytes of each tensor
    pending: dict[str, Tensor] = {}
    dtype = torch.float32

    def flush() -> None:
        if pending:
            name = f"stage{stage:03d}-{len(files):05d}.safetensors"
            save_file(pending, partial / name, metadata={"format": "pt"})
            os.chmod(partial / name, 0o644)  # safetensors makes files that only their owner can read
            _fsync(partial / name)
            files.append((name, {key: tensor.nbytes for key, tensor in pending.items()}))
            pending.clear()

    for spec, whole in parameters:
        with whole() as local:
            if stage == last > 0 and spec.name == "transformer.wte.weight":
                continue  # tied: the first stage writes it
            full = spec.merge([all_gather(local, groups.tensor, spec.split_dim)] if spec.split_dim is not None else [local])
            if is_writer:
                dtype = full.dtype
                pending[spec.name] = full.detach().to("cpu", copy=True).contiguous()
                if sum(tensor.nbytes for tensor in pending.values()) >= SHARD_BYTES:
                    flush()
    if is_writer:
        flush()
    everything = [entry for entries in all_gather_objects(files, groups.world) for entry in entries]
    if groups.world.rank == 0:
        weight_map: dict[str, str] = {}
        total_size = sum(sum(sizes.values()) for _, sizes in everything)
        for number, (temporary, names) in enumerate(everything, start=1):
            final = f"model-{number:05d}-of-{len(everything):05d}.safetensors"
            os.rename(partial / temporary, partial / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        (partial / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        (partial / CONFIG).write_text(json.dumps(_config_json(config, dtype), indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            shutil.copyfile(tokenizer / TOKENIZER if tokenizer.is_dir() else tokenizer, partial / TOKENIZER)
        replaced = path.with_name(path.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if path.exists():
            os.rename(path, replaced)
        os.rename(partial, path)
        shutil.rmtree(replaced, ignore_errors=True)
    barrier(groups.world)


def _fsync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
