"""Reads and writes MindSpore's .ckpt files: protobuf that is read by offset, one tensor at a time, and written as MindSpore writes it.

    Checkpoint   1 value (repeated)
    Value        1 tag, the parameter's name    2 tensor                3 maptensor (not read)
    TensorProto  1 dims (repeated int64)        2 tensor_type (string)  3 tensor_content (C order, little-endian)

A file is a concatenation of such messages, one value each. A tensor of more than 512 MiB is several consecutive values with the same tag
and the full dims in each, its bytes in file order. Some files end in 17 bytes: `crc_num` and the CRC-32 of all before, big-endian. A size
that a file states is never used before it is compared with the bytes that exist.
"""

from __future__ import annotations

import math
import mmap
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import torch
from torch import Tensor

from pangu.errors import InputError
from pangu.files import open_file
from pangu.tensor_files.blocks import BLOCK_BYTES, blocks
from pangu.tensor_files.lazy_tensor import LazyTensor

CHUNK_BYTES = 512 * 2**20
"""MindSpore's SLICE_SIZE: the number of bytes of a tensor that one value of a file holds at most."""

# Bounds that no real file comes near; a hostile one costs no more than they allow.
MAX_VALUES = 1 << 16
MAX_FIELDS = 256
MAX_TAG_BYTES = 4096
MAX_DIMS = 16

TRAILER, TRAILER_BYTES = b"crc_num", 17
# How files begin that MindSpore encrypted with AES-GCM or AES-CBC.
ENCRYPTED = (b"\xd8\x5e\x3a\x7f", b"\xd9\x5e\x3a\x7f")

# MindSpore's name of each type. Early versions spell some in another case.
TYPE_NAMES = {
    torch.float16: "Float16",
    torch.bfloat16: "BFloat16",
    torch.float32: "Float32",
    torch.float64: "Float64",
    torch.int8: "Int8",
    torch.uint8: "UInt8",
    torch.int16: "Int16",
    torch.uint16: "UInt16",
    torch.int32: "Int32",
    torch.uint32: "UInt32",
    torch.int64: "Int64",
    torch.uint64: "UInt64",
    torch.bool: "Bool",
}
_DTYPES = {name.lower(): dtype for dtype, name in TYPE_NAMES.items()}
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


