"""Weights as a directory with one .npy per tensor, under the names and in the layout of the original MindSpore checkpoint.

backbone.blocks.0.attention.dense1.weight.npy
"""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path

import numpy as np
import torch

from pangu.conversion.mindspore import assemble, file_names, stored_layout, tokenizer_beside
from pangu.conversion.weights import Overrides, Weights, WriteOptions
from pangu.errors import InputError
from pangu.files import open_file
from pangu.tensor_files.blocks import blocks
from pangu.tensor_files.lazy_tensor import LazyTensor
from pangu.tensor_files.mindspore_file import MAX_DIMS, StoredTensor
from pangu.text.tokenizer import copy_model

WRITTEN_NAMES = r"backbone\.[\w.]+\.npy|vocab\.model"
_NAMES = {torch.float16: "<f2", torch.float32: "<f4", torch.float64: "<f8"}
_DTYPES = {np.dtype(name): dtype for dtype, name in _NAMES.items()}
# More than numpy lets a header of such arrays have.
_HEADER_BYTES = 1 << 16


def detect(path: Path) -> bool:
    """Whether a directory holds a word embedding in a .npy file of its own."""
    return path.is_dir() and any(path.glob("*embedding_table.npy"))


def read(path: Path, overrides: Overrides) -> Weights:
    """The weights of a directory.

    Raises:
        InputError: naming the file that is missing, damaged or of an unexpected shape.
    """
    if not path.is_dir():
        raise InputError(f"{path}: is not a directory of .npy files.")
    files = {file.name.removesuffix(".npy"): file for file in sorted(path.glob("*.npy"))}
    return assemble(
        path,
        files,
        lambda name: open_array(files[name]),
        overrides,
        form="directory of .npy files",
        tokenizer=tokenizer_beside(path),
        files=tuple(files.values()),
    )


def write(weights: Weights, output: Path, options: WriteOptions) -> None:
    """Write a directory of .npy files, and the tokenizer's `vocab.model` if there is one.

    Raises:
        InputError: if a tensor is bfloat16, which .npy files cannot hold.
    """
    output.mkdir(parents=True)
    for canonical, name in file_names(weights.config).items():
        tensor = stored_layout(canonical, weights.tensors[canonical])
        dtype = options.dtype or tensor.dtype
        if dtype not in _NAMES:
            raise InputError(f"{output}: .npy files cannot hold bfloat16. Give --dtype fp32, which loses nothing, or fp16.")
        with open(output / f"{name}.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": _NAMES[dtype], "fortran_order": False, "shape": tensor.shape})
            for block in blocks(tensor.read(), dtype):
                file.write(block)
    if weights.tokenizer is not None:
        copy_model(weights.tokenizer, output)


def open_array(path: Path) -> LazyTensor:
    """A lazy tensor of a .npy file.

    Raises:
        InputError: if it is not a complete .npy of floating-point numbers. Nothing in it is ever unpickled.
    """
    try:
        with open_file(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd headers: the line below is enough
            head = io.BytesIO(file.read(_HEADER_BYTES))
            size = file.seek(0, 2)
            version = np.lib.format.read_magic(head)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, transposed, dtype = header(head)
            begin = head.tell()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except Exception as error:  # a damaged header reaches numpy's literal parser, which raises whatever it meets
        raise InputError(f"{path}: is not a .npy file ({str(error).splitlines()[0] if str(error) else type(error).__name__}).") from None
    if dtype not in _DTYPES:
        raise InputError(f"{path}: is of type {dtype}, expected little-endian float16, float32 or float64.")
    if len(shape) > MAX_DIMS or not all(type(extent) is int and abs(extent) < 2**62 for extent in shape):
        raise InputError(f"{path}: has an impossible shape. Copy it again.")
    expected = math.prod(shape) * dtype.itemsize
    if min(shape, default=1) < 0 or size - begin != expected:
        raise InputError(f"{path}: holds {size - begin:,} bytes of data, {dtype} {list(shape)} needs {expected:,}. Copy it again.")
    name = path.name.removesuffix(".npy")
    torch_dtype = _DTYPES[dtype]
    stored = StoredTensor(tuple(shape[::-1] if transposed else shape), str(dtype), torch_dtype, ((begin, expected),)).lazy(path, name)
    if not transposed or len(shape) < 2:
        return stored
    if len(shape) > 2:
        raise InputError(f"{path}: has shape {list(shape)}, which no weight has.")
    return LazyTensor(tuple(shape), torch_dtype, lambda: stored.read().T)
