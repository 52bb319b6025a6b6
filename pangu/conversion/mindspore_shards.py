"""Weights in the form of the original release: one .ckpt per rank, a strategy file with the split of each tensor, three embeddings as .npy.

    filerted_0.ckpt ... filerted_511.ckpt (sic), or rank_0/NAME.ckpt ... as training leaves them
    pangu_alpha_2.6B_ckpt_strategy.ckpt
    word_embedding.npy  position_embedding.npy  top_query_embedding.npy    unless the shards hold them

How a tensor is cut (MindSpore `ParallelStrategyMap`): ranks are numbered over `dev_matrix`, its last axis fastest. `tensor_map[d] = m` cuts
dimension d of the tensor over the axis `dev_matrix[-1 - m]`; -1 leaves it whole. The ranks that then hold the same slice cut its dimension
0 among them once more, for the optimizer's sake, if `opt_weight_shard_step` is not 0: every step-th rank, `opt_weight_shard_size` of them
(-1: all).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pangu.conversion.mindspore import assemble, read_step, tokenizer_beside
from pangu.conversion.npy import open_array
from pangu.conversion.weights import Overrides, Weights
from pangu.errors import InputError
from pangu.tensor_files.lazy_tensor import LazyTensor
from pangu.tensor_files.mindspore_file import MAX_DIMS, MAX_VALUES, Message, StoredTensor, mapped, scan, signed

_FLAT = re.compile(r"(?:filerted|filtered)_(\d{1,6})\.ckpt")
_RANK = re.compile(r"rank_(\d{1,6})")
_EMBEDDINGS = {
    f"backbone.{name}.embedding_table": f"{name}.npy" for name in ("word_embedding", "position_embedding", "top_query_embedding")
}


@dataclass(frozen=True)
class Layout:
    """How one tensor is split over the ranks; see the module's docstring."""

    dev_matrix: tuple[int, ...]
    tensor_map: tuple[int, ...]
    shard_step: int
    shard_size: int

    def slices(self) -> tuple[list[int], list[tuple[int, list[int]]]]:
        """The number of parts of each dimension, and for each slice a rank that holds it with the slice's index along every dimension.

        The cut for the optimizer is part of dimension 0.

        Raises:
            ValueError: if the ranks do not fall into such groups.
        """
        holders: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(itertools.product(*map(range, self.dev_matrix))):
            holders.setdefault(tuple(place[-1 - axis] if axis >= 0 else 0 for axis in self.tensor_map), []).append(rank)
        counts = [self.dev_matrix[-1 - axis] if axis >= 0 else 1 for axis in self.tensor_map]
        shards = 1
        if self.shard_step:
            shards = self.shard_size if self.shard_size > 0 else math.prod(self.dev_matrix) // len(holders)
            counts[0] *= shards
        placed = []
        for index, ranks in holders.items():
            group = [ranks[0] + self.shard_step * number for number in range(min(shards, len(ranks)))]
            if len(group) < shards or not set(group) <= set(ranks):
                raise ValueError(f"{shards} ranks, each {self.shard_step}th from rank {ranks[0]} on, do not share a slice")
            placed += [(rank, [index[0] * shards + number, *index[1:]]) for number, rank in enumerate(group)]
        return counts, placed


def detect(path: Path) -> bool:
    """Whether a directory holds one file per rank."""
    return path.is_dir() and any(_FLAT.fullmatch(entry.name) or _RANK.fullmatch(entry.name) for entry in path.iterdir())


