"""Files that appear whole or not at all, and stay after a power loss."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


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
