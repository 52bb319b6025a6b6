"""Saves a training engine's state to DeepSpeed's files and loads it on the same layout; pangu.training.checkpoint commits the files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from pangu.engine.checkpoint_writer import FileWriter
from pangu.engine.engine import TrainingEngine
from pangu.engine.pipeline import quiet
from pangu.errors import InputError
from pangu.files import open_file


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
        InputError: if there is nothing that DeepSpeed can load, or a file holds anything but tensors and plain values.
    """
    # DeepSpeed brings back the hyper-parameters too, and would overrule what the configuration says now.
    configured = [{key: value for key, value in group.items() if key not in ("params", "step")} for group in engine.param_groups]
    deepspeed = engine.engine
    own, deepspeed.checkpoint_engine = deepspeed.checkpoint_engine, FileReader(deepspeed.checkpoint_engine)
    try:
        with quiet():
            loaded, _ = deepspeed.load_checkpoint(str(folder.parent), tag=folder.name)
    finally:
        deepspeed.checkpoint_engine = own
    if loaded is None:
        raise InputError(f"{folder}: DeepSpeed found nothing to load in it.")
    for group, values in zip(engine.param_groups, configured, strict=True):
        group.update(values)
    engine.rng.load_state_dict(load_tensors(folder / _random_state(engine)))


class FileReader:
    """Replaces DeepSpeed's checkpoint engine during a load: its own unpickles files, which executes whatever they contain.

    Args:
        inner: DeepSpeed's own engine, for what is not reading.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def load(self, path: str, map_location: Any = None) -> Any:
        """What a file holds; see `load_tensors`."""
        return load_tensors(Path(path), map_location)


def load_tensors(path: Path, map_location: Any = None) -> Any:
    """What a file of a checkpoint holds, read without executing anything.

    Args:
        path: written by `torch.save`.
        map_location: device of the tensors, as `torch.load` takes it.

    Raises:
        InputError: if the file cannot be read, or holds anything but tensors, plain values and the few types that DeepSpeed saves.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    try:
        open_file(path).close()
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, map_location=map_location, weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}). Restore it, or resume from another checkpoint.") from None
    except Exception as error:  # a damaged file reaches torch's reader, which raises whatever it meets
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"names {found[1]}, which is neither a tensor nor a plain value" if found else f"is damaged ({type(error).__name__})"
        raise InputError(f"{path}: {what}. Nothing in it was executed. Do not trust it: resume from another checkpoint.") from None


def _random_state(engine: TrainingEngine) -> str:
    return f"rng_rank_{engine.groups.world.rank:05d}.pt"
