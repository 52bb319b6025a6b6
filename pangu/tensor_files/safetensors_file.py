"""A .safetensors file: tensors read one at a time or in part, and written one at a time.

Format: the header's length (u64, little-endian), the header (JSON, padded with spaces to 8 bytes), the tensors one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pangu.errors import InputError
from pangu.files import open_file
from pangu.tensor_files.blocks import blocks
from pangu.tensor_files.lazy_tensor import LazyTensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def open_tensors(path: Path) -> dict[str, LazyTensor]:
    """Every tensor of a file by its name, to be read when it is asked for.

    Raises:
        InputError: if it is no whole .safetensors file, or holds a type that torch has no name for.
    """
    tensors = {}
    with _safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118 (no dictionary)
            stored = file.get_slice(name)
            if stored.get_dtype() not in _DTYPES:
                raise InputError(f"{path}: {name} is {stored.get_dtype()}; expected one of {', '.join(_DTYPES)}.")
            tensors[name] = _lazy(path, name, tuple(stored.get_shape()), _DTYPES[stored.get_dtype()])
    return tensors


def _lazy(path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    # The file is opened for every read: what stays mapped would count as memory in use.
    def read() -> Tensor:
        with _safetensors(path) as file:
            return file.get_tensor(name)

    def read_part(dim: int, begin: int, end: int) -> Tensor:
        with _safetensors(path) as file:
            stored = file.get_slice(name)
            return stored[(slice(None),) * dim + (slice(begin, end),)]

    return LazyTensor(shape, dtype, read, read_part)


def _safetensors(path: Path) -> Any:
    try:
        open_file(path).close()  # which waits for no pipe
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error}). Copy or convert the weights again.") from None


def num_bytes(tensor: LazyTensor, dtype: torch.dtype | None) -> int:
    """Bytes of a tensor once it is written as `dtype`; None: as its own."""
    return torch.Size(tensor.shape).numel() * (dtype or tensor.dtype).itemsize


def write_tensors(path: Path, tensors: Mapping[str, LazyTensor], dtype: torch.dtype | None) -> None:
    """Write a file, reading one tensor at a time; safetensors' own writer wants all of them in memory.

    Args:
        path: the file.
        tensors: by name, in the order in which they will lie in it.
        dtype: of the written tensors; None keeps each tensor's own.

    Raises:
        OSError: if it cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + num_bytes(tensor, dtype)
        header[name] = {"dtype": _NAMES[dtype or tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for block in blocks(tensor.read(), dtype or tensor.dtype):
                file.write(block)
