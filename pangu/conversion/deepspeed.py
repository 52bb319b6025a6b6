"""Reads the weights of this project's training checkpoints (pangu.engine.checkpoint_reader reads DeepSpeed's files)."""

from __future__ import annotations

from pathlib import Path

from pangu.conversion.weights import Advance, Checksums, Overrides, Weights, complete
from pangu.engine.checkpoint_reader import open_checkpoint, read_tensors
from pangu.engine.manifest import MANIFEST, complete_steps, file_problem, manifest_problems
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
    exported = checkpoint.folder.parent.parent / "weights" / "vocab.model"  # where a finished run has put it
    return complete(
        checkpoint.folder,
        tensors,
        overrides,
        source=f"training checkpoint of this project, saved from tensor {layout['tensor']} x pipeline {layout['pipeline']} x "
        f"data {layout['data']}, ZeRO-{layout['zero']}, {checkpoint.precision}",
        described=checkpoint.model,
        step=checkpoint.progress.step or None,
        left_out=tuple(sorted(checkpoint.sizes.keys() - checkpoint.opened)),
        tokenizer=exported if exported.is_file() else None,
        files=tuple(checkpoint.folder / name for name in sorted(checkpoint.sizes)),
        layout={"tensor": layout["tensor"], "pipeline": layout["pipeline"], "data": layout["data"], "zero_stage": layout["zero"]},
        open_optimizer=lambda: read_optimizer(checkpoint.folder).tensors,
    )


def _hashed_files(folder: Path, weights: Weights | None) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.name != MANIFEST]


def _verify(folder: Path, files: list[Path], advance: Advance) -> tuple[list[str], list[str]]:
    manifest, problems = manifest_problems(folder)
    for name, described in sorted(manifest.files.items()) if manifest else []:
        if problem := file_problem(folder / name, described):
            problems.append(problem)
        if (folder / name).is_file():
            advance((folder / name).stat().st_size)
    return problems, []


CHECKSUMS = Checksums(_hashed_files, _verify, without_weights=True)
"""The manifest's hashes, which cover optimizer states and random states too."""
