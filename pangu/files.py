"""Opens files from elsewhere, and writes files that appear complete or not at all and survive a power loss."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pangu.errors import InputError

MAX_JSON_BYTES = 4 * 2**20
"""Largest JSON file in bytes that is parsed: more than ten times the largest index or manifest. Parsed, it may take thirty times as
much."""
MAX_TEXT_BYTES = 2**20
"""Largest configuration or other text that people write by hand, in bytes."""


def open_file(path: Path) -> BinaryIO:
    """Open a file from elsewhere for reading.

    Raises:
        OSError: also if it is not a regular file: reading a pipe would block, and a device never ends.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no ordinary file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a whole file from elsewhere.

    Raises:
        OSError: see `open_file`.
        ValueError: if it has more than `limit` bytes.
    """
    with open_file(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"more than {limit:,} bytes")
    return content


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """Read a whole text file from elsewhere. A byte order mark, which Windows writes, is not part of the text.

    Raises:
        OSError: see `open_file`.
        ValueError: if it is not UTF-8 or has more than `limit` bytes.
    """
    return read_bytes(path, limit).decode("utf-8").removeprefix("\ufeff")


def parse_json(text: str) -> Any:
    """The value of a JSON text from elsewhere.

    Raises:
        ValueError: if it is not JSON, is nested too deeply, or has NaN, an infinity or a number of thousands of digits.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def load_json(path: Path) -> Any:
    """Read a JSON file from elsewhere.

    Raises:
        OSError: see `open_file`.
        ValueError: if it is not JSON, is nested too deeply, or is larger than `MAX_JSON_BYTES`.
    """
    return parse_json(read_text(path, MAX_JSON_BYTES))


def sync(path: Path) -> None:
    """Flush a file's contents, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Write a small text file atomically: at every moment either the old or the new content exists."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def remove(path: Path) -> None:
    """Remove a file or a directory if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Let only one process at a time write a file or directory: a `NAME.lock` beside it names the process.

    The kernel holds the lock, and releases it when the process ends, however it ends. A lock file that a killed process leaves is reused by
    the next. On a file system without locks every process gets one.

    Raises:
        InputError: if another process holds the lock.
        OSError: if the lock file cannot be created.
    """
    beside = path.with_name(path.name + ".lock")
    while True:
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if beside.exists() and os.path.samestat(os.fstat(descriptor), os.stat(beside)):
                break  # or else its last owner has just removed it, and it locks nothing
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise InputError(f"{path}: {holder} is writing it. Wait until it is done, or choose another place.") from None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            break
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    try:
        yield
    finally:
        beside.unlink(missing_ok=True)
        os.close(descriptor)


def publish(partial: Path, final: Path) -> None:
    """Rename a finished file or directory to its final name, replacing what had that name, after flushing it to disk.

    A file replaces a file atomically. For directories that is not possible: a kill in between leaves the old one as
    `NAME.replaced`, and `recover` restores it.
    """
    for entry in sorted(partial.rglob("*")) if partial.is_dir() else []:
        sync(entry)
    sync(partial)
    replaced = _replaced(final)
    if final.exists() and (final.is_dir() or partial.is_dir()):
        remove(replaced)
        os.rename(final, replaced)
    os.replace(partial, final)
    sync(final.parent)
    remove(replaced)


def recover(final: Path) -> None:
    """Restore what a killed `publish` has moved away and not replaced."""
    if not final.exists() and _replaced(final).exists():
        os.rename(_replaced(final), final)


def _replaced(final: Path) -> Path:
    return final.with_name(final.name + ".replaced")
