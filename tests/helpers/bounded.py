"""Runs a reader as if its input were an attack: with a limit on memory that the kernel enforces, and one on time.

tensors = read_all(path, lambda: open_weights(path, HEADS))     # None if it was refused
"""

from __future__ import annotations

import os
import resource
import signal
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pangu.errors import InputError

ADDRESS_SPACE = 96 * 2**20
"""What a process may grow by while it reads, beside twice the size of its input. All counts: Python, torch, numpy, Rust, mappings."""
SECONDS = 10


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


class TooSlow(BaseException):
    """Not TimeoutError, which is an OSError: a reader would make a refusal of it."""


@contextmanager
def bounded(size: int, slack: int = 2**20) -> Iterator[None]:
    """Fails what takes more than `SECONDS`, or more memory than twice `size`.

    Python's own allocations are counted to the byte, `slack` being for objects that do not depend on the input. All others are held by
    `ADDRESS_SPACE`: who wants more gets a MemoryError, or what his library makes of it.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()
    tracemalloc.reset_peak()
    traced = tracemalloc.get_traced_memory()[0]

    def too_slow(*_: Any) -> None:
        raise TooSlow(f"still reading after {SECONDS} s")

    handler = signal.signal(signal.SIGALRM, too_slow)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGESIZE") + 2 * size + ADDRESS_SPACE, before[1]))
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1] - traced
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if started:
            tracemalloc.stop()
    assert peak < 2 * size + slack, f"took {peak:,} bytes for an input of {size:,}"


def read_all(path: Path, read: Callable[[], Any], *, slack: int = 2**20, refusals: type[Exception] = InputError) -> Any:
    """What `read` returns, once each of its tensors has been read, or None if it was refused in one line; anything else is a failure.

    Args:
        path: the input, for its size.
        read: gives an object with `tensors` by name, or an iterable of things to `read()`.
        slack: see `bounded`.
        refusals: how it may refuse.
    """
    with bounded(size_of(path), slack):
        try:
            found = read()
            stored: Iterable[Any] = found.tensors.values() if hasattr(found, "tensors") else found
            for tensor in stored:
                tensor.read()
        except refusals as error:
            text = str(error)
            assert text and text.isprintable() and len(text) <= 4000, f"no line: {text[:200]!r}"
            return None
    return found


def refusal(path: Path, read: Callable[[], Any]) -> str:
    """The line with which an input is refused."""
    with bounded(size_of(path), 8 * 2**20), pytest.raises(InputError) as caught:
        found = read()
        for tensor in found.tensors.values() if hasattr(found, "tensors") else found:
            tensor.read()
    text = str(caught.value)
    assert text and text.isprintable() and len(text) <= 4000, f"no line: {text[:200]!r}"
    return text
