"""Shared by all tests: the environment of the ranks, and where the golden data lies."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "tools")]

from helpers.harness import ENVIRONMENT  # noqa: E402  (the line above makes it importable)

os.environ.update(ENVIRONMENT)
# The fork server and launched programs import the tests' helpers by name.
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(scope="session")
def shared() -> Path:
    """Golden data of the original code: `$PANGU_SHARED`, or `shared` beside the repository. Tests that need it are skipped without it."""
    path = Path(os.environ.get("PANGU_SHARED", TESTS.parent.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"golden data not found at {path}; set PANGU_SHARED")
    return path
