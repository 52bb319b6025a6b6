"""What lies in a checkpoint's directory is never executed, and no change of it passes for what was written."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpointed_run import train
from helpers.harness import RankError, run_distributed
from helpers.layouts import small_config

from megatron_ext.topology import SINGLE
from pangu.engine.manifest import MANIFEST, Progress, file_problem, manifest_problems, read_manifest, sha256, write_manifest
from pangu.training.checkpoint import find_checkpoint

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "pipeline": (2, {"pipeline": 2}),
    "ZeRO-3": (2, {"zero_stage": 3}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of each layout."""
    root = tmp_path_factory.mktemp("runs")
    for name, (ranks, parallel) in LAYOUTS.items():
        run_distributed(train, ranks, str(root / name), parallel, [1, 2], 2)
    return root


def problem_of(step: Path) -> str | None:
    """The first thing that is wrong, as resuming finds it."""
    manifest, problems = manifest_problems(step)
    if manifest is None or problems:
        return problems[0]
    return next(filter(None, (file_problem(step / name, entry) for name, entry in manifest.files.items())), None)


def flips(data: bytes, bits: Iterator[int]) -> Iterator[bytes]:
    for bit in bits:
        yield data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def test_every_single_bit_of_the_manifest_counts(runs: Path, tmp_path: Path) -> None:
    step = Path(shutil.copytree(runs / "one process" / "step_00000002", tmp_path / "step_00000002"))
    file, original = step / MANIFEST, (step / MANIFEST).read_bytes()
    assert problem_of(step) is None
    unnoticed = []
    for bit, data in enumerate(flips(original, iter(range(8 * len(original))))):
        file.write_bytes(data)
        if not manifest_problems(step)[1]:
            unnoticed.append(bit)
    assert unnoticed == []


def test_every_truncation_of_the_manifest_is_found(runs: Path, tmp_path: Path) -> None:
    step = Path(shutil.copytree(runs / "one process" / "step_00000002", tmp_path / "step_00000002"))
    original = (step / MANIFEST).read_bytes()
    for length in range(len(original)):
        (step / MANIFEST).write_bytes(original[:length])
        assert manifest_problems(step)[1], length


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flips_truncations_and_deletions_of_every_file_are_found(layout: str, runs: Path, tmp_path: Path) -> None:
    step = Path(shutil.copytree(runs / layout / "step_00000002", tmp_path / "step_00000002"))
    chosen = random.Random(7)
    for name, entry in read_manifest(step).files.items():
        data = (step / name).read_bytes()
        bits = chosen.sample(range(8 * len(data)), min(8 * len(data), 1000))
        for changed in flips(data, iter(bits)):
            (step / name).write_bytes(changed)
            assert file_problem(step / name, entry), name
        for length in (0, 1, len(data) // 2, len(data) - 1):
            (step / name).write_bytes(data[:length])
            assert file_problem(step / name, entry), name
        (step / name).unlink()
        assert name in str(problem_of(step))
        (step / name).write_bytes(data)
    assert problem_of(step) is None


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.canary, "w")


def sign(step: Path) -> None:
    """The manifest of what is there now, as somebody who knows the format writes it."""
    manifest = read_manifest(step)
    files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in step.iterdir() if file.name != MANIFEST}
    write_manifest(step, manifest.progress, manifest.identity, files)


KINDS = {
    "one process": ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "rng_rank_00000.pt"],
    "pipeline": ["layer_02-model_00-model_states.pt", "mp_rank_01_model_states.pt"],
    "ZeRO-3": ["zero_pp_rank_1_mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"],
}


@pytest.mark.parametrize(("layout", "name"), [(layout, name) for layout, names in KINDS.items() for name in names])
def test_nothing_is_executed_on_the_same_layout(layout: str, name: str, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / layout, tmp_path / "run")
    step = tmp_path / "run/step_00000002"
    root = torch.load(step / name, weights_only=False)
    root["planted"] = Harm(tmp_path / "canary")
    torch.save(root, step / name)
    sign(step)
    assert problem_of(step) is None
    ranks, parallel = LAYOUTS[layout]
    with pytest.raises(RankError) as error:
        run_distributed(train, ranks, str(tmp_path / "run"), parallel, [3], 3)
    assert f"{name}: names io.open" in str(error.value) and "InputError" in error.value.reason
    assert not (tmp_path / "canary").exists()


def forget_files(step: Path) -> None:
    manifest = read_manifest(step)
    write_manifest(step, manifest.progress, manifest.identity, {})


def other_step(step: Path) -> None:
    manifest = read_manifest(step)
    write_manifest(step, Progress(step=7), manifest.identity, {name: entry.model_dump() for name, entry in manifest.files.items()})


LIES: dict[str, Callable[[Path], Any]] = {
    "no files": forget_files,
    "another step": other_step,
    "a file more": lambda step: (step / "more.pt").write_bytes(b"x"),
    "no manifest": lambda step: (step / MANIFEST).unlink(),
    "a manifest that is a directory": lambda step: ((step / MANIFEST).unlink(), (step / MANIFEST).mkdir()),
    "a manifest that is a pipe": lambda step: ((step / MANIFEST).unlink(), os.mkfifo(step / MANIFEST)),
    "nested manifest": lambda step: (step / MANIFEST).write_text("[" * 100_000),
    "huge manifest": lambda step: os.truncate(step / MANIFEST, 2**40),
    "a path that leads out": lambda step: edited(step, lambda values: values["files"].update({"../x": {"bytes": 0, "sha256": "0" * 64}})),
    "a number of 5,000 digits": lambda step: edited(step, lambda values: values["progress"].update(step=10**4000)),
    "a negative step": lambda step: edited(step, lambda values: values["progress"].update(step=-1)),
    "a key more": lambda step: edited(step, lambda values: values["progress"].update(more=1)),
    "a text for a number": lambda step: edited(step, lambda values: values["progress"].update(step="2")),
}


def edited(step: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((step / MANIFEST).read_text()) | {"format": 1}
    del values["sha256"]
    change(values)
    (step / MANIFEST).write_text(json.dumps(values))


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_is_a_damaged_checkpoint(lie: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs / "one process", tmp_path / "run")
    LIES[lie](tmp_path / "run/step_00000002")
    config = small_config(checkpoint={"dir": str(tmp_path / "run")})
    assert find_checkpoint(config, SINGLE) == tmp_path / "run/step_00000001"
    said = capsys.readouterr().out
    assert "step_00000002 is damaged" in said and said.count("\n") == 1 and len(said) < 500
    assert (tmp_path / "run/step_00000002.damaged").is_dir()


def test_hidden_files_and_manifests_of_the_first_format_are_accepted(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "one process", tmp_path / "run")
    step = tmp_path / "run/step_00000002"
    (step / ".nfs0001").write_bytes(b"")
    edited(step, lambda values: None)
    assert find_checkpoint(small_config(checkpoint={"dir": str(tmp_path / "run")}), SINGLE) == step
