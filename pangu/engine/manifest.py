"""Names of a training checkpoint's directories, and the form of its manifest.

    step_00000100/                  complete, once it has this name and a manifest
    step_00000100/manifest.json     format, progress (how far the run was), identity (the model and the layout that saved it, by
                                    configuration key), files (bytes and sha256 of every other file)
    step_00000100.SUFFIX/           partial: being written; replaced: the same step was trained again; removing: no longer wanted;
                                    damaged: no longer what its manifest says
    latest                          the newest step's name, for DeepSpeed's own tools; never read here

All of them lie in a run's `checkpoints/`; `checkpoints.lock` beside it is held by the run that writes there.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

MANIFEST, LATEST = "manifest.json", "latest"
STEP = re.compile(r"step_(\d{8,})")


def step_name(step: int) -> str:
    """Name of the checkpoint directory of a step."""
    return f"step_{step:08d}"


def step_number(name: str) -> int | None:
    """The step of a complete checkpoint's directory name, or None."""
    match = STEP.fullmatch(name)
    return int(match[1]) if match else None


def complete_steps(root: Path) -> list[str]:
    """Names of the complete checkpoints in a directory, oldest first."""
    if not root.is_dir():
        return []
    found = [entry.name for entry in root.iterdir() if STEP.fullmatch(entry.name) and (entry / MANIFEST).is_file()]
    return sorted(found, key=lambda name: int(name.removeprefix("step_")))


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def file_problem(file: Path, described: dict[str, Any]) -> str | None:
    """What is wrong with one file of a checkpoint, or None; `described` is the file's entry in the manifest."""
    if not file.is_file() or file.stat().st_size != described["bytes"]:
        return f"{file.name} is missing or does not have its {described['bytes']:,} bytes"
    if sha256(file) != described["sha256"]:
        return f"{file.name} has changed since it was written: its sha256 differs"
    return None
