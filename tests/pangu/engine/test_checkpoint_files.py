"""What comes back from an engine's files, and what does not; bit for bit in every layout: tests/distributed/test_checkpoint.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers.harness import run_distributed
from helpers.layouts import random_batches, small_config, start

from megatron_ext.sharding import canonical_parameters
from pangu.engine.checkpoint_files import load_files, save_files
from pangu.engine.engine import TrainingEngine
from pangu.engine.manifest import FileEntry, file_problem


def state(engine: TrainingEngine) -> dict[str, torch.Tensor]:
    return {spec.name: parameter.detach().clone() for spec, parameter in canonical_parameters(engine.module)}


def streams_of(engine: TrainingEngine) -> dict[str, list[int]]:
    return {name: state.tolist() for name, state in engine.rng.state_dict().items()}


def save_and_load(folder: str) -> dict[str, Any]:
    """Save after a step, change everything, load."""
    config = small_config(model={"hidden_dropout": 0.1})
    engine = start(config)
    batches = random_batches(config, engine.groups)
    engine.train_step(batches, 1e-2)
    (Path(folder) / "step").mkdir()
    own_writer = engine.engine.checkpoint_engine
    writer = save_files(engine, Path(folder) / "step", {"note": 3}, background=False)
    described = writer.finish()
    told: dict[str, Any] = {
        "files": sorted(described),
        "on disk": sorted(file.name for file in Path(folder).rglob("*") if file.is_file()),
        "problems": [file_problem(Path(folder) / "step" / name, FileEntry(**entry)) for name, entry in described.items()],
        "its own writer is back": engine.engine.checkpoint_engine is own_writer,
    }
    saved, streams = state(engine), streams_of(engine)
    engine.train_step(batches, 1e-2)
    told["moved"] = any(not torch.equal(value, saved[name]) for name, value in state(engine).items())
    told["drawn"] = streams_of(engine) != streams
    for group in engine.param_groups:
        group["weight_decay"], group["betas"] = 0.03, (0.5, 0.6)  # as another configuration would have said
    load_files(engine, Path(folder) / "step")
    told["back"] = all(torch.equal(value, saved[name]) for name, value in state(engine).items())
    told["streams are back"] = streams_of(engine) == streams
    told["configured"] = {(group["weight_decay"], tuple(group["betas"])) for group in engine.param_groups}
    return told


def test_files_bring_back_the_state_and_not_the_configuration(tmp_path: Path) -> None:
    told = run_distributed(save_and_load, 1, str(tmp_path))[0]
    assert told["files"] == told["on disk"]  # neither a script nor `latest` beside them
    assert "rng_rank_00000.pt" in told["files"] and told["problems"] == [None] * len(told["files"])
    assert told["its own writer is back"] and told["moved"] and told["drawn"]
    assert told["back"] and told["streams are back"]
    assert told["configured"] == {(0.03, (0.5, 0.6))}
