"""What counts as a complete checkpoint, and what is found to be wrong with a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from pangu.engine.manifest import MANIFEST, FileEntry, complete_steps, file_problem, sha256, step_name, step_number


@pytest.mark.parametrize("step", [0, 7, 99_999_999, 100_000_000])
def test_a_step_is_read_back_from_its_name(step: int) -> None:
    assert step_number(step_name(step)) == step


@pytest.mark.parametrize("name", ["step_7", "step_00000007.partial", "step_0000000x", "latest", "xstep_00000007"])
def test_other_names_are_no_steps(name: str) -> None:
    assert step_number(name) is None


def test_complete_checkpoints_by_number(tmp_path: Path) -> None:
    """By their number and not by their letters, and only with a manifest under a whole name."""
    assert complete_steps(tmp_path / "nowhere") == []
    for name in ("step_100000000", "step_00000020", "step_00000003", "step_00000004.partial", "step_00000005.damaged", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_text("{}")
    (tmp_path / "step_00000021").mkdir()
    assert complete_steps(tmp_path) == ["step_00000003", "step_00000020", "step_100000000"]


def test_a_file_is_what_its_manifest_says_or_it_is_named(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000  # more than one block
    file = tmp_path / "states.pt"
    file.write_bytes(data)
    described = FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    assert sha256(file) == described.sha256
    assert file_problem(file, described) is None
    file.write_bytes(data[:-1] + b"\0")
    assert "states.pt has changed" in str(file_problem(file, described))
    file.write_bytes(data[:-1])
    assert "1,280,000 bytes" in str(file_problem(file, described))
    file.unlink()
    assert "states.pt is missing" in str(file_problem(file, described))
