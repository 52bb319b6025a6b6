"""Reads files of `torch.save` without executing anything in them, and writes such files, one tensor at a time.

    root = load(Path("model_optim_rng.pt"))                  # plain containers; tensors are StoredTensor, all else is inert
    root["model"]["weight"].read()                           # maps just this tensor's bytes

Two forms exist. Since torch 1.6 a file is an uncompressed zip archive: `*/data.pkl` is a pickle, and `*/data/KEY` a storage's raw bytes.
Before, it was five pickles in a row (magic number, version, machine, object, storage keys), followed by each storage's element count and
bytes. `torch_pickle` says why torch's own reader is not used.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import mmap
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pangu.errors import InputError
from pangu.files import open_file
from pangu.tensor_files.blocks import blocks
from pangu.tensor_files.torch_pickle import MAX_BYTES, Global, Machine, Opaque, PickleError

MAX_MEMBERS = 100_000
"""Largest number of storages in a file: twenty times those of a 200B model with its optimizer."""
ALIGNMENT = 64
WIDE = 2**31 - 1
"""Size in bytes from which members are written in the 64-bit form of zip archives."""
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


@dataclass(eq=False)
class _Storage:
    dtype: torch.dtype
    numel: int
    begin: int | None
    """Offset of the storage's bytes in the file; in a legacy file it is known only after the pickles are read."""


