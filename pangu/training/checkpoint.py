"""Training checkpoints: DeepSpeed's own files inside an envelope that makes them safe.

DeepSpeed writes `latest` before the other ranks have written their files, each file in place: a kill leaves a checkpoint that is named but
cannot be loaded. Here everything is written to `step_N.partial`; when every rank has voted that its files are complete and on disk, rank 0
writes their hashes to `manifest.json`, renames the directory, and moves `latest` last. A directory without the suffix is complete.

The files are DeepSpeed's pickles, read without executing what they contain (pangu.engine.checkpoint_files).
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ext.collectives import all_gather_objects, all_reduce_max, barrier, broadcast_object, together
from megatron_ext.topology import Group
from pangu.config import Config
from pangu.config.stages import balanced_layers
from pangu.engine.checkpoint_files import load_files, save_files
from pangu.engine.checkpoint_writer import FileWriter
from pangu.engine.engine import TrainingEngine
from pangu.engine.manifest import (
    LATEST,
    MANIFEST,
    Progress,
    complete_steps,
    file_problem,
    manifest_problems,
    read_manifest,
    step_directories,
    step_name,
    step_number,
    write_manifest,
)
from pangu.engine.reshard import load_resharded
from pangu.errors import InputError
from pangu.files import lock, remove, sync, write_durably


def save_checkpoint(engine: TrainingEngine, progress: Progress) -> Path:
    """Save everything that a resumed run needs; return the committed directory. Every rank must call this.

    Raises:
        InputError: on every rank, if any rank could not write; earlier checkpoints are unchanged.
    """
    return start_save(engine, progress).commit()


def start_save(engine: TrainingEngine, progress: Progress, *, background: bool = False) -> PendingSave:
    """Begin to save a checkpoint. Every rank must call this, and `commit` the returned save before it begins another.

    Args:
        engine: the run's engine; training may continue as soon as this returns.
        progress: the run's progress.
        background: return as soon as the states are copied in host memory, which must have room for a second copy.
    """
    root, world = engine.config.checkpoint_dir, engine.groups.world
    partial = root / f"{step_name(progress.step)}.partial"

    def prepare() -> None:
        if world.rank == 0:
            remove(partial)
            partial.mkdir(parents=True)

    _together(prepare, world, f"{root}: cannot be prepared for a checkpoint")
    writer = save_files(engine, partial, {"progress": asdict(progress)}, background=background)
    return PendingSave(engine, partial, copy.deepcopy(progress), writer)


@dataclass(frozen=True)
class PendingSave:
    """A checkpoint whose files are being written. It is not valid before `commit`."""

    engine: TrainingEngine
    partial: Path
    progress: Progress
    writer: FileWriter

    def is_written(self) -> bool:
        """Whether every rank has its files on the disk. Every rank must call this and gets the same answer."""
        waiting = torch.tensor(int(not self.writer.is_done()))
        return not int(all_reduce_max(waiting, self.engine.groups.world))

    def commit(self) -> Path:
        """Wait for all files and publish the checkpoint; return its directory. Every rank must call this.

        Raises:
            InputError: on every rank, if any rank could not write; earlier checkpoints are unchanged.
        """
        engine, world = self.engine, self.engine.groups.world
        final = self.partial.with_suffix("")
        shares = _together(self.writer.finish, world, f"{self.partial}: could not be written; the last good checkpoint is untouched")

        def publish() -> None:
            if world.rank == 0:
                identity = _layout_identity(engine) | _model_identity(engine.config)
                files = {name: described for share in shares for name, described in share.items()}
                write_manifest(self.partial, self.progress, identity, files)
                if final.exists():  # this step was trained again
                    _set_aside(final, "replaced")
                os.rename(self.partial, final)
                sync(final.parent)
                write_durably(final.parent / LATEST, final.name + "\n")
                _retire(final.parent, engine.config.checkpoint.keep)

        _together(publish, world, f"{final}: could not be committed; the last good checkpoint is untouched")
        return final


class CheckpointSaver:
    """Saves a run's checkpoints, each at once or, with `checkpoint.async_save`, in the background. Every rank makes the same calls."""

    def __init__(self, engine: TrainingEngine) -> None:
        self._engine = engine
        self._pending: PendingSave | None = None

    def save(self, progress: Progress) -> None:
        """Save a checkpoint, after committing one that is still being written."""
        self.finish()
        background = self._engine.config.checkpoint.async_save
        self._pending = start_save(self._engine, progress, background=background)
        if not background:
            self.finish()

    def poll(self) -> None:
        """Commit the pending save if every rank has written it."""
        if self._pending and self._pending.is_written():
            self.finish()

    def finish(self) -> None:
        """Wait for the pending save, if there is one, and commit it."""
        if self._pending:
            pending, self._pending = self._pending, None
            pending.commit()