def read(path: Path, overrides: Overrides) -> Weights:
    """The weights of a directory of shards. The contents of every file are checked now; tensors are merged when they are read, with one
    file open at a time.

    Raises:
        InputError: naming the file, tensor or rank that is missing, damaged or disagrees with another.
    """
    if not path.is_dir():
        raise InputError(f"{path}: is not a directory of shards.")
    strategy_path = _find_strategy(path)
    layouts = read_strategy(strategy_path)
    files = _rank_files(path)
    num_ranks = {math.prod(layout.dev_matrix) for layout in layouts.values()}
    if num_ranks != {len(files)}:
        expected = " or ".join(f"{number:,}" for number in sorted(num_ranks))
        raise InputError(f"{path}: holds the files of {len(files):,} ranks, {strategy_path.name} describes {expected}.")
    arrays = {name: path / file for name, file in _EMBEDDINGS.items() if (path / file).is_file()}
    shards = _scan_all(files, arrays)
    missing = [file for name, file in _EMBEDDINGS.items() if name not in arrays and name not in shards[0]]
    if missing and not any("embedding_table" in name for name in shards[0]):
        raise InputError(f"{path}: lacks {', '.join(missing)}. The released shards hold no embeddings: put these files beside them.")

    def open_tensor(name: str) -> LazyTensor:
        if name in arrays:
            return open_array(arrays[name])
        if name not in layouts:
            raise InputError(f"{strategy_path}: does not say how {name} is cut, which {files[0]} holds.")
        return _merged(strategy_path, name, layouts[name], files, shards)

    steps = {read_step(shard, file) for file, shard in zip(files, shards, strict=True)}
    if len(steps) > 1:
        overrides.report(path, [f"its ranks are of different training steps: {', '.join(sorted(map(str, steps)))}"], ".")
    return assemble(
        path,
        [*arrays, *(name for name in shards[0] if name not in arrays)],
        open_tensor,
        overrides,
        form=f"MindSpore checkpoint of {len(files)} ranks" + (" with embeddings from .npy files" if arrays else ""),
        step=steps.pop(),
        tokenizer=tokenizer_beside(path),
        files=(*files, *arrays.values()),
        layout={"ranks": len(files)},
    )


def _find_strategy(path: Path) -> Path:
    for folder in (path, path.parent):
        found = sorted(file for file in folder.glob("*strategy*.ckpt") if file.is_file())
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise InputError(f"{folder}: holds {len(found)} strategy files ({names}); put the right one alone beside the shards.")
        if found:
            return found[0]
    raise InputError(f"{path}: no strategy file; looked for *strategy*.ckpt there and beside it. The shards cannot be merged without it.")


def _rank_files(path: Path) -> list[Path]:
    found: dict[int, Path] = {}
    for entry in sorted(path.iterdir()):
        file = entry
        if match := _RANK.fullmatch(entry.name):
            inside = sorted(candidate for candidate in entry.glob("*.ckpt") if "strategy" not in candidate.name)
            if len(inside) != 1:
                raise InputError(f"{entry}: holds {len(inside)} .ckpt files, expected 1. Leave that of the step you want.")
            file = inside[0]
        elif not (match := _FLAT.fullmatch(entry.name)):
            continue
        rank = int(match[1])
        if rank in found:
            raise InputError(f"{path}: {found[rank].relative_to(path)} and {file.relative_to(path)} are both of rank {rank}.")
        found[rank] = file
    absent = next((rank for rank in range(len(found)) if rank not in found), None)
    if not found or absent is not None:
        raise InputError(
            f"{path}: has no file of rank {absent or 0}; looked for filerted_{absent or 0}.ckpt and rank_{absent or 0}/*.ckpt. "
            "A released model comes in several archives: unpack all of them into one folder."
        )
    return [found[rank] for rank in range(len(found))]