@dataclass(frozen=True, eq=False, repr=False)
class StoredTensor:
    """A tensor in a file."""

    path: Path
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in the file."""
        return self.storage.dtype

    def read(self) -> Tensor:
        """The tensor as a view of the mapped file: only what is accessed is read, and the mapping is released with its last view.

        Raises:
            InputError: if the file has become shorter since it was opened.
        """
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        assert self.storage.begin is not None
        size = self.dtype.itemsize
        begin = self.storage.begin + self.offset * size
        count = 1 + sum((extent - 1) * stride for extent, stride in zip(self.shape, self.strides, strict=True))
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        try:
            with open(self.path, "rb") as file:
                # A private mapping is writable, which torch asks for; what is written never reaches the file.
                mapped = mmap.mmap(file.fileno(), begin - page + count * size, access=mmap.ACCESS_COPY, offset=page)
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}: cannot be read any more ({error}). Was it changed while it was read?") from None
        if begin % size:
            flat = torch.frombuffer(mapped, dtype=torch.uint8, count=count * size, offset=begin - page).clone().view(self.dtype)
        else:
            flat = torch.frombuffer(mapped, dtype=self.dtype, count=count, offset=begin - page)
        return flat.as_strided(self.shape, self.strides)


def is_torch_file(path: Path) -> bool:
    """Whether a file begins like one that `torch.save` has written."""
    try:
        with open_file(path) as file:
            head = file.read(len(_LEGACY_MAGIC))
    except OSError:
        return False
    return head.startswith(b"PK\x03\x04") or head == _LEGACY_MAGIC


def load(path: Path) -> Any:
    """The content of a file of `torch.save`: plain containers with `StoredTensor`, `Global` and `Opaque` in them.

    Nesting is not limited: never walk the value recursively, compare it or print it.

    Raises:
        InputError: if the file is damaged or of another format. Time and memory are bounded for any content.
    """
    try:
        with open_file(path) as file:
            head = file.read(len(_LEGACY_MAGIC))
            if head.startswith(b"PK\x03\x04"):
                return _load_zip(path, file)
            if head == _LEGACY_MAGIC:
                return _load_legacy(path, file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except PickleError as error:
        raise InputError(f"{path}: damaged, or no checkpoint ({error}). Copy or save it again.") from None
    raise InputError(f"{path}: not written by torch.save: it begins with neither a zip archive nor torch's magic number.")


def _load_zip(path: Path, file: BinaryIO) -> Any:
    members = _members(file)
    if "data.pkl" not in members:
        raise PickleError("a zip archive without data.pkl")
    for name, limit in (("data.pkl", MAX_BYTES), ("byteorder", 16)):
        if members.get(name, (0, 0))[1] > limit:
            raise PickleError(f"{name} of {members[name][1]:,} bytes; a checkpoint's has at most {limit:,}")
    if "byteorder" in members and _read_at(file, *members["byteorder"]) != b"little":
        raise PickleError("written on a big-endian machine")

    def persistent(identity: Any) -> Any:
        dtype, key, numel = _storage_identity(identity, 5)
        begin, size = members.get(f"data/{key}", (0, -1))
        if size != numel * dtype.itemsize:
            found = f"has {size:,} bytes" if size >= 0 else "is missing"
            raise PickleError(f"storage {_shown(key)} {found}, {_shown(numel)} elements of {dtype} expected")
        return _Storage(dtype, numel, begin)

    value, _ = Machine(_read_at(file, *members["data.pkl"]), persistent=persistent, calls=_calls(path)).run()
    return value


def _load_legacy(path: Path, file: BinaryIO) -> Any:
    file_size = file.seek(0, io.SEEK_END)
    data = _read_at(file, 0, min(file_size, MAX_BYTES))
    storages: dict[str, _Storage] = {}

    def persistent(identity: Any) -> Any:
        if type(identity) is tuple and identity and type(identity[0]) is str and identity[0] == "module":
            return Opaque("module", identity)  # source code that old versions kept beside a class
        dtype, key, numel = _storage_identity(identity, 6)
        if numel * dtype.itemsize > file_size:
            raise PickleError(f"storage {_shown(key)} claims {_shown(numel)} elements of {dtype} in a file of {file_size:,} bytes")
        known = storages.setdefault(key, _Storage(dtype, numel, None))
        if (known.dtype, known.numel) != (dtype, numel):
            raise PickleError(f"storage {_shown(key)} is described in two ways")
        return known

    position = 0
    values = []
    for _ in range(5):
        value, position = Machine(data, position, persistent=persistent, calls=_calls(path)).run()
        values.append(value)
    _, version, machine, root, keys = values
    if type(version) is not int or version != 1001 or type(machine) is not dict or machine.get("little_endian") is not True:
        raise PickleError("an unknown version, or written on a big-endian machine")
    if type(keys) is not list or not all(type(key) is str and key in storages for key in keys):
        raise PickleError("its list of storages does not fit its tensors")
    for key in keys:
        storage = storages[key]
        (count,) = struct.unpack("<q", _read_at(file, position, 8))
        storage.begin = position + 8
        position = storage.begin + storage.numel * storage.dtype.itemsize
        if count != storage.numel or position > file_size:
            raise PickleError(f"storage {_shown(key)} is cut off or has {count:,} elements, {storage.numel:,} expected")
    if any(storage.begin is None for storage in storages.values()):
        raise PickleError("a tensor's storage is missing")
    return root


def _storage_identity(identity: Any, length: int) -> tuple[torch.dtype, str, int]:
    """(dtype, key, number of elements) from ("storage", type, key, device, elements[, None])."""
    if type(identity) is tuple and len(identity) == length and type(identity[0]) is str and identity[0] == "storage":
        kind, key, numel = identity[1], identity[2], identity[4]
        dtype = _DTYPES.get(kind.name) if isinstance(kind, Global) else None
        if dtype is not None and type(key) is str and type(numel) is int and numel >= 0 and (length < 6 or identity[5] is None):
            return dtype, key, numel
    raise PickleError("a storage of an unknown kind")


def _calls(path: Path) -> dict[str, Callable[[tuple[Any, ...]], Any]]:
    """The functions that a pickle may call: not torch's own, but replacements that build descriptions of tensors."""

    def tensor(args: tuple[Any, ...]) -> StoredTensor:
        # storage, offset, shape, strides, requires_grad, hooks[, metadata]
        if len(args) < 4 or not isinstance(args[0], _Storage):
            raise PickleError("a tensor without a storage")
        storage, offset, shape, strides = args[:4]
        if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides) or len(shape) > 16:
            raise PickleError("a tensor without a shape")
        if not all(type(number) is int and number >= 0 for number in (offset, *shape, *strides)):
            raise PickleError("a tensor with a shape that is not a list of counts")
        last = offset + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
        if 0 in shape and math.prod(extent or 1 for extent in shape) > WIDE:
            raise PickleError("an empty tensor of an impossible shape")
        if 0 not in shape and (last >= storage.numel or math.prod(shape) > storage.numel):
            raise PickleError(f"a tensor larger than its storage of {storage.numel:,} elements")
        return StoredTensor(path, storage, offset, shape, strides)

    def parameter(args: tuple[Any, ...]) -> Any:
        return args[0] if args else None

    def subclass(args: tuple[Any, ...]) -> Any:
        # function, type, its arguments, state: a tensor with attributes
        function = args[0] if len(args) == 4 and isinstance(args[0], Global) else None
        known = rebuild.get(function.name) if function else None
        return known(args[2]) if known and type(args[2]) is tuple else Opaque("torch._tensor._rebuild_from_type_v2", args)

    def mapping(args: tuple[Any, ...]) -> Any:
        return {} if not args else Opaque("collections.OrderedDict", args)

    rebuild = {"torch._utils._rebuild_tensor_v2": tensor, "torch._utils._rebuild_tensor": tensor}
    return rebuild | {
        "torch._utils._rebuild_parameter": parameter,
        "torch._utils._rebuild_parameter_with_state": parameter,
        "torch._tensor._rebuild_from_type_v2": subclass,
        "torch.Size": lambda args: args[0] if args else (),
        "collections.OrderedDict": mapping,
        "collections.defaultdict": lambda args: {},
    }