def _retire(root: Path, keep: int) -> None:
    """Remove all but the newest checkpoints. A directory is renamed first, so that no checkpoint is ever partly present."""
    for name in complete_steps(root)[:-keep]:
        with contextlib.suppress(OSError):  # one that cannot be renamed stays whole
            _set_aside(root / name, "removing")
    for leftover in (*root.glob("step_*.removing"), *root.glob("step_*.replaced")):
        remove(leftover)


def _set_aside(path: Path, suffix: str) -> Path:
    """Rename a checkpoint so that it no longer counts as one."""
    aside = path.with_name(f"{path.name}.{suffix}")
    remove(aside)
    os.rename(path, aside)
    return aside


@contextlib.contextmanager
def claim_directory(config: Config, world: Group) -> Iterator[None]:
    """A context in which no other run uses the checkpoint directory; remains of an interrupted save are removed. Every rank must enter it.

    Raises:
        InputError: on every rank, if another run uses the directory, or it cannot be used.
    """
    root = config.checkpoint_dir
    with contextlib.ExitStack() as held:
        refused: str | None = None
        if world.rank == 0:
            try:
                root.mkdir(parents=True, exist_ok=True)
                held.enter_context(lock(root))
                for replaced in root.glob("step_*.replaced"):
                    if not replaced.with_suffix("").exists():  # a kill came before the new one had its name
                        os.rename(replaced, replaced.with_suffix(""))
                for leftover in (*root.glob("step_*.partial"), *root.glob("step_*.removing"), *root.glob("step_*.replaced")):
                    remove(leftover)
            except InputError as error:
                refused = str(error)
            except OSError as error:
                refused = f"{root}: cannot be used for checkpoints ({error.strerror or error}). Set checkpoint.dir to another directory."
        if message := broadcast_object(refused, world):
            raise InputError(message)
        yield


def find_checkpoint(config: Config, world: Group) -> Path | None:
    """The checkpoint to resume from, or None to start from scratch. Every rank must call this and gets the same answer.

    `checkpoint.resume=auto` takes the newest intact one. Damaged ones are reported and renamed to `step_N.damaged`.

    Raises:
        InputError: if a checkpoint was asked for by path and is damaged, if there are checkpoints and none is intact, or if the directory
            holds checkpoints of later steps than the run would start at: its own would mix with them.
    """
    resume, root = config.checkpoint.resume, config.checkpoint_dir
    steps = broadcast_object(step_directories(root) if world.rank == 0 else None, world)
    if resume != "auto":
        path = None if resume == "never" else Path(resume)
        if path is not None and (problem := verify(path, world)):
            raise InputError(f"checkpoint.resume = {path}: {problem}.")
        first = (step_number(path.name) or 0) if path is not None else 0
        if steps and (step_number(steps[-1]) or 0) > first:
            raise InputError(
                f"{root}: holds {steps[-1]}, but with checkpoint.resume={resume} the run starts at step {first} and its checkpoints would "
                "mix with those. Set checkpoint.dir or run.dir to another directory, or remove the old checkpoints."
            )
        return path
    for name in reversed(steps):
        problem = verify(root / name, world)
        if problem is None:
            return root / name
        if world.rank == 0:
            print(f"warning: {root / name} is damaged ({problem}); trying the one before it.", flush=True)
            _set_aside(root / name, "damaged")
        barrier(world)
    if steps:
        raise InputError(
            f"{root}: none of its {len(steps)} checkpoints is intact. Restore one, or set run.dir to another directory to start anew."
        )
    return None


