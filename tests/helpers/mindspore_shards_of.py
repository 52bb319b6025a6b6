"""A model's tensors as the ranks of a released MindSpore checkpoint hold them, worked out apart from the code under test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from helpers.mindspore_bytes import checkpoint

EMBEDDINGS = ("word_embedding", "position_embedding", "top_query_embedding")
ROWS, COLUMNS, WHOLE = "rows", "columns", "whole"


def cut_by_tensor_parallelism(name: str) -> str:
    """What Megatron-like splitting of the stored matrices does to each parameter of the original."""
    if ".output.mapping.weight" in name:
        return COLUMNS
    split_biases = (".dense1.bias", ".dense2.bias", ".dense3.bias", ".mapping.bias")
    return ROWS if name.endswith(split_biases) or (name.endswith(".weight") and "norm" not in name) else WHOLE


def shards_of(name: str, array: np.ndarray, data: int, tensor: int) -> list[np.ndarray]:
    """What each of data x tensor ranks holds: tensor-parallel neighbours are consecutive ranks, and the `data` ranks that would hold equal
    slices divide theirs by rows.
    """
    kind = cut_by_tensor_parallelism(name)
    if kind == WHOLE:
        return [array] * (data * tensor)
    slices = np.split(array, tensor, axis=1 if kind == COLUMNS else 0)
    held: list[np.ndarray | None] = [None] * (data * tensor)
    for position, piece in enumerate(slices):
        for replica, rows in enumerate(np.split(piece, data, axis=0)):
            held[replica * tensor + position] = rows
    return held  # type: ignore[return-value]


def layout_of(name: str, array: np.ndarray, data: int, tensor: int) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    kind = cut_by_tensor_parallelism(name)
    axes = {ROWS: (0, -1), COLUMNS: (-1, 0), WHOLE: (-1, -1)}[kind][: array.ndim]
    return (data, tensor), axes, 0 if kind == WHOLE else tensor, 0 if kind == WHOLE else -1


def write_shards(
    folder: Path, arrays: Mapping[str, np.ndarray], data: int, tensor: int, place: Callable[[int], str] = "filerted_{}.ckpt".format
) -> Path:
    folder.mkdir()
    held = {name: shards_of(name, array, data, tensor) for name, array in arrays.items() if "embedding" not in name}
    for rank in range(data * tensor):
        file = folder / place(rank)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(checkpoint({name: shards[rank] for name, shards in held.items()}))
    for name in EMBEDDINGS:
        np.save(folder / f"{name}.npy", arrays[f"backbone.{name}.embedding_table"])
    return folder
