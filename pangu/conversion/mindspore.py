"""Weights of the original MindSpore code: one .ckpt, in any of four naming dialects.

| dialect | word_emb | pos_emb | query_emb | query layer |
|---|---|---|---|---|
| original | word_embedding.E | position_embedding.E | top_query_embedding.E | top_query_layer |
| pcl-pangu | E (no prefix) | embedding.embedding.position_embedding.E | top_query_embedding_table | top_query_layer |
| model zoo, mindformers | embedding.word_embedding.E | embedding.position_embedding.E | top_query_embedding.E | top_query_layer |
| pipeline (200B) | E (no prefix) | pangu_alpha_embedding.position_embedding.E | top_query_embedding.E | the last of blocks |

E is `embedding_table`, and all begin with `backbone.`. mindformers' converter writes the bare `word_embedding_table` and its like. In all
of them `dense1`, `dense2` and `dense3` (query, key, value) are [out, in] as torch has them, the other matrices [in, out].
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pangu.config import ModelConfig
from pangu.conversion.weights import Advance, Checksums, Overrides, States, Weights, WriteOptions, complete
from pangu.errors import InputError
from pangu.tensor_files.lazy_tensor import LazyTensor
from pangu.tensor_files.mindspore_file import StoredTensor, scan, verify_checksum, write_tensor

# Names inside a block, in the order in which MindSpore saves them, and ours.
_IN_BLOCK = {
    "layernorm1.gamma": "ln_1.weight",
    "layernorm1.beta": "ln_1.bias",
    "layernorm2.gamma": "ln_2.weight",
    "layernorm2.beta": "ln_2.bias",
    "attention.projection.weight": "attn.c_proj.weight",
    "attention.projection.bias": "attn.c_proj.bias",
    "attention.dense1.weight": "attn.q_proj.weight",
    "attention.dense1.bias": "attn.q_proj.bias",
    "attention.dense2.weight": "attn.k_proj.weight",
    "attention.dense2.bias": "attn.k_proj.bias",
    "attention.dense3.weight": "attn.v_proj.weight",
    "attention.dense3.bias": "attn.v_proj.bias",
    "output.mapping.weight": "mlp.c_fc.weight",
    "output.mapping.bias": "mlp.c_fc.bias",
    "output.projection.weight": "mlp.c_proj.weight",
    "output.projection.bias": "mlp.c_proj.bias",
}
_TRANSPOSED = ("attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_WORD, _POSITION, _QUERY = "transformer.wte.weight", "transformer.wpe.weight", "transformer.wqe.weight"
_PIPELINE_POSITION = "pangu_alpha_embedding.position_embedding.embedding_table"

# Every name outside the blocks that a dialect gives a tensor, without its prefix.
_OUTSIDE = {
    "word_embedding.embedding_table": _WORD,
    "embedding_table": _WORD,
    "embedding.word_embedding.embedding_table": _WORD,
    "word_embedding_table": _WORD,
    "position_embedding.embedding_table": _POSITION,
    "embedding.embedding.position_embedding.embedding_table": _POSITION,
    "embedding.position_embedding.embedding_table": _POSITION,
    _PIPELINE_POSITION: _POSITION,
    "position_embedding_table": _POSITION,
    "top_query_embedding.embedding_table": _QUERY,
    "top_query_embedding_table": _QUERY,
    "query_embedding_table": _QUERY,
    "layernorm.gamma": "transformer.ln_f.weight",
    "layernorm.beta": "transformer.ln_f.bias",
}
# What the name of the word embedding tells: the dialect, and the GELU that its weights were trained with. The model zoo's and mindformers'
# layers run the sigmoid one, so what was trained or tuned there has it; their converter only renames the released weights.
_DIALECTS = {
    "word_embedding.embedding_table": ("names of the original release", "tanh"),
    "embedding_table": ("names of pcl-pangu", "tanh"),
    "embedding.word_embedding.embedding_table": (
        "names of the model zoo and mindformers, whose code runs the sigmoid GELU; weights that were only renamed want --gelu tanh",
        "sigmoid",
    ),
    "word_embedding_table": ("names of mindformers' converter, which renames weights trained with the tanh GELU", "tanh"),
}

# What its Adam keeps of a parameter, and how torch calls the same.
_MOMENTS = {"exp_avg": "adam_m.", "exp_avg_sq": "adam_v."}
_PREFIX = re.compile(r"(?:(?:backbone|network|module)\.)*")
_BLOCK = re.compile(r"(?:blocks\.(0|[1-9]\d{0,3})|top_query_layer)\.(.+)")
_NO_WEIGHT = re.compile(
    r"(?:adam_m|adam_v|accu_grads|moment1|moment2|moments)\..+|.+\.(?:key_past|value_past)|scale_sense|loss_scale|global_step|learning_rate"
    r"|current_iterator_step|last_overflow_iterator_step|epoch_num|step_num|beta1_power|beta2_power"
)


def detect(path: Path) -> bool:
    """Whether a path is a .ckpt file, by its name or by its first bytes, which are a short tag."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(16)
    return re.match(rb"\n[\x80-\xff]{0,8}[\x00-\x7f]\n[\x01-\x7f][A-Za-z]{2}", head) is not None or path.suffix == ".ckpt"