def finished_step(config: Config) -> int | None:
    """The step of the newest checkpoint, if it is the run's last one and the weights were written after it; None where work remains.

    Needs no other rank. A run of another model is not finished: loading will refuse it.
    """
    root, weights = config.checkpoint_dir, config.run.dir / "weights" / "config.json"
    steps = complete_steps(root)
    newest = (step_number(steps[-1]) or 0) if steps else 0
    if config.checkpoint.resume != "auto" or newest < config.train.steps:
        return None
    manifest = root / steps[-1] / MANIFEST
    try:
        identity = read_manifest(root / steps[-1]).identity
        is_older = weights.stat().st_mtime < manifest.stat().st_mtime
    except (OSError, ValueError):
        return None
    return None if is_older or _differences(identity, _model_identity(config)) else newest


def load_checkpoint(engine: TrainingEngine, path: Path) -> Progress:
    """Continue from a checkpoint: weights, optimizer, loss scale, random streams and progress. Every rank must call this.

    On the layout that saved it the run continues bit for bit. On another one weights, optimizer, loss scale and the order of the samples
    are the same, but dropout masks differ: they are drawn from the seed, the step and the rank's coordinates.

    Raises:
        InputError: if it was made by another model, optimizer or precision.
    """
    try:
        manifest = read_manifest(path)
    except (OSError, ValueError):
        raise InputError(f"{path}: its {MANIFEST} cannot be read any more. Restore it, or resume from another checkpoint.") from None
    found: dict[str, Any] = dict(manifest.identity)
    progress = manifest.progress
    different = _differences(found, _model_identity(engine.config))
    if different:
        raise InputError(
            f"{path}: cannot be resumed by this run: {', '.join(different)}. Set what it was, or start a new run in another run.dir, "
            "from the weights of a finished one with checkpoint.init_from=RUN_DIR/weights if you like."
        )
    # What checkpoints that are older than these two keys were saved from.
    found = {
        "parallel.stage_layers": list(balanced_layers(engine.config.model, found["parallel.pipeline"])),
        "parallel.order": "tp-dp-pp",
    } | found
    moved = _differences(found, _layout_identity(engine))
    if moved:
        if engine.groups.world.rank == 0:
            shown = [line for line in moved if not line.startswith("optimizer ")] or moved  # the rest follows from these
            print(f"{path.name} was saved on another layout ({', '.join(shown)}); its tensors are read as this one needs them.", flush=True)
        load_resharded(engine, path)
        engine.reseed(progress.step)
    else:
        load_files(engine, path)
    engine.count_from(progress.step, progress.consumed_samples)
    return progress


def verify(path: Path, world: Group) -> str | None:
    """What is wrong with a checkpoint, or None. The ranks divide the hashing among themselves and all get the same answer."""
    # One rank reads the manifest and lists the directory: thousands that do so at once are what a shared file system is slowest at.
    manifest, problems = broadcast_object(manifest_problems(path) if world.rank == 0 else (None, []), world)
    if manifest is None or problems:
        return problems[0]
    mine = sorted(manifest.files)[world.rank :: world.size]
    found = next(filter(None, (file_problem(path / name, manifest.files[name]) for name in mine)), None)
    return next(filter(None, all_gather_objects(found, world)), None)


def _differences(found: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    return [f"{key} was {found.get(key)} and is {value}" for key, value in ours.items() if found.get(key) != value]


def _layout_identity(engine: TrainingEngine) -> dict[str, Any]:
    """The settings that determine which rank's file holds what, and in which form."""
    topology = engine.groups.topology
    return {
        "parallel.tensor": topology.tensor,
        "parallel.pipeline": topology.pipeline,
        "data-parallel size": topology.data,
        "parallel.stage_layers": list(engine.layout.stage_layers),
        "parallel.order": topology.order,
        "parallel.zero_stage": engine.config.parallel.zero_stage,
        "optimizer implementation": engine.optimizer_name,
        "optimizer states": engine.buffer_form,
    }


def _model_identity(config: Config) -> dict[str, Any]:
    """The settings that a checkpoint and any run that resumes from it must have in common."""
    model = config.model
    return {
        "train.precision": config.train.precision,
        "optimizer.name": config.optimizer.name,
        **{f"model.{key}": value for key, value in model.identity().items()},
        "model.separator_id": model.separator_id,
        "model.pad_id": model.pad_id,
    }


def _together(action: Callable[[], Any], world: Group, what: str) -> list[Any]:
    """Run an action on every rank; if it failed to read or write on any, refuse on all."""
    try:
        return together(action, world)
    except OSError as error:
        raise InputError(f"{what} ({error}). Free some space or fix the directory.") from None
