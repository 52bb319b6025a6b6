"""Writes the files of a checkpoint, at once or in the background while training continues."""

from __future__ import annotations

import copy
import os
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from pangu.engine.manifest import sha256


class FileWriter:
    """Replaces DeepSpeed's checkpoint engine during a save; calls other than writing are forwarded to that engine.

    DeepSpeed saves collectively: a rank that raised in the middle, for instance because its disk is full, would leave the others waiting.
    Here a failure is kept and raised by `finish`, once every rank has left the save.

    Args:
        inner: DeepSpeed's own engine.
        background: write in a thread, from a copy that is made at once. The files are the same, byte for byte.
    """

    def __init__(self, inner: Any, *, background: bool) -> None:
        self._inner = inner
        self._described: dict[str, dict[str, Any]] = {}
        self._failure: Exception | None = None
        self._queue: SimpleQueue[tuple[Any, Path] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="checkpoint writer", daemon=True) if background else None
        if self._thread is not None:
            self._thread.start()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def save(self, state_dict: Any, path: str | Path) -> None:
        """Write a file, or queue it for the thread. Errors of the disk are not raised here but by `finish`."""
        state = on_host(state_dict, {}, always_copy=self._thread is not None)
        if self._thread is None:
            self._write(state, Path(path))
        else:
            self._queue.put((state, Path(path)))

    def close(self) -> None:
        """Declare that no further file will be saved."""
        self._queue.put(None)

    def is_done(self) -> bool:
        """Whether all files are on the disk or have failed. Call it only after `close`."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> dict[str, dict[str, Any]]:
        """Wait until all files are on the disk; return the bytes and SHA-256 of each by file name.

        Raises:
            OSError: the first error that occurred while writing.
        """
        if self._thread is not None:
            self._thread.join()
        if self._failure is not None:
            raise OSError(str(self._failure).splitlines()[0] or type(self._failure).__name__)
        return self._described

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            self._write(*job)
            del job  # or the copy would be kept until the next one comes

    def _write(self, state: Any, path: Path) -> None:
        if self._failure is not None:
            return
        try:
            with open(path, "wb") as file:
                torch.save(state, file, _use_new_zipfile_serialization=self._inner.zipfile_serialization)
                file.flush()
                os.fsync(file.fileno())
            self._described[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        except Exception as error:  # torch makes a RuntimeError of a full disk
            self._failure = error


def on_host(value: Any, copies: dict[int, Any], *, always_copy: bool) -> Any:
    """A copy of a state with its tensors in host memory. Shared objects and shared memory stay shared, so that the files are the same.

    Args:
        value: nested dictionaries, lists and tuples of tensors and plain values.
        copies: objects that have been copied, by identity; pass an empty dictionary.
        always_copy: also copy tensors that are in host memory already, because they may change afterwards.
    """
    if id(value) not in copies:
        copies[id(value)] = _copied(value, copies, always_copy)
    return copies[id(value)]


def _copied(value: Any, copies: dict[int, Any], always_copy: bool) -> Any:
    if isinstance(value, Tensor):
        if not always_copy and value.device.type == "cpu":
            return value
        storage = value.untyped_storage()
        key = storage._cdata  # the same for every tensor in one memory; an address, as `id` is, of another kind of object
        if key not in copies:
            copies[key] = storage.clone() if storage.device.type == "cpu" else storage.cpu()
        copied = torch.empty(0, dtype=value.dtype).set_(copies[key], value.storage_offset(), value.shape, value.stride())
        copied = (
            nn.Parameter(copied, value.requires_grad) if isinstance(value, nn.Parameter) else copied.requires_grad_(value.requires_grad)
        )
        # What DeepSpeed has pinned to a tensor is written with it.
        vars(copied).update({name: on_host(item, copies, always_copy=always_copy) for name, item in vars(value).items()})
        return copied
    if isinstance(value, dict):
        mapping = copy.copy(value)  # an OrderedDict of a module carries an attribute
        for key, item in value.items():
            mapping[key] = on_host(item, copies, always_copy=always_copy)
        return mapping
    if type(value) in (list, tuple):
        return type(value)(on_host(item, copies, always_copy=always_copy) for item in value)
    plain = isinstance(value, (str, bytes, int, float, bool, type(None), torch.dtype, torch.Size))
    return value if plain or not always_copy else copy.deepcopy(value)
