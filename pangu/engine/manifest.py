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
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pangu.files import parse_json, read_text, write_durably

MANIFEST, LATEST = "manifest.json", "latest"
STEP = re.compile(r"step_(\d{8,})")
FORMAT = 2
"""Written now. A manifest of format 1 is the same without `sha256`."""

_MAX_BYTES = 2**24
"""Largest manifest: of a hundred thousand files."""

_Count = Annotated[int, Field(ge=0, lt=2**62)]
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}$")]
"""A name in the directory itself: no path leads out of it."""


@dataclass
class Progress:
    """The progress of a run. The whole state of the sampler is `consumed_samples`."""

    __pydantic_config__ = _STRICT

    step: _Count = 0
    """Number of optimizer steps taken, skipped ones included."""
    consumed_samples: _Count = 0
    consumed_tokens: _Count = 0
    recent_losses: Annotated[list[float], Field(max_length=10_000)] = field(default_factory=list)
    """Losses of the last good steps, oldest first (pangu.training.anomalies)."""
    bad_steps: _Count = 0
    """Number of bad steps since the last good one."""


class FileEntry(BaseModel):
    """What a file was when it was written."""

    model_config = _STRICT

    bytes: _Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """What a checkpoint consists of."""

    model_config = _STRICT

    format: Literal[1, 2] = 1
    progress: Progress
    identity: Annotated[dict[str, int | str | list[int]], Field(max_length=100)]
    """The model and the layout that saved it, by configuration key."""
    files: dict[_Name, FileEntry]
    """Every file of the directory but the manifest."""


def write_manifest(folder: Path, progress: Progress, identity: dict[str, Any], files: dict[str, Any]) -> None:
    """Write the manifest of a directory whose files are complete, with a hash of itself.

    Args:
        folder: the directory.
        progress: of the run.
        identity: see `Manifest`.
        files: bytes and SHA-256 of every file, by name.

    Raises:
        OSError: if it cannot be written.
    """
    values = {"format": FORMAT, "progress": asdict(progress), "identity": identity, "files": files}
    write_durably(folder / MANIFEST, _text(values | {"sha256": _hash(values)}))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not a manifest, or not as it was written.
    """
    text = read_text(folder / MANIFEST, _MAX_BYTES)
    values = parse_json(text)
    if not isinstance(values, dict):
        raise ValueError("not an object")
    if values.get("format", 1) != 1:
        stored = values.pop("sha256", None)
        if stored != _hash(values) or text != _text(values | {"sha256": stored}):
            raise ValueError("its own hash differs")
    return Manifest.model_validate_json(json.dumps(values))  # in JSON's mode an object may become a dataclass


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(_text(values).encode()).hexdigest()


def step_name(step: int) -> str:
    """Name of the checkpoint directory of a step."""
    return f"step_{step:08d}"


def step_number(name: str) -> int | None:
    """The step of a complete checkpoint's directory name, or None."""
    match = STEP.fullmatch(name)
    return int(match[1]) if match else None


def complete_steps(root: Path) -> list[str]:
    """Names of the complete checkpoints in a directory, oldest first."""
    return [name for name in step_directories(root) if (root / name / MANIFEST).is_file()]


def step_directories(root: Path) -> list[str]:
    """Names of the directories that are or were complete checkpoints, oldest first; one that lost its manifest is among them."""
    if not root.is_dir():
        return []
    found = [entry.name for entry in root.iterdir() if STEP.fullmatch(entry.name) and entry.is_dir()]
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


def file_problem(file: Path, described: FileEntry) -> str | None:
    """What is wrong with one file of a checkpoint, or None; `described` is what the manifest says of it."""
    try:
        if not file.is_file() or file.stat().st_size != described.bytes:
            return f"{file.name} is missing or has not its {described.bytes:,} bytes"
        if sha256(file) != described.sha256:
            return f"{file.name} has changed since it was written: its sha256 differs"
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror or error})"
    return None


def manifest_problems(folder: Path) -> tuple[Manifest | None, list[str]]:
    """The manifest of a checkpoint, None if there is no readable one, and what is wrong with it and with the list of files.

    Hidden files, which file managers and network file systems leave, do not count. What the files hold is up to `file_problem`.
    """
    try:
        manifest = read_manifest(folder)
        entries = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return None, [f"it has no readable {MANIFEST}, so it is not a complete checkpoint"]
    except ValueError as error:
        reason = str(error).splitlines()[0]
        return None, [f"its {MANIFEST} is not as it was written ({reason})"]
    extra = set(entries) - manifest.files.keys() - {MANIFEST}
    problems = [f"{name} is not in {MANIFEST}: it was put there after the checkpoint was complete" for name in extra]
    step = step_number(folder.name)
    if step is not None and step != manifest.progress.step:
        problems.append(f"its {MANIFEST} is that of step {manifest.progress.step}")
    return manifest, sorted(problems)
