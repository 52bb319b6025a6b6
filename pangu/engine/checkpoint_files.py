"""Saves a training engine's state to DeepSpeed's files and loads it on the same layout; pangu.training.checkpoint commits the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pangu.engine.checkpoint_writer import FileWriter
from pangu.engine.engine import TrainingEngine
from pangu.engine.pipeline import quiet
from pangu.errors import InputError


def save_files(engine: TrainingEngine, folder: Path, client_state: dict[str, Any], *, background: bool) -> FileWriter:
    """Write, or begin to write, every file of this rank into `folder`. Every rank must call this.

    Args:
        engine: the run's engine; training may continue as soon as this returns.
        folder: an existing, empty directory.
        client_state: small values of the caller, kept in DeepSpeed's files.
        background: return as soon as the states are copied in host memory, which must have room for a second copy.

    Returns:
        The writer; its `finish` waits until the files are on the disk.
    """
    deepspeed = engine.engine
    writer = FileWriter(deepspeed.checkpoint_engine, background=background)
    own, deepspeed.checkpoint_engine = deepspeed.checkpoint_engine, writer
    # The first rank alone would copy scripts beside the checkpoints, and fail alone; tools/convert_checkpoint.py does what they do.
    deepspeed._copy_recovery_script = lambda folder: None
    try:
        deepspeed.save_checkpoint(str(folder.parent), tag=folder.name, client_state=client_state, save_latest=False)
    finally:
        deepspeed.checkpoint_engine = own
    writer.save(engine.rng.state_dict(), folder / _random_state(engine))
    writer.close()
    return writer


def load_files(engine: TrainingEngine, folder: Path) -> None:
    """Load files that were saved on this layout into the engine. Every rank must call this.

    Raises:
        InputError: if there is nothing that DeepSpeed can load.
    """
    # DeepSpeed brings back the hyper-parameters too, and would overrule what the configuration says now.
    configured = [{key: value for key, value in group.items() if key not in ("params", "step")} for group in engine.param_groups]
    with quiet():
        loaded, _ = engine.engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise InputError(f"{folder}: DeepSpeed found nothing to load in it.")
    for group, values in zip(engine.param_groups, configured, strict=True):
        group.update(values)
    engine.rng.load_state_dict(torch.load(folder / _random_state(engine), weights_only=True))


def _random_state(engine: TrainingEngine) -> str:
    return f"rng_rank_{engine.groups.world.rank:05d}.pt"
