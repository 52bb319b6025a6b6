"""Documents from text files, in blocks that different processes can read.

`.txt` holds documents separated by blank lines; `.jsonl` one JSON object per line with the text under a key. Either may end in `.gz` or
`.zst`. The process that reads a file only finds where documents end; the process that receives a block decodes and parses it.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import zstandard

from pangu.errors import InputError
from pangu.files import open_file

# A task for a worker: about a tenth of a second of tokenizing.
BLOCK_BYTES = 1 << 18
# Such a document is a file that lacks its separators. Tokenizing it takes a hundred times its size.
MAX_DOCUMENT_BYTES = 1 << 24
# What a decompressor may remember: what `zstd --long=27` needs.
MAX_WINDOW_BYTES = 1 << 27


class Block(NamedTuple):
    """Whole documents of an input file, as undecoded bytes."""

    path: Path
    offset: int
    """Offset of the first byte in the (uncompressed) file."""
    line: int
    """Number of the first line, from 1."""
    data: bytes
    bytes_read: int
    """Bytes of the file on disk (compressed, if it is) that were read up to the end of this block."""


def input_size(path: Path) -> int:
    """Size of a file on disk, in bytes.

    Raises:
        InputError: if it cannot be opened, or its name is not that of a supported format.
    """
    _format(path)
    try:
        with open_file(path) as file:
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from None


def read_blocks(path: Path, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Cut a file into blocks of at least `block_bytes`, each ending at a document boundary.

    Raises:
        InputError: the compressed data is damaged, or a document has more than MAX_DOCUMENT_BYTES.
    """
    # A blank line, with either line end before it; or the end of a JSON line.
    boundaries = (b"\n",) if _format(path) == ".jsonl" else (b"\n\n", b"\n\r\n")
    pending = bytearray()
    offset, line, searched = 0, 1, 0
    with open_file(path) as file:
        for piece in _decompressed(file, path, block_bytes):
            pending += piece
            if len(pending) < block_bytes:
                continue
            end = max((at + len(boundary) for boundary in boundaries if (at := pending.rfind(boundary, searched)) >= 0), default=0)
            if not end:
                if len(pending) > MAX_DOCUMENT_BYTES:
                    raise InputError(
                        f"{path}:{line}: the document that begins here has more than {MAX_DOCUMENT_BYTES >> 20} MiB. "
                        "Separate documents with a blank line in .txt, with a line end in .jsonl."
                    )
                searched = len(pending) - 2
                continue
            yield Block(path, offset, line, bytes(pending[:end]), file.tell())
            offset += end
            line += pending.count(b"\n", 0, end)
            del pending[:end]
            searched = 0
        if pending:
            yield Block(path, offset, line, bytes(pending), file.tell())


def documents(block: Block, json_key: str) -> Iterator[str]:
    """The texts of a block.

    In a `.txt`, line ends are read as "\\n" and those around a document are not part of it.

    Raises:
        InputError: invalid UTF-8 (with its byte offset), or a line that is not a JSON object with a text under `json_key`.
    """
    data = block.data.removeprefix(b"\xef\xbb\xbf") if block.offset == 0 else block.data  # a byte order mark, as Windows writes it
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        offset = block.offset + len(block.data) - len(data) + error.start
        raise InputError(
            f"{block.path}: byte 0x{data[error.start]:02x} at offset {offset:,} of the text is not UTF-8. Convert the file, for instance "
            "with iconv -f GB18030 -t UTF-8."
        ) from None
    if _format(block.path) == ".jsonl":
        # Not splitlines(), which also ends a line at characters that JSON allows within a text.
        for number, line in enumerate(text.split("\n"), block.line):
            if line.strip():
                yield _json_text(line, json_key, f"{block.path}:{number}")
    else:
        for document in re.split("\n{2,}", text.replace("\r\n", "\n")):
            if document := document.strip("\n"):
                yield document


