"""Token files in Megatron-LM's memory-mapped format, and the manifest this project writes beside them.

A data set is named by its prefix. `PREFIX.bin` holds the documents' token ids back to back, without a header. `PREFIX.idx` says where each
document lies; it is little-endian and unpadded (Megatron-LM, `megatron/core/datasets/indexed_dataset.py`):

    9 bytes   magic "MMIDIDX" and two zero bytes
    uint64    version, 1
    uint8     dtype code of the ids in .bin
    uint64    N, number of documents
    uint64    M, length of doc_idx
    int32[N]  sizes: tokens of each document
    int64[N]  pointers: byte offset of each document in .bin
    int64[M]  doc_idx: 0, 1, ... N, one entry per document (other tools may group several items here; it is not read)

`PREFIX.json`, the manifest, records which tokenizer made the ids. Files written by Megatron-LM's own tools have none, and are read too.
"""

from __future__ import annotations

import errno
import os
import struct
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from pangu.errors import InputError
from pangu.files import MAX_TEXT_BYTES, create_file, lock, open_file, read_bytes, remove_leftovers, sync, work_path

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, N, M
# Megatron's codes 6 and 7 are floating point, which token ids are not.
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# Megatron's threshold, below 2^16 so that a few ids can still be added to a vocabulary.
UINT16_VOCAB_LIMIT = 65500
# Index arrays are checked and written this many documents at a time: the temporary arrays stay at tens of MB.
CHUNK = 1 << 20

AGAIN = "run tools/preprocess_data.py again"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype in which ids of this vocabulary are stored: uint16 below 65,500 entries, else int32."""
    return DTYPES[8] if vocab_size < UINT16_VOCAB_LIMIT else DTYPES[4]


class Manifest(BaseModel):
    """Content of `PREFIX.json`: what the ids in `PREFIX.bin` mean, and how many there are."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    tokenizer_sha256: str
    """SHA-256 of the tokenizer's model file, in hexadecimal."""
    vocab_size: NonNegativeInt
    """Vocabulary size of the tokenizer; every id is below it."""
    separator_id: NonNegativeInt
    """The id that ends every document."""
    dtype: str
    documents: NonNegativeInt
    tokens: NonNegativeInt
    """Number of tokens, separators included."""


class IndexedDataset:
    """The documents of one prefix, read through a memory map.

    When the data set is opened, the index is checked against the sizes of the files before any of it is used.

    Attributes:
        sizes: int32[N], tokens of each document. It takes 4 bytes of memory per document; everything else stays in the page cache.
        pointers: int64[N], byte offsets of the documents in .bin.
        manifest: None if there is no `PREFIX.json`.

    Args:
        prefix: path of the files without `.bin` and `.idx`.

    Raises:
        InputError: a file is missing, cut off, damaged, or disagrees with another.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.bin_path, self.idx_path, self.manifest_path = _paths(self.prefix)
        self.dtype, self.sizes, self.pointers = _read_index(self.idx_path)
        bin_bytes = _file_size(self.bin_path)
        _check_pointers(self.bin_path, self.sizes, self.pointers, self.dtype.itemsize, bin_bytes)
        self.manifest = _read_manifest(self.manifest_path)
        if self.manifest is not None:
            self._check_manifest(self.manifest, bin_bytes)
        length = bin_bytes // self.dtype.itemsize
        # A file of no bytes cannot be mapped.
        self._tokens = np.memmap(self.bin_path, self.dtype, "r", shape=(length,)).view(np.ndarray) if length else np.empty(0, self.dtype)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.sizes)

    def __getitem__(self, document: int) -> NDArray[np.integer[Any]]:
        """The ids of one document, in the file's dtype; a read-only view."""
        return self.get(document, 0, int(self.sizes[document]))

    def get(self, document: int, offset: int, length: int) -> NDArray[np.integer[Any]]:
        """`length` ids of one document from its token `offset` on, in the file's dtype; a read-only view."""
        start = int(self.pointers[document]) // self.dtype.itemsize + offset
        return self._tokens[start : start + length]

    def gather(self, documents: NDArray[Any], offsets: NDArray[Any], lengths: NDArray[Any]) -> NDArray[np.integer[Any]]:
        """The concatenated ids of several pieces: `lengths[i]` ids of `documents[i]` from its token `offsets[i]` on."""
        starts = self.pointers[documents] // self.dtype.itemsize + offsets
        if len(starts) == 1:
            return self._tokens[starts[0] : starts[0] + lengths[0]]
        places = (starts - lengths.cumsum() + lengths).repeat(lengths)
        places += np.arange(len(places))
        return self._tokens[places]

    def _check_manifest(self, manifest: Manifest, bin_bytes: int) -> None:
        tokens = int(self.sizes.sum(dtype=np.int64))
        compared: list[tuple[str, int | str, int | str]] = [
            ("documents", manifest.documents, len(self)),
            ("tokens", manifest.tokens, tokens),
            ("dtype", manifest.dtype, self.dtype.name),
            (".bin bytes", manifest.tokens * self.dtype.itemsize, bin_bytes),
        ]
        for what, expected, found in compared:
            if expected != found:
                raise InputError(
                    f"{self.manifest_path}: {what} {_number(expected)} expected from the manifest, {self.prefix}.idx and .bin have "
                    f"{_number(found)}. The three files are not of one run: {AGAIN}."
                )


