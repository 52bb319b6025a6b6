"""Opens files from elsewhere, and writes files that appear complete or not at all and survive a power loss."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TextIO

from pangu.errors import InputError

MAX_JSON_BYTES = 4 * 2**20
"""Largest JSON file in bytes that is parsed: more than ten times the largest index of weights. Parsed, it may take thirty times
as much."""
MAX_TEXT_BYTES = 2**20
"""Largest configuration or other text that people write by hand, in bytes."""


def open_file(path: Path) -> BinaryIO:
    """Open a file from elsewhere for reading.

    Raises:
        OSError: also if it is not a regular file: reading a pipe would block, and a device never ends.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(errno.EISDIR, "Is a directory") if stat.S_ISDIR(mode) else OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a whole file from elsewhere.

    Raises:
        OSError: see `open_file`.
        ValueError: if it has more than `limit` bytes.
    """
    with open_file(path) as file:
        size = min(os.fstat(file.fileno()).st_size, limit)
        content = file.read(size + 1)  # which takes as much memory as it is asked for
        if len(content) > size:
            content += file.read(limit + 1 - len(content))
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


def create_file(path: Path) -> BinaryIO:
    """Create a file that does not exist yet, to be written. A link of that name, wherever it points, exists.

    Raises:
        OSError: if there is anything of that name, or it cannot be created.
    """
    return open(path, "xb")


def append_to(path: Path) -> TextIO:
    """Open a text file of ours for appending whole lines, created if it does not exist.

    Raises:
        OSError: also if it is a link or not a regular file: what is written must not end elsewhere.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(descriptor, "a", encoding="utf-8", buffering=1)


def sync(path: Path) -> None:
    """Put a file's contents, or a directory's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a small file in place of another: at every moment there is the old one or the new one.

    Raises:
        OSError: if it cannot be written; then the old one is untouched.
    """
    partial = work_path(path)
    try:
        with create_file(partial) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)
    finally:
        remove(partial)


def work_path(final: Path) -> Path:
    """A name beside a file or directory for what will replace it: nobody else's, and not to be guessed."""
    return final.with_name(f"{final.name}.{secrets.token_hex(4)}.partial")


def remove_leftovers(final: Path) -> None:
    """Remove what killed processes left of a file or directory. Whoever calls this holds its `lock`."""
    for path in _beside(final, "partial"):
        remove(path)


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
    descriptor = None
    while descriptor is None:
        try:
            descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            if not _try_lock(descriptor):
                _refuse_held(path, descriptor)
            if not _is_at(descriptor, beside):  # between the two lines above another has taken it for a stale one
                os.close(descriptor)
                descriptor = None
        except FileExistsError:
            _remove_stale(path, beside)
    try:
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        beside.unlink(missing_ok=True)
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Lock an open file. On a file system that has no locks everybody gets one."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True


def _remove_stale(path: Path, beside: Path) -> None:
    """Remove a lock file that nobody holds; what it holds is not touched, for it may be somebody else's file."""
    try:
        descriptor = os.open(beside, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise InputError(f"{beside}: is a link; this file says who writes {path.name}. Remove it.") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{beside}: is not a regular file; this file says who writes {path.name}. Remove it.")
    if not _try_lock(descriptor):
        _refuse_held(path, descriptor)
    if _is_at(descriptor, beside):  # or else its owner has just removed it, and this is another's
        beside.unlink()
    os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is what stands at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _refuse_held(path: Path, descriptor: int) -> NoReturn:
    holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
    os.close(descriptor)
    raise InputError(f"{path}: {holder} is writing it. Wait until it is done, or choose another place.")


def publish(partial: Path, final: Path) -> None:
    """Rename a finished file or directory to its final name, replacing what had that name, after flushing it to disk.

    A file replaces a file atomically. For directories that is not possible: a kill in between leaves the old one as
    `NAME.XXXXXXXX.replaced`, and `recover` restores it.
    """
    for entry in sorted(partial.rglob("*")) if partial.is_dir() else []:
        sync(entry)
    sync(partial)
    if final.exists() and (final.is_dir() or partial.is_dir()):
        os.rename(final, final.with_name(f"{final.name}.{secrets.token_hex(4)}.replaced"))
    os.replace(partial, final)
    sync(final.parent)
    for path in _beside(final, "replaced"):
        remove(path)


def recover(final: Path) -> None:
    """Bring back what a killed `publish` has moved away and not replaced."""
    old = _beside(final, "replaced")
    if old and not final.exists():
        os.rename(max(old, key=lambda path: path.lstat().st_mtime), final)


def _beside(final: Path, suffix: str) -> list[Path]:
    """What stands beside a file or directory under a name that only this module gives."""
    ours = re.compile(re.escape(final.name) + rf"\.[0-9a-f]{{8}}\.{suffix}")
    return [entry for entry in final.parent.iterdir() if ours.fullmatch(entry.name)] if final.parent.is_dir() else []
