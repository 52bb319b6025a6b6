"""Files that appear whole or not at all, and stay after a power loss."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
from pathlib import Path
from typing import IO

from pangu.errors import InputError


def sync(path: Path) -> None:
    """Put a file's contents, or a directory's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Write a small text file in place of another: at every moment there is the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def lock(path: Path) -> IO[str]:
    """Open a file that no other process may lock as long as it is open. The lock ends with the process, however that ends.

    Raises:
        InputError: if another process holds it.
    """
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  (the caller keeps it open)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            file.close()
            raise InputError(f"{path.parent}: in use by {holder}. Wait for its end, or choose another directory.") from None
        print(f"warning: {path.parent}: this file system has no locks; see to it yourself that one run at a time writes there.", flush=True)
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def remove(path: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def publish(partial: Path, final: Path) -> None:
    """Give a finished file or directory its name, in place of what had it; only what is on the disk is named.

    A kill in between leaves the replaced one as `NAME.replaced`.
    """
    for entry in sorted(partial.rglob("*")) if partial.is_dir() else []:
        sync(entry)
    sync(partial)
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():
        remove(replaced)
        os.rename(final, replaced)
    os.rename(partial, final)
    sync(final.parent)
    remove(replaced)