def read(path: Path, overrides: Overrides) -> Weights:
    """The weights of one .ckpt.

    Raises:
        InputError: see `mindspore_file.scan`, `assemble` and `weights.complete`.
    """
    stored = scan(path)
    return assemble(
        path,
        stored,
        lambda name: stored[name].lazy(path, name),
        overrides,
        form="MindSpore .ckpt",
        step=read_step(stored, path),
        tokenizer=tokenizer_beside(path),
        files=(path,),
        open_optimizer=partial(_open_optimizer, path, stored) if any(name.startswith("adam_m.") for name in stored) else None,
    )


def _open_optimizer(path: Path, stored: Mapping[str, StoredTensor]) -> States:
    states = {}
    for state, prefix in _MOMENTS.items():
        names = [name.removeprefix(prefix) for name in stored if name.startswith(prefix)]
        found, *_ = _canonical_names(path, names, Overrides())
        states[state] = {ours: stored_layout(ours, stored[prefix + name].lazy(path, prefix + name)) for ours, name in found.items()}
    return states


def write(weights: Weights, output: Path, options: WriteOptions) -> None:
    """Write one .ckpt, byte for byte as MindSpore saves the model, with the names of `file_names`."""
    names = file_names(weights.config)
    with open(output, "wb") as file:
        for canonical, name in names.items():
            tensor = stored_layout(canonical, weights.tensors[canonical])
            write_tensor(file, name, tensor.read(), options.dtype or tensor.dtype)
        for state, tensors in weights.optimizer.items():
            for canonical, name in names.items():
                tensor = stored_layout(canonical, tensors[canonical])
                write_tensor(file, _MOMENTS[state] + name, tensor.read(), tensor.dtype)
        if weights.optimizer and weights.step is not None:
            write_tensor(file, "global_step", torch.tensor([weights.step], dtype=torch.int32), torch.int32)


def file_names(config: ModelConfig) -> dict[str, str]:
    """The original release's name of every canonical tensor, in the order in which MindSpore saves them.

    A model with its final norm after the query layer gets the pipeline dialect's names, by which a reader distinguishes the two.
    """
    last = config.num_layers - 1
    pipeline = config.final_norm == "after_query"

    def block(index: int, name: str) -> dict[str, str]:
        return {f"transformer.h.{index}.{ours}": f"backbone.{name}.{theirs}" for theirs, ours in _IN_BLOCK.items()}

    names = {
        _WORD: "embedding_table" if pipeline else "backbone.word_embedding.embedding_table",
        _POSITION: f"backbone.{_PIPELINE_POSITION if pipeline else 'position_embedding.embedding_table'}",
    }
    for index in range(last):
        names |= block(index, f"blocks.{index}")
    if pipeline:
        names |= block(last, f"blocks.{last}")
    names |= {"transformer.ln_f.weight": "backbone.layernorm.gamma", "transformer.ln_f.bias": "backbone.layernorm.beta"}
    names[_QUERY] = "backbone.top_query_embedding.embedding_table"
    return names if pipeline else names | block(last, "top_query_layer")