class Message(NamedTuple):
    """A protobuf message, or any length-delimited field, inside a buffer. Its bytes are copied only when they are read."""

    path: Path
    buffer: bytes | mmap.mmap
    begin: int
    end: int

    def refuse(self, at: int, problem: str) -> NoReturn:
        """Raise InputError about a malformed message, with the path and the byte offset `at`."""
        raise InputError(f"{self.path}: byte {at:,}: {problem}. The file was cut off, is damaged or is of another format: copy it again.")

    def fields(self, most: int = MAX_FIELDS) -> Iterator[tuple[int, int, int | Message]]:
        """Number, offset and value of each field: an unsigned integer, or a message. Fields of fixed width, which MindSpore's messages do
        not have, are skipped.
        """
        at = self.begin
        for _ in range(most):
            if at == self.end:
                return
            key, body = self._varint(at)
            number, wire = key >> 3, key & 7
            value: int | Message | None = None
            if wire == _VARINT:
                value, body = self._varint(body)
            elif wire == _LENGTH:
                length, begin = self._varint(body)
                body = begin + length
                value = Message(self.path, self.buffer, begin, body)
            elif wire in (_FIXED64, _FIXED32):
                body += 8 if wire == _FIXED64 else 4
            if number == 0 or body > self.end or (value is None and wire not in (_FIXED64, _FIXED32)):
                claim = f"a field that ends at byte {body:,}, past byte {self.end:,}" if body > self.end else "no protobuf field"
                self.refuse(at, claim)
            if value is not None:
                yield number, at, value
            at = body
        if at < self.end:
            self.refuse(at, f"more than {most:,} fields")

    def integers(self) -> list[int]:
        """The message decoded as packed signed integers."""
        values, at = [], self.begin
        while at < self.end:
            value, at = self._varint(at)
            values.append(signed(value))
            if len(values) > MAX_DIMS:
                self.refuse(at, f"more than {MAX_DIMS} dimensions")
        return values

    def text(self) -> str:
        """The message decoded as a short UTF-8 string."""
        if self.end - self.begin > MAX_TAG_BYTES:
            self.refuse(self.begin, f"a name of {self.end - self.begin:,} bytes, at most {MAX_TAG_BYTES:,} expected")
        try:
            text = self.buffer[self.begin : self.end].decode()
        except UnicodeDecodeError:
            text = "\0"
        if not text.isprintable():
            self.refuse(self.begin, "a name that is not text")
        return text

    def _varint(self, at: int) -> tuple[int, int]:
        value = shift = 0
        while at < self.end and shift < 64:
            byte = self.buffer[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, at
            shift += 7
        self.refuse(at, "an integer that does not end")


def signed(value: int) -> int:
    """The int32 or int64 that an unsigned varint encodes."""
    return value - 2**64 if value >= 2**63 else value


@dataclass(frozen=True)
class StoredTensor:
    """Description of a tensor in a file, and the location of its bytes."""

    shape: tuple[int, ...]
    type_name: str
    dtype: torch.dtype | None
    """Dtype; None for a type that cannot be read here (strings, 4-bit integers, maps), whose bytes are not checked."""
    pieces: tuple[tuple[int, int], ...]
    """Offset and number of bytes of each piece, in order."""

    def lazy(self, path: Path, name: str) -> LazyTensor:
        """A lazy tensor of the file `path`; each read allocates its own memory.

        Raises:
            InputError: if the tensor is empty or not floating point; on reading, if the file has shrunk in the meantime.
        """
        dtype = self.dtype
        if 0 in self.shape:
            raise InputError(f"{path}: {name} has shape {list(self.shape)}, which no weight has.")
        if dtype is None or not dtype.is_floating_point:
            raise InputError(f"{path}: {name} is of type {self.type_name}, expected Float16, BFloat16, Float32 or Float64.")

        def read_part(dimension: int, begin: int, end: int) -> Tensor:
            part = torch.empty((*self.shape[:dimension], end - begin, *self.shape[dimension + 1 :]), dtype=dtype)
            self._read_into(path, part, dimension, begin)
            return part

        return LazyTensor(self.shape, dtype, lambda: self.read(path), read_part)

    def read(self, path: Path) -> Tensor:
        """Read the whole tensor from the file `path`."""
        assert self.dtype is not None, self.type_name
        whole = torch.empty(self.shape or (1,), dtype=self.dtype)
        self._read_into(path, whole, 0, 0)
        return whole.view(self.shape)

    def _read_into(self, path: Path, part: Tensor, dimension: int, begin: int) -> None:
        """Fill `part`, the slice of the tensor that starts at `begin` of a dimension."""
        if part.numel() == 0:
            return
        inner = math.prod(self.shape[dimension + 1 :]) * part.dtype.itemsize
        stride = math.prod(self.shape[dimension:]) * part.dtype.itemsize
        target = part.view(-1).view(torch.uint8).numpy().data
        length = part.shape[dimension] * inner
        try:
            with open(path, "rb", buffering=0) as file:
                for row in range(len(target) // length):
                    self._read_range(file, row * stride + begin * inner, target[row * length : (row + 1) * length])
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from None

    def _read_range(self, file: BinaryIO, begin: int, target: memoryview) -> None:
        for offset, size in self.pieces:
            part = target[: max(0, size - begin)]
            target = target[len(part) :]
            if part:
                file.seek(offset + begin)
            while part:
                count = file.readinto(part)  # type: ignore[attr-defined]
                if not count:
                    raise InputError(f"{file.name}: became shorter while it was read.")
                part = part[count:]
            begin = max(0, begin - size)


@contextmanager
def mapped(path: Path) -> Iterator[Message]:
    """A memory-mapped file as one message; only the bytes that are accessed are read."""
    try:
        with open_file(path) as file:
            size = file.seek(0, 2)
            if size == 0:
                raise InputError(f"{path}: is empty.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                yield Message(path, buffer, 0, size)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from None


def scan(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a .ckpt by name, in file order. Only the headers between the tensors' bytes are read.

    Raises:
        InputError: with the file and the offset, if it is not a complete MindSpore checkpoint.
    """
    with mapped(path) as whole:
        if whole.buffer[:4] in ENCRYPTED:
            raise InputError(f"{path}: is encrypted. Load it in MindSpore with its dec_key and save it without enc_key.")
        if whole.buffer[:1] != b"\n":
            raise InputError(f"{path}: does not begin as a MindSpore checkpoint does. Of a sharded one, give the folder of all ranks.")
        if whole.buffer[-TRAILER_BYTES : -TRAILER_BYTES + len(TRAILER)] == TRAILER:
            whole = whole._replace(end=whole.end - TRAILER_BYTES)
        return _scan(whole)


def verify_checksum(path: Path, advance: Callable[[int], None] = lambda read: None) -> bool:
    """Read every byte of a .ckpt and compare it with the CRC-32 at its end; False if it has none.

    Args:
        path: the file.
        advance: called with the bytes of each block as it is read.

    Raises:
        InputError: if the two differ.
    """
    try:
        with open(path, "rb") as file:
            end = max(0, file.seek(0, 2) - TRAILER_BYTES)
            file.seek(end)
            trailer = file.read(TRAILER_BYTES)
            if not trailer.startswith(TRAILER):
                return False
            checksum, left = 0, end
            file.seek(0)
            while block := file.read(min(BLOCK_BYTES, left)):
                checksum, left = zlib.crc32(block, checksum), left - len(block)
                advance(len(block))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from None
    if checksum != int.from_bytes(trailer[len(TRAILER) :], "big"):
        raise InputError(f"{path}: its bytes do not have the CRC-32 that it ends with. It is damaged: copy it again.")
    return True


def _scan(whole: Message) -> dict[str, StoredTensor]:
    first: dict[str, tuple[int, StoredTensor]] = {}  # offset and the first piece of each tensor
    pieces: dict[str, list[tuple[int, int]]] = {}
    last = ""
    for number, at, value in whole.fields(MAX_VALUES):
        if number != 1:
            continue
        if not isinstance(value, Message):
            whole.refuse(at, "an integer where a value is expected")
        tag, found = _read_value(value, at)
        if tag not in first:
            first[tag], pieces[tag] = (at, found), []
        else:
            begin, earlier = first[tag]
            if tag != last:
                whole.refuse(at, f"{tag} a second time, after byte {begin:,}")
            if (found.shape, found.dtype) != (earlier.shape, earlier.dtype):
                whole.refuse(at, f"{tag} goes on as {found.type_name} {list(found.shape)} after {earlier.type_name} {list(earlier.shape)}")
        pieces[tag] += found.pieces
        last = tag
    if not first:
        raise InputError(f"{whole.path}: holds no tensors.")
    return {tag: _joined(whole, at, tag, tensor, tuple(pieces[tag])) for tag, (at, tensor) in first.items()}


def _joined(whole: Message, at: int, tag: str, tensor: StoredTensor, pieces: tuple[tuple[int, int], ...]) -> StoredTensor:
    """A tensor with all its pieces, once they are as many bytes as its shape needs."""
    shape = tensor.shape
    if tensor.dtype is not None:
        found = sum(size for _, size in pieces)
        if shape == (0,) and found:
            shape = ()  # a scalar as early versions wrote it; it has no dims otherwise
        expected = math.prod(shape) * tensor.dtype.itemsize
        if found != expected:
            whole.refuse(at, f"{tag} holds {found:,} bytes, {tensor.type_name} {list(shape)} needs {expected:,}")
    return StoredTensor(shape, tensor.type_name, tensor.dtype, pieces)


def _read_value(value: Message, at: int) -> tuple[str, StoredTensor]:
    parts: dict[int, Message] = {}
    for number, field_at, part in value.fields():
        if number in (1, 2, 3):
            if not isinstance(part, Message) or number in parts:
                value.refuse(field_at, "no tag and tensor, each once")
            parts[number] = part
    if 1 not in parts or not (tag := parts[1].text()):
        value.refuse(at, "a value without a tag")
    if 2 not in parts:
        return tag, StoredTensor((), "map", None, ())
    shape: list[int] = []
    content: dict[int, Message] = {}
    for number, field_at, part in parts[2].fields():
        if number == 1:
            shape += [signed(part)] if isinstance(part, int) else part.integers()
            if len(shape) > MAX_DIMS or min(shape, default=0) < 0:
                value.refuse(field_at, f"{tag} with dimensions {shape}")
        elif number in (2, 3):
            if not isinstance(part, Message) or number in content:
                value.refuse(field_at, f"{tag} without type and content, each once")
            content[number] = part
    if len(content) != 2:
        value.refuse(at, f"{tag} without type and content")
    type_name, data = content[2].text(), content[3]
    return tag, StoredTensor(tuple(shape), type_name, _DTYPES.get(type_name.lower()), ((data.begin, data.end - data.begin),))


def write_tensor(file: BinaryIO, tag: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Append a tensor to a .ckpt, byte for byte as `mindspore.save_checkpoint` does.

    Args:
        file: a file opened for writing.
        tag: the tensor's name.
        tensor: a tensor of one dimension or more, in any memory layout.
        dtype: dtype to write.
    """
    total, room = tensor.numel() * dtype.itemsize, 0
    for left in blocks(tensor, dtype):
        while left:
            if not room:
                room = min(total, CHUNK_BYTES)
                total -= room
                file.write(_value_header(tag, tensor.shape, TYPE_NAMES[dtype], room))
            part, left = left[:room], left[room:]
            file.write(part)
            room -= len(part)


def _value_header(tag: str, shape: torch.Size, type_name: str, content_bytes: int) -> bytes:
    """What precedes the content of one value."""
    name = _field(1, len(tag.encode())) + tag.encode()
    dims = b"".join(b"\x08" + _varint(dim) for dim in shape)
    tensor = dims + _field(2, len(type_name)) + type_name.encode() + _field(3, content_bytes)
    value = name + _field(2, len(tensor) + content_bytes) + tensor
    return _field(1, len(value) + content_bytes) + value


def _field(number: int, length: int) -> bytes:
    return _varint(number << 3 | _LENGTH) + _varint(length)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
