"""Documents from text files, in blocks that different processes can read.

`.txt` holds documents separated by blank lines; `.jsonl` one JSON object per line with the text under a key. Either may end in `.gz` or
`.zst`. The process that reads a file only finds where documents end; the process that receives a block decodes and parses it.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import zstandard

from pangu.errors import InputError
from pangu.files import open_file

# A task for a worker: about a tenth of a second of tokenizing.
BLOCK_BYTES = 1 << 18
# Such a document is a file that lacks its separators, and would have to fit in memory whole.
MAX_DOCUMENT_BYTES = 1 << 28


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
    """The content of a file, piece by piece. A compressed file may be several that were joined."""
    start: Callable[[], Any]
    match path.suffix.lower():
        case ".gz":
            start = lambda: zlib.decompressobj(wbits=31)  # noqa: E731 - 31: with gzip's header
        case ".zst":
            start = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj  # 2 GiB: what `zstd --long=31` needs
        case _:
            while data := file.read(piece_bytes):
                yield data
            return
    decompressor = None
    while data := file.read(piece_bytes // 4):
        while data:
            if decompressor is None:
                decompressor = start()
            try:
                yield decompressor.decompress(data)
            except (zlib.error, zstandard.ZstdError) as error:
                raise InputError(f"{path}: damaged near byte {file.tell():,}: {error}. Fetch the file again.") from None
            # Zeros may pad a file to a whole number of tape blocks.
            data = decompressor.unused_data.lstrip(b"\0")
            if decompressor.eof:
                decompressor = None
    if decompressor is not None:
        raise InputError(
            f"{path}: compressed data expected to go on, the file ends after {file.tell():,} bytes. It was cut off: fetch it again."
        )
