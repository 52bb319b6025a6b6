"""Shared by all tests: the environment of the ranks, and where the golden data lies."""

from __future__ import annotations

import multiprocessing.process
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "tools")]

from helpers.harness import ENVIRONMENT  # noqa: E402  (the line above makes it importable)

os.environ.update(ENVIRONMENT)
# The fork server and launched programs import the tests' helpers by name.
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="skip every test at the moment it starts a process (see `make quick`)")


@pytest.fixture(scope="session", autouse=True)
def one_process(request: pytest.FixtureRequest) -> Iterator[None]:
    """Under --quick a test that starts a process, itself or through a fixture, is skipped there and then: no list of tests to keep."""

    def skip(*_: Any, **__: Any) -> None:
        pytest.skip("starts a process")

    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("quick"):
            patch.setattr(subprocess.Popen, "__init__", skip)
            patch.setattr(multiprocessing.process.BaseProcess, "__init__", skip)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Golden data of the original code: `$PANGU_SHARED`, or `shared` beside the repository. Tests that need it are skipped without it."""
    path = Path(os.environ.get("PANGU_SHARED", TESTS.parent.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"golden data not found at {path}; set PANGU_SHARED")
    return path
