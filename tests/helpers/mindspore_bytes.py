"""MindSpore's protobuf messages, put together in tests without the code under test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

MS_TYPES = {"f2": "Float16", "f4": "Float32", "f8": "Float64", "i4": "Int32", "i8": "Int64"}


def varint(number: int) -> bytes:
    """Base 128, lowest group first; a negative number as the 64-bit two's complement."""
    number %= 2**64
    groups = [number >> shift & 0x7F for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([group | 0x80 for group in groups[:-1]] + groups[-1:])


def field(number: int, content: bytes | int) -> bytes:
    """An integer, or bytes with their length."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def value(tag: str, content: bytes, dims: Sequence[int] | bytes, type_name: str) -> bytes:
    """One value of a checkpoint; dims as bytes are written packed."""
    shape = field(1, dims) if isinstance(dims, bytes) else b"".join(field(1, dim) for dim in dims)
    return field(1, field(1, tag.encode()) + field(2, shape + field(2, type_name.encode()) + field(3, content)))


def array_value(tag: str, array: np.ndarray) -> bytes:
    """One value that holds an array."""
    return value(tag, np.ascontiguousarray(array).tobytes(), array.shape, MS_TYPES[array.dtype.str[1:]])


def checkpoint(arrays: Mapping[str, np.ndarray]) -> bytes:
    """A .ckpt."""
    return b"".join(array_value(tag, array) for tag, array in arrays.items())


def strategy(layouts: Mapping[str, tuple[Sequence[int], Sequence[int], int, int]]) -> bytes:
    """A strategy file from dev_matrix, tensor_map, opt_weight_shard_step and opt_weight_shard_size of each parameter."""
    out = field(1, 1) + field(2, field(1, b"MatMul-op1") + field(2, field(1, 0)))
    for name, (dev_matrix, tensor_map, step, size) in layouts.items():
        matrix, axes = (field(number, b"".join(field(1, dim) for dim in dims)) for number, dims in ((1, dev_matrix), (2, tensor_map)))
        rest = field(3, b"") + field(4, b"") + field(5, 0) + field(6, step) + field(7, size)
        out += field(3, field(1, name.encode()) + field(2, matrix + axes + rest))
    return out