def _scan_all(files: Sequence[Path], arrays: dict[str, Path]) -> list[dict[str, StoredTensor]]:
    """The tensors of every rank's file; equal ranks share one table, so that hundreds of them take the memory of a few."""
    tables: list[dict[str, StoredTensor]] = []
    for file in files:
        table = scan(file)
        first = tables[0] if tables else table
        if table == first:
            tables.append(first)
            continue
        for name, tensor in first.items():
            if name in arrays or tensor.dtype is None:
                continue
            other = table.get(name)
            if other is None:
                raise InputError(f"{file}: lacks {name}, which {files[0].name} holds.")
            if (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
                raise InputError(
                    f"{file}: {name} is {other.type_name} {list(other.shape)}, in {files[0].name} {tensor.type_name} {list(tensor.shape)}."
                )
        tables.append(table)
    return tables


def _merged(strategy_path: Path, name: str, layout: Layout, files: Sequence[Path], shards: Sequence[dict[str, StoredTensor]]) -> LazyTensor:
    local = shards[0][name].lazy(files[0], name)
    if not local.shape or len(layout.tensor_map) != len(local.shape):
        raise InputError(
            f"{strategy_path}: cuts {name} along {len(layout.tensor_map)} dimensions; its shards have shape {list(local.shape)}."
        )
    try:
        counts, placed = layout.slices()
    except ValueError as error:
        raise InputError(f"{strategy_path}: {name} is cut in a way that is not understood: {error}.") from None
    shape = tuple(count * width for count, width in zip(counts, local.shape, strict=True))

    def read_tensor() -> Tensor:
        full = torch.empty(shape, dtype=local.dtype)
        for rank, index in placed:
            target = full
            for dimension, (position, width) in enumerate(zip(index, local.shape, strict=True)):
                target = target.narrow(dimension, position * width, width)
            target.copy_(shards[rank][name].read(files[rank]))
        return full

    def copies() -> Iterator[tuple[str, LazyTensor]]:
        """The layout of a tensor that every rank holds whole."""
        if len(placed) == 1:
            first = placed[0][0]
            yield from ((f"rank {rank}", shards[rank][name].lazy(file, name)) for rank, file in enumerate(files) if rank != first)

    return LazyTensor(shape, local.dtype, read_tensor, copies=copies)


def read_strategy(path: Path) -> dict[str, Layout]:
    """How each parameter is split, by its name.

    `ParallelStrategyMap` (protobuf): 3 repeated item {1 name, 2 layout {1 dev_matrix {1 dim}, 2 tensor_map {1 dim}, 6 step, 7 size}}; of a
    repeated matrix or map the first counts.

    Raises:
        InputError: with the file and the offset, if it is not a strategy file.
    """
    layouts: dict[str, Layout] = {}
    with mapped(path) as whole:
        for number, at, item in whole.fields(MAX_VALUES):
            if number != 3:
                continue
            if not isinstance(item, Message):
                whole.refuse(at, "an integer where a parameter's layout is expected")
            parts = _first_fields(item)
            name, layout = parts.get(1), parts.get(2)
            if not isinstance(name, Message) or not isinstance(layout, Message):
                whole.refuse(at, "a layout without a name")
            if (text := name.text()) in layouts:
                whole.refuse(at, f"{text} a second time")
            if (found := _read_layout(layout, at)) is not None:
                layouts[text] = found
    if not layouts:
        raise InputError(f"{path}: holds no layouts; it is not a strategy file.")
    return layouts


def _read_layout(layout: Message, at: int) -> Layout | None:
    """The layout of a parameter; None for a scalar, which is not split."""
    fields = _first_fields(layout)
    dev_matrix, tensor_map = (_dims(fields.get(number), layout, at) for number in (1, 2))
    step, size = (signed(value) if isinstance(value := fields.get(number, 0), int) else 0 for number in (6, 7))
    used = [axis for axis in tensor_map if axis >= 0]
    if not tensor_map:
        return None
    if not dev_matrix or min(dev_matrix) < 1 or math.prod(dev_matrix) > 10**6:
        layout.refuse(at, f"a layout over devices {list(dev_matrix)}")
    if min(tensor_map) < -1 or max(tensor_map) >= len(dev_matrix) or len(set(used)) != len(used) or step < 0:
        layout.refuse(at, f"a layout with tensor_map {list(tensor_map)}, step {step} over devices {list(dev_matrix)}")
    return Layout(dev_matrix, tensor_map, step, size)


def _first_fields(message: Message) -> dict[int, int | Message]:
    found: dict[int, int | Message] = {}
    for number, _, value in message.fields():
        found.setdefault(number, value)
    return found


def _dims(message: int | Message | None, layout: Message, at: int) -> tuple[int, ...]:
    dims: list[int] = []
    for number, _, value in message.fields() if isinstance(message, Message) else ():
        if number == 1:
            dims += [signed(value)] if isinstance(value, int) else value.integers()
        if len(dims) > MAX_DIMS:
            layout.refuse(at, f"more than {MAX_DIMS} dimensions")
    return tuple(dims)
