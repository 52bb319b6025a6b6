"""Reads the weights of this project's training checkpoints (pangu.engine.checkpoint_reader reads DeepSpeed's files)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pangu.conversion.weights import Advance, Checksums, Overrides, Weights, complete
from pangu.engine.checkpoint_reader import open_checkpoint, read_tensors
from pangu.engine.manifest import MANIFEST, complete_steps, file_problem
from pangu.engine.optimizer_reader import read_optimizer


def detect(path: Path) -> bool:
    """Whether a path is a training checkpoint, the directory that holds them, or a run's directory."""
    return path.is_dir() and ((path / MANIFEST).is_file() or any(complete_steps(folder) for folder in (path, path / "checkpoints")))


def read(path: Path, overrides: Overrides) -> Weights:
    """The weights of a checkpoint, or of the newest checkpoint in a directory.

    Raises:
        InputError: naming the file that is missing, damaged or is not what the manifest says.
    """
    checkpoint = open_checkpoint(path)
    tensors = read_tensors(checkpoint)
    layout = checkpoint.layout
    step = checkpoint.progress.get("step")
    exported = checkpoint.folder.parent.parent / "weights" / "vocab.model"  # where a finished run has put it
    return complete(
        checkpoint.folder,
        tensors,
        overrides,
        source=f"training checkpoint of this project, saved from tensor {layout['tensor']} x pipeline {layout['pipeline']} x "
        f"data {layout['data']}, ZeRO-{layout['zero']}, {checkpoint.precision}",
        described=checkpoint.model,
        step=step if type(step) is int and step > 0 else None,
        left_out=tuple(sorted(checkpoint.sizes.keys() - checkpoint.opened)),
        tokenizer=exported if exported.is_file() else None,
        files=tuple(checkpoint.folder / name for name in sorted(checkpoint.sizes)),
        layout={"tensor": layout["tensor"], "pipeline": layout["pipeline"], "data": layout["data"], "zero_stage": layout["zero"]},
        open_optimizer=lambda: read_optimizer(checkpoint.folder).tensors,
    )


def _hashed_files(folder: Path, weights: Weights | None) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.name != MANIFEST]


def _verify(folder: Path, files: list[Path], advance: Advance) -> tuple[list[str], list[str]]:
    return list(_manifest_problems(folder, advance)), []


CHECKSUMS = Checksums(_hashed_files, _verify, without_weights=True)
"""The manifest's hashes, which cover optimizer states and random states too."""


def _manifest_problems(folder: Path, advance: Advance) -> Iterator[str]:
    """What the manifest of a training checkpoint says otherwise than the files do."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        entries = sorted(files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        yield f"it has no readable {MANIFEST}, so it is not a complete checkpoint"
        return
    for name, described in entries:
        known = isinstance(described, dict) and type(described.get("bytes")) is int and type(described.get("sha256")) is str
        if Path(name).name != name or not known:  # never follow a path out of the directory
            yield f"{MANIFEST} has no size and hash of a file beside it under {name[:80]!r}"
            continue
        try:
            problem = file_problem(folder / name, described)
        except OSError as error:
            problem = f"{name} cannot be read ({error.strerror or error})"
        if problem:
            yield problem
        if (folder / name).is_file():
            advance((folder / name).stat().st_size)
    for extra in sorted({entry.name for entry in folder.iterdir()} - files.keys() - {MANIFEST}):
        yield f"{extra} is not in {MANIFEST}: it was put there after the checkpoint was complete"
