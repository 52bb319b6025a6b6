"""Weights of this project's training checkpoints (pangu.engine.checkpoint_reader reads DeepSpeed's files)."""

from __future__ import annotations

from pathlib import Path

from pangu.conversion.weights import Overrides, Weights, complete
from pangu.engine.checkpoint_reader import open_checkpoint, read_tensors
from pangu.engine.manifest import MANIFEST, complete_steps
from pangu.engine.optimizer_reader import read_optimizer


def detect(path: Path) -> bool:
    """Whether a path is a training checkpoint, the directory that holds them, or a run's directory."""
    return path.is_dir() and ((path / MANIFEST).is_file() or any(complete_steps(folder) for folder in (path, path / "checkpoints")))


def read(path: Path, overrides: Overrides) -> Weights:
    """Weights of a checkpoint; of several the newest.

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