def _json_text(line: str, key: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); one object per line expected, such as {{{json.dumps(key)}: ...}}.") from None
    text = value.get(key) if isinstance(value, dict) else None
    if not isinstance(text, str):
        found = f"an object with the keys {', '.join(value)}" if isinstance(value, dict) else f"a {type(value).__name__}"
        raise InputError(f"{where}: {found} found, an object with a text under {key!r} expected. Name its key with --json-key.")
    if "\\u" in line:  # the only way to half a surrogate pair, which no tokenizer can take
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"{where}: half of a surrogate pair (\\ud800 to \\udfff) found in the text. Remove or fix the line.") from None
    return text


def _format(path: Path) -> str:
    """ ".txt" or ".jsonl", whatever compression follows."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    if not suffixes or suffixes[-1] not in (".txt", ".jsonl"):
        raise InputError(f"{path}: .txt or .jsonl expected, or these followed by .gz or .zst. Rename the file for what it holds.")
    return suffixes[-1]


def _decompressed(file: IO[bytes], path: Path, piece_bytes: int) -> Iterator[bytes]:
    """The content of a file in pieces of `piece_bytes` or 128 KiB, however far it expands. A compressed file may be several, joined."""
    try:
        match path.suffix.lower():
            case ".gz":
                yield from _gunzipped(file, piece_bytes)
            case ".zst":
                yield from _unzstandard(file)
            case _:
                while data := file.read(piece_bytes):
                    yield data
    except EOFError:
        raise InputError(
            f"{path}: compressed data expected to go on, the file ends after {file.tell():,} bytes. It was cut off: fetch it again."
        ) from None
    except (zlib.error, zstandard.ZstdError) as error:
        wide = " Compress it with a window of at most 128 MiB (--long=27)." if "too much memory" in str(error) else ""
        raise InputError(f"{path}: damaged near byte {file.tell():,}: {error}.{wide or ' Fetch the file again.'}") from None


def _gunzipped(file: IO[bytes], piece_bytes: int) -> Iterator[bytes]:
    decompressor = None
    data = b""
    while data := data or file.read(piece_bytes // 4):
        if decompressor is None:
            # Zeros may pad a file to a whole number of tape blocks.
            data = data.lstrip(b"\0")
            decompressor = zlib.decompressobj(wbits=31) if data else None  # 31: with gzip's header
            continue
        yield decompressor.decompress(data, piece_bytes)
        data = decompressor.unconsumed_tail
        if decompressor.eof:
            data, decompressor = decompressor.unused_data, None
    if decompressor is not None:
        raise EOFError


def _unzstandard(file: IO[bytes]) -> Iterator[bytes]:
    """Frame by frame and block by block (RFC 8878, 3.1): a block expands to 128 KiB, while the library expands all that it is given."""

    def read(count: int) -> bytes:
        if len(data := file.read(count)) < count:
            raise EOFError
        return data

    while magic := file.read(1):
        if magic == b"\0":
            continue  # padding
        magic += read(3)
        if 0x184D2A50 <= int.from_bytes(magic, "little") <= 0x184D2A5F:  # a frame to be skipped
            for length in _parts(int.from_bytes(read(4), "little")):
                read(length)
            continue
        if magic != zstandard.FRAME_HEADER:
            raise zstandard.ZstdError("no frame of Zstandard begins there")
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()
        descriptor = read(1)[0]
        single, checksum = descriptor & 0x20, descriptor & 4
        size_field = (1 if single else 0, 2, 4, 8)[descriptor >> 6]
        rest = read((0 if single else 1) + (0, 1, 2, 4)[descriptor & 3] + size_field)
        yield decompressor.decompress(magic + bytes([descriptor]) + rest)
        last = 0
        while not last:
            head = read(3)
            value = int.from_bytes(head, "little")
            last, kind, size = value & 1, value >> 1 & 3, value >> 3
            yield decompressor.decompress(head + read(1 if kind == 1 else size))
        if checksum:
            yield decompressor.decompress(read(4))


def _parts(length: int) -> Iterator[int]:
    for begin in range(0, length, BLOCK_BYTES):
        yield min(BLOCK_BYTES, length - begin)