def _shown(value: Any) -> str:
    """A short text or number from a file, fit for a line."""
    text = repr(value) if type(value) is str else f"{value:,}" if type(value) is int and abs(value) < 10**18 else "of an impossible size"
    return text if len(text) <= 60 else text[:57] + "..."


def _read_at(file: BinaryIO, begin: int, size: int) -> bytes:
    if 0 <= begin < 2**62:
        file.seek(begin)
        data = file.read(size)
        if len(data) == size:
            return data
    raise PickleError(f"the file ends before {size:,} bytes at {_shown(begin)}")


# --- zip archives ------------------------------------------------------------------------------------------------------------------------


def _members(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """(begin, size) of the raw bytes of each member, by its name without the archive's (`model/data.pkl`: `data.pkl`).

    The standard library's reader makes an object of a kilobyte for each of as many entries as a file claims, and asks nothing about
    their places; here members must be stored as they are, whole, one after the other. A name is never used as a path.
    """
    file_size = file.seek(0, io.SEEK_END)
    entries, begin, size = _directory(file, file_size)
    if entries > MAX_MEMBERS or size > 512 * MAX_MEMBERS or begin + size > file_size:
        raise PickleError(f"a zip directory of {entries:,} entries in {size:,} bytes at {begin:,}")
    directory = _read_at(file, begin, size)
    members: dict[str, tuple[int, int]] = {}
    places = []
    for name, local, length in _entries(directory, entries):
        header = _read_at(file, local, 30)
        if header[:4] != b"PK\x03\x04":
            raise PickleError(f"zip member {_shown(name)} is not where the directory says")
        data = local + 30 + sum(struct.unpack("<2H", header[26:30]))
        within = name.partition("/")[2]
        if within in members:
            raise PickleError(f"zip member {_shown(name)} is there twice")
        members[within] = (data, length)
        places.append((local, data + length))
    places.sort()
    places.append((begin, begin))
    for (_, end), (following, _) in itertools.pairwise(places):
        if end > following:
            raise PickleError("zip members overlap or are cut off")
    return members


def _directory(file: BinaryIO, file_size: int) -> tuple[int, int, int]:
    """(entries, begin, size) of a zip archive's directory."""
    tail_begin = max(0, file_size - 65_557)
    tail = _read_at(file, tail_begin, file_size - tail_begin)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < 22:
        raise PickleError("a zip archive without an end: it was cut off")
    entries, size, begin = struct.unpack("<HII", tail[at + 10 : at + 20])
    if entries == 0xFFFF or size == 0xFFFFFFFF or begin == 0xFFFFFFFF:
        locator = tail[max(0, at - 20) : at]
        if len(locator) != 20 or locator[:4] != b"PK\x06\x07":
            raise PickleError("a zip archive without its 64-bit directory")
        (end,) = struct.unpack("<Q", locator[8:16])
        record = _read_at(file, min(end, file_size), 56)
        if record[:4] != b"PK\x06\x06":
            raise PickleError("a zip archive without its 64-bit directory")
        entries, size, begin = struct.unpack("<QQQ", record[32:56])
    return entries, begin, size


def _entries(directory: bytes, entries: int) -> Iterator[tuple[str, int, int]]:
    """(name, place of the local header, size) of each entry."""
    at = 0
    for _ in range(entries):
        header = directory[at : at + 46]
        if len(header) != 46 or header[:4] != b"PK\x01\x02":
            raise PickleError("a damaged zip directory")
        flags, method = struct.unpack("<HH", header[8:12])
        packed, size, name_length, extra_length, comment_length = struct.unpack("<IIHHH", header[20:34])
        (local,) = struct.unpack("<I", header[42:46])
        extra_begin = at + 46 + name_length
        name = directory[at + 46 : extra_begin].decode("utf-8", "replace")
        extra = directory[extra_begin : extra_begin + extra_length]
        size, packed, local = _wide(extra, [size, packed, local])
        if method != 0 or flags & 1 or packed != size:
            raise PickleError(f"zip member {_shown(name)} is compressed or encrypted, which torch.save does not do")
        yield name, local, size
        at = extra_begin + extra_length + comment_length


def _wide(extra: bytes, values: list[int]) -> list[int]:
    """Sizes and place of a member, those of 0xFFFFFFFF taken from the extra field of 64-bit archives."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack("<HH", extra[at : at + 4])
        if kind == 1:
            numbers = (number for (number,) in struct.iter_unpack("<Q", extra[at + 4 : at + 4 + min(length, len(extra) - at - 4) // 8 * 8]))
            return [next(numbers, value) if value == 0xFFFFFFFF else value for value in values]
        at += 4 + length
    return values


# --- writing -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Planned:
    """Placeholder in a tree for a tensor that will be written later."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TorchFileWriter:
    """Writes a file that `torch.load` reads, `weights_only` or not, holding one tensor at a time.

        with TorchFileWriter(path, {"model": {"weight": Planned((4, 2), torch.float32)}}) as writer:
            writer.write(weight)

    Args:
        path: the file to write.
        tree: nested dicts of plain values, with a `Planned` for each tensor.
    """

    def __init__(self, path: Path, tree: dict[str, Any]) -> None:
        self._planned: list[Planned] = []
        pickled = _pickle(tree, self._planned)
        self._prefix = path.stem
        self._written = 0
        self._file = open(path, "wb")  # noqa: SIM115 (closed by __exit__)
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        for name, data in (("data.pkl", pickled), ("byteorder", sys.byteorder.encode()), ("version", b"3\n")):
            self._member(name, len(data), [data])

    def write(self, tensor: Tensor) -> None:
        """Write the next tensor of the tree, in the order in which its containers hold them."""
        planned = self._planned[self._written]
        assert tensor.shape == planned.shape, (tensor.shape, planned.shape)
        size = math.prod(planned.shape) * planned.dtype.itemsize
        self._member(f"data/{self._written}", size, blocks(tensor.detach().cpu(), planned.dtype))
        self._written += 1

    def _member(self, name: str, size: int, parts: Iterable[bytes | memoryview]) -> None:
        info = zipfile.ZipInfo(f"{self._prefix}/{name}")
        wide = size >= WIDE
        # torch begins each storage at a multiple of 64 bytes, so that it can be mapped; an extra field fills the gap.
        begin = self._file.tell() + 30 + len(info.filename.encode()) + 4 + (20 if wide else 0)
        gap = -begin % ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", gap) + b"Z" * gap
        with self._archive.open(info, "w", force_zip64=wide) as member:
            for part in parts:
                member.write(part)

    def __enter__(self) -> TorchFileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                assert self._written == len(self._planned), "not all tensors of the tree were written"
                self._archive.close()
            else:
                with contextlib.suppress(OSError, ValueError):
                    self._archive.close()  # or it would try to when it is collected, and complain
                with contextlib.suppress(OSError):
                    self._file.truncate(0)  # what was broken off must not look complete
        finally:
            self._file.close()


class _PlannedStorage:
    def __init__(self, key: str, planned: Planned) -> None:
        self.key, self.planned = key, planned


def _pickle(tree: Any, planned: list[Planned]) -> bytes:
    """The pickle of `data.pkl`; fills `planned` with the tensors in order."""
    buffer = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if not isinstance(value, _PlannedStorage):
                return None
            name = next(name for name, dtype in _DTYPES.items() if dtype == value.planned.dtype)
            kind = getattr(torch, name.removeprefix("torch."))
            return ("storage", kind, value.key, "cpu", math.prod(value.planned.shape))

        def reducer_override(self, value: Any) -> Any:
            if not isinstance(value, Planned):
                return NotImplemented
            storage = _PlannedStorage(str(len(planned)), value)
            planned.append(value)
            hooks: OrderedDict[str, Any] = OrderedDict()
            return torch._utils._rebuild_tensor_v2, (storage, 0, value.shape, _strides(value.shape), False, hooks)

    Pickler(buffer, protocol=2).dump(tree)
    return buffer.getvalue()


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