def stored_layout(canonical: str, tensor: LazyTensor) -> LazyTensor:
    """Convert a tensor between our layout and the original's, in either direction: the two differ by a transpose."""
    if not canonical.endswith(_TRANSPOSED) or len(tensor.shape) != 2:
        return tensor
    part = tensor.read_part
    read_part = None if part is None else lambda dimension, begin, end: part(1 - dimension, begin, end).T

    def copies() -> Iterator[tuple[str, LazyTensor]]:
        return ((place, stored_layout(canonical, copy)) for place, copy in tensor.copies())

    return replace(tensor, shape=tensor.shape[::-1], read=lambda: tensor.read().T, read_part=read_part, copies=copies)


def assemble(
    where: Path, names: Iterable[str], open_tensor: Callable[[str], LazyTensor], overrides: Overrides, *, form: str, **rest: Any
) -> Weights:
    """Build weights from the tensors of a MindSpore format.

    Args:
        where: the source, for messages.
        names: everything it holds, in any dialect, optimizer states and bookkeeping included.
        open_tensor: a tensor by its name, in the stored layout.
        overrides: the user's settings.
        form: description of the format, for `Weights.source`.
        rest: other fields of `Weights`.

    Raises:
        InputError: naming the tensor that is unknown, missing, there twice, or not in the layout of its dialect.
    """
    found, num_layers, left_out, dialect, gelu, pipeline = _canonical_names(where, names, overrides)
    tensors = {}
    for canonical, name in found.items():
        try:
            tensor = open_tensor(name)
        except InputError as error:
            if overrides.problems is None:
                raise
            overrides.problems.append(str(error))
            continue
        if not tensor.shape or min(tensor.shape) < 1:
            overrides.report(where, [f"{name} has shape {list(tensor.shape)}, which no weight has"], ".")
        tensors[canonical] = tensor
    if overrides.strict and len(tensors[_WORD].shape) == 2:
        _check_layout(where, found, tensors)
    tensors = {canonical: stored_layout(canonical, tensor) for canonical, tensor in tensors.items()}
    final_norm = "after_query" if pipeline else "before_query"
    return complete(
        where,
        tensors,
        overrides,
        source=f"{form}, {dialect}",
        gelu=gelu,
        final_norm=final_norm,
        num_layers=num_layers,
        left_out=tuple(left_out),
        **rest,
    )