class IndexedDatasetWriter:
    """Writes a data set document by document; it appears under its name complete or not at all.

    A context manager: leaving it without an exception commits. Until then the files have other names; an exception removes them.
    `PREFIX.idx` is renamed last, because without it the data set cannot be opened: if the process is killed, a reader finds the earlier
    data set, none, or the new one with its manifest. An earlier data set of the same prefix is removed only when the new one is complete.

    Memory: 4 bytes per document.

    Args:
        prefix: path of the files without suffix; its directory is created if it does not exist.
        vocab_size: the tokenizer's vocabulary size; chooses the dtype (`token_dtype`).
        separator_id: id that ends every document, for the manifest.
        tokenizer_sha256: SHA-256 of the tokenizer's model file, for the manifest.

    Raises:
        InputError: a file cannot be written (disk full, no permission), or another process is writing this prefix.
    """

    def __init__(self, prefix: str | Path, *, vocab_size: int, separator_id: int, tokenizer_sha256: str) -> None:
        self.prefix = str(prefix)
        self.paths = _paths(self.prefix)
        self.dtype = token_dtype(vocab_size)
        self.tokens = 0
        self._vocab_size = vocab_size
        self._separator_id = separator_id
        self._tokenizer_sha256 = tokenizer_sha256
        self._sizes = array("i")
        self._files: dict[Path, IO[bytes]] = {}
        """By the name that the file will have."""
        self._held = ExitStack()
        with self._explained():
            self.paths[0].parent.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(lock(self.paths[0]))
            for path in self.paths:
                remove_leftovers(path)
            self._bin = self._open(self.paths[0])

    @property
    def documents(self) -> int:
        """Number of documents added."""
        return len(self._sizes)

    def add(self, tokens: NDArray[np.integer[Any]], sizes: NDArray[np.int32]) -> None:
        """Append documents: their concatenated ids in `self.dtype`, and the number of ids of each."""
        assert tokens.dtype == self.dtype and sizes.dtype == np.int32 and tokens.size == sizes.sum(dtype=np.int64)
        with self._explained():
            self._bin.write(tokens.tobytes())
        self._sizes.frombytes(sizes.tobytes())
        self.tokens += tokens.size

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._discard()
            return
        with self._explained():
            self._commit()

    def _commit(self) -> None:
        bin_path, idx_path, manifest_path = self.paths
        manifest = Manifest(
            tokenizer_sha256=self._tokenizer_sha256,
            vocab_size=self._vocab_size,
            separator_id=self._separator_id,
            dtype=self.dtype.name,
            documents=self.documents,
            tokens=self.tokens,
        )
        self._open(manifest_path).write(manifest.model_dump_json(indent=2).encode() + b"\n")
        _write_index(self._open(idx_path), self.dtype, np.frombuffer(self._sizes, np.int32))
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        idx_path.unlink(missing_ok=True)
        for path in (bin_path, manifest_path, idx_path):
            os.replace(self._files[path].name, path)
        self._close()
        sync(bin_path.parent)

    def _open(self, path: Path) -> IO[bytes]:
        self._files[path] = create_file(work_path(path))
        return self._files[path]

    def _close(self) -> None:
        for file in self._files.values():
            with suppress(OSError):  # on a full disk closing fails too; what matters was flushed before
                file.close()
        self._files.clear()
        self._held.close()

    def _discard(self) -> None:
        for file in self._files.values():
            Path(file.name).unlink(missing_ok=True)
        self._close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Remove the files if the body fails, and turn an error of the file system into a one-line InputError."""
        try:
            yield
        except OSError as error:
            self._discard()
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise InputError(
                f"{self.prefix}.bin: writing stopped after {self.tokens * self.dtype.itemsize:,} bytes: {error.strerror}. Nothing was left "
                f"behind; {'free space there' if full else 'make the directory writable'} or choose another --output."
            ) from error
        except BaseException:
            self._discard()
            raise


def _paths(prefix: str) -> tuple[Path, Path, Path]:
    # Not Path.with_suffix, which would take "v1" off "corpus.v1".
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


def _number(value: int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else value


def _file_size(path: Path) -> int:
    try:
        with open_file(path) as file:
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}. A data set is a PREFIX.bin and a PREFIX.idx, given as PREFIX: {path.with_suffix('')} was given."
        ) from None


def _read_index(path: Path) -> tuple[np.dtype[Any], NDArray[np.int32], NDArray[np.int64]]:
    """Dtype, sizes (a copy: the file's array is not aligned) and pointers (mapped) of an index whose length agrees with its header."""
    file_bytes = _file_size(path)
    try:
        with open_file(path) as file:
            header = file.read(HEADER.size)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from None
    if header.startswith(LEGACY_MAGIC):
        raise InputError(f"{path}: Megatron's old 'lazy' or 'cached' format found, 'mmap' expected. Write it with --dataset-impl mmap.")
    if not header.startswith(MAGIC[: len(header)]) or not header:
        raise InputError(f"{path}: begins with {header[:9]!r}, {MAGIC!r} expected. It is not a Megatron index, or is damaged: {AGAIN}.")
    if len(header) < HEADER.size:
        raise InputError(f"{path}: a header of {HEADER.size} bytes expected, the file ends after {len(header)}. It was cut off: {AGAIN}.")
    _, version, code, documents, doc_idx_length = HEADER.unpack(header)
    if version != VERSION:
        raise InputError(f"{path}: format version {version} found, {VERSION} expected. It is damaged or of a newer Megatron: {AGAIN}.")
    if code not in DTYPES:
        known = ", ".join(f"{code} {dtype.name}" for code, dtype in DTYPES.items())
        raise InputError(f"{path}: dtype code {code} found, one of {known} expected. It is damaged or holds no token ids: {AGAIN}.")
    dtype = DTYPES[code]
    sizes_end = HEADER.size + 4 * documents
    pointers_end = sizes_end + 8 * documents
    expected = pointers_end + 8 * doc_idx_length
    if file_bytes < expected:
        found = min(max(file_bytes - sizes_end, 0) // 8, documents)
        raise InputError(
            f"{path}: {documents:,} documents ({expected:,} bytes) expected from its header, the file ends after {found:,} "
            f"({file_bytes:,} bytes). It was cut off: {AGAIN}."
        )
    if file_bytes > expected:
        raise InputError(
            f"{path}: {expected:,} bytes expected for the {documents:,} documents of its header, {file_bytes:,} found. "
            f"It is damaged or holds more than text: {AGAIN}."
        )
    raw = np.memmap(path, np.uint8, "r").view(np.ndarray)
    sizes = raw[HEADER.size : sizes_end].view("<i4").astype(np.int32)
    pointers = raw[sizes_end:pointers_end].view("<i8")
    return dtype, sizes, pointers


def _check_pointers(path: Path, sizes: NDArray[np.int32], pointers: NDArray[np.int64], itemsize: int, bin_bytes: int) -> None:
    """Refuse a negative size, and a pointer that is out of range, not at the start of an id, or within the document before."""
    end = 0
    for start in range(0, len(sizes), CHUNK):
        size = sizes[start : start + CHUNK].astype(np.int64)
        pointer = np.array(pointers[start : start + CHUNK])
        ends = pointer + size * itemsize
        least = np.concatenate(([end], ends[:-1]))
        end = int(ends[-1])
        # Both are compared, because the sum of a pointer that is far outside may have overflowed.
        outside = (pointer > bin_bytes) | (ends > bin_bytes)
        wrong = outside | (size < 0) | (pointer % itemsize != 0) | (pointer < least)
        if not wrong.any():
            continue
        at = int(wrong.argmax())
        where = f"document {start + at:,}, {size[at]:,} tokens from byte {pointer[at]:,}"
        if outside[at]:
            raise InputError(
                f"{path}: {bin_bytes:,} bytes found, more expected by its index ({where}). "
                f"It was cut off or belongs to another index: {AGAIN}."
            )
        raise InputError(
            f"{path.with_name(path.name.removesuffix('.bin') + '.idx')}: {where}, found; a size of 0 or more and a first byte that is "
            f"a multiple of {itemsize} and not below {least[at]:,} expected. It is damaged: {AGAIN}."
        )


def _read_manifest(path: Path) -> Manifest | None:
    try:
        return Manifest.model_validate_json(read_bytes(path, MAX_TEXT_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(f"{path}: {key}: {first['msg']}. The manifest is damaged or of another version: {AGAIN}.") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}, more than a manifest has. It is damaged: {AGAIN}.") from None


def _write_index(file: IO[bytes], dtype: np.dtype[Any], sizes: NDArray[np.int32]) -> None:
    documents = len(sizes)
    file.write(HEADER.pack(MAGIC, VERSION, CODES[dtype], documents, documents + 1))
    chunks = range(0, documents, CHUNK)
    for start in chunks:
        file.write(sizes[start : start + CHUNK].astype("<i4").tobytes())
    position = 0
    for start in chunks:
        ends = position + np.cumsum(sizes[start : start + CHUNK].astype(np.int64) * dtype.itemsize)
        file.write(np.concatenate(([position], ends[:-1])).astype("<i8").tobytes())
        position = int(ends[-1])
    for start in range(0, documents + 1, CHUNK):
        file.write(np.arange(start, min(start + CHUNK, documents + 1), dtype="<i8").tobytes())
