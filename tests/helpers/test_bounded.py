"""The measure that readers are held to: what takes too much memory or time is caught."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.bounded import TooSlow, read_all


class Claim:
    """Stands for a reader that believes what a file of a kilobyte says."""

    def __init__(self, allocate: Callable[[], Any]) -> None:
        self.read = allocate


@pytest.mark.parametrize(
    ("allocate", "caught"),
    [
        (lambda: torch.empty(2**32, dtype=torch.uint8), RuntimeError),
        (lambda: np.empty(2**30), MemoryError),
        (lambda: bytes(2**28), MemoryError),
        (lambda: bytes(2**22), AssertionError),  # more than twice the file, though there is room for it
        (lambda: torch.empty(200 * 2**20, dtype=torch.uint8), RuntimeError),
        (lambda: 1 // 0, ZeroDivisionError),
    ],
)
def test_a_reader_that_believes_what_it_reads_is_caught(allocate: Callable[[], Any], caught: type[Exception], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1024))
    with pytest.raises(caught):
        read_all(tmp_path / "file", lambda: [Claim(allocate)])


def test_a_reader_that_hangs_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpers.bounded.SECONDS", 0.1)

    def forever() -> None:
        while True:
            pass

    with pytest.raises(TooSlow):
        read_all(tmp_path, lambda: [Claim(forever)])