def _canonical_names(where: Path, names: Iterable[str], overrides: Overrides) -> tuple[dict[str, str], int, list[str], str, str, bool]:
    """The stored name of each canonical tensor, the number of layers, what is no weight, and what the names tell: dialect, GELU, whether of
    the pipeline code.

    Where problems are collected, an unknown tensor keeps its own name, and what is missing is left to `complete`, which lists all of it.
    """
    outside: dict[str, str] = {}
    blocks: dict[int | None, dict[str, str]] = {}
    left_out = []
    for name in names:
        short = name[_PREFIX.match(name).end() :]  # type: ignore[union-attr]
        if _NO_WEIGHT.fullmatch(short):
            left_out.append(name)
            continue
        match = _BLOCK.fullmatch(short)
        key = re.sub(r"\.mapping_(weight|bias)$", r".\1", match[2]) if match else short
        table = blocks.setdefault(int(match[1]) if match[1] else None, {}) if match else outside
        ours = (_IN_BLOCK if match else _OUTSIDE).get(key)
        if ours is None:
            if overrides.strict:
                raise InputError(f"{where}: holds {name}, which no dialect of PanGu's names knows.")
            outside[name] = name
        elif ours in table:
            overrides.report(where, [f"holds {table[ours]} and {name}, which are the same tensor"], ".")
        else:
            table[ours] = name
    for ours, usual in ((_WORD, "a word embedding"), (_POSITION, "a position embedding"), (_QUERY, "a query embedding")):
        if ours not in outside and overrides.strict:
            raise InputError(f"{where}: lacks {usual} under any name; it is not a complete PanGu model.")
    word, position = (_PREFIX.sub("", outside.get(name, ""), count=1) for name in (_WORD, _POSITION))
    dialect, gelu = _DIALECTS.get(word, ("without a word embedding, whose name tells the dialect", "tanh"))
    pipeline = position == _PIPELINE_POSITION
    if pipeline:
        dialect, gelu = "names of the pipeline (200B) code", "tanh"
    if pipeline == (None in blocks):
        problem = "holds" if pipeline else "lacks"
        overrides.report(where, [f"{problem} backbone.top_query_layer, against its {dialect}"], ".")
        pipeline = False
    num_blocks = 1 + max((index for index in blocks if index is not None), default=-1)
    found = dict(outside)
    num_layers = num_blocks + (not pipeline)
    for index in range(num_layers):
        source = None if index == num_blocks else index
        block = "backbone.top_query_layer" if source is None else f"backbone.blocks.{source}"
        for theirs, ours in _IN_BLOCK.items():
            if ours in blocks.get(source, {}):
                found[f"transformer.h.{index}.{ours}"] = blocks[source][ours]
            elif overrides.strict:
                raise InputError(f"{where}: lacks {block}.{theirs}; every layer has {len(_IN_BLOCK)} tensors.")
    return found, num_layers, left_out, dialect, gelu, pipeline


def _check_layout(where: Path, found: dict[str, str], tensors: dict[str, LazyTensor]) -> None:
    """Check the layout by the MLP's two matrices: the shape of square matrices does not show whether they are transposed."""
    hidden = tensors[_WORD].shape[1]
    for canonical, name in found.items():
        shape = tensors[canonical].shape
        if canonical.endswith("mlp.c_fc.weight") and shape[0] != hidden:
            raise InputError(f"{where}: {name} has shape {list(shape)}, expected [{hidden}, ...]: stored as [in, out].")
        if canonical.endswith("mlp.c_proj.weight") and shape[-1] != hidden:
            raise InputError(f"{where}: {name} has shape {list(shape)}, expected [..., {hidden}]: stored as [in, out].")


def read_step(stored: Mapping[str, StoredTensor], path: Path) -> int | None:
    """The training step, or None if the file does not hold the counter."""
    for name, tensor in stored.items():
        if _PREFIX.sub("", name, count=1) == "global_step" and tensor.dtype in (torch.int32, torch.int64) and math.prod(tensor.shape) == 1:
            return int(tensor.read(path))
    return None


def tokenizer_beside(path: Path) -> Path | None:
    """The path of a `vocab.model` in a directory, or beside a file; None if there is none."""
    candidate = (path if path.is_dir() else path.parent) / "vocab.model"
    return candidate if candidate.is_file() else None


# --- checksums ---------------------------------------------------------------------------------------------------------------------------


def _files_with_crc(path: Path, weights: Weights | None) -> list[Path]:
    return [file for file in weights.files if file.suffix != ".npy"] if weights else []


def _verify(path: Path, files: list[Path], advance: Advance) -> tuple[list[str], list[str]]:
    problems, without = [], 0
    for file in files:
        try:
            if not verify_checksum(file, advance):
                without += 1
                advance(file.stat().st_size)
        except InputError as error:
            problems.append(str(error))
    note = f"no CRC-32 at the end of {without} of {len(files)} files: MindSpore writes one only when it is asked to"
    return problems, [note] if without else []


CHECKSUMS = Checksums(_files_with_crc, _verify)
"""The CRC-32 that MindSpore writes at the end of a file."""
