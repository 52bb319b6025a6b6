"""Files in the form of a training checkpoint, made without a run; those that runs leave: tests/pangu/conversion/test_deepspeed.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_model import small_config, small_model
from torch import Tensor

from megatron_ext.sharding import canonical_parameters, spec_of
from pangu.engine.checkpoint_reader import locate, open_checkpoint, read_tensors
from pangu.engine.manifest import MANIFEST, Progress, read_manifest, sha256, write_manifest
from pangu.errors import InputError

Tensors = dict[str, Tensor]


def write(folder: Path, ranks: int = 1, **identity: Any) -> Tensors:
    """A checkpoint without a pipeline of `ranks` tensor-parallel slices; returns the full tensors by canonical name."""
    folder.mkdir(parents=True)
    model = small_model()
    specs = {name: spec_of(parameter) for name, parameter in model.named_parameters()}
    files = {}
    for rank in range(ranks):
        slices = {name: specs[name].slice(value.detach(), rank, ranks).clone() for name, value in model.named_parameters()}
        file = folder / f"mp_rank_{rank:02d}_model_states.pt"
        torch.save({"module": slices}, file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    said = {f"model.{key}": value for key, value in small_config().identity().items()}
    said |= {"parallel.tensor": ranks, "parallel.pipeline": 1, "data-parallel size": 1, "parallel.zero_stage": 1, "train.precision": "fp32"}
    write_manifest(folder, Progress(step=3), said | identity, files)
    return {spec.name: parameter.detach() for spec, parameter in canonical_parameters(model)}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_slices_become_the_full_tensors(ranks: int, tmp_path: Path) -> None:
    """The vocabulary of 101 divides by neither 2 nor 4: its padding is dropped."""
    expected = write(tmp_path / "step_00000003", ranks)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == small_config() and checkpoint.progress == Progress(step=3) and checkpoint.layout["tensor"] == ranks
    found = read_tensors(checkpoint)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].read(), value) for name, value in expected.items())
    assert checkpoint.opened == {f"mp_rank_{rank:02d}_model_states.pt" for rank in range(ranks)}


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    for name in ("step_00000003", "step_00000020", "step_00000100.partial"):
        write(tmp_path / "checkpoints" / name)
    newest = tmp_path / "checkpoints/step_00000020"
    assert locate(tmp_path) == locate(tmp_path / "checkpoints") == locate(newest) == newest
    with pytest.raises(InputError, match="no training checkpoint"):
        locate(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("identity", "told"),
    [
        ({"parallel.tensor": 0}, "impossible layout"),
        ({"parallel.tensor": 10**6}, "impossible layout"),
        ({"parallel.pipeline": "2"}, "impossible layout"),
        ({"train.precision": "fp8"}, "impossible layout"),
        ({"parallel.zero_stage": -1}, "impossible layout"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(identity: dict[str, Any], told: str, tmp_path: Path) -> None:
    write(tmp_path / "step_00000003", **identity)
    with pytest.raises(InputError, match=told):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"identity": {}}', '{"identity": 1, "files": {}, "progress": {}}'])
def test_what_is_no_manifest_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(InputError, match="not the manifest of a complete checkpoint"):
        open_checkpoint(tmp_path)


def test_files_that_are_not_what_the_manifest_says_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "step_00000003"
    write(folder, 2)
    checkpoint = open_checkpoint(folder)
    file = folder / "mp_rank_01_model_states.pt"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(InputError, match=rf"mp_rank_01_model_states.pt: missing or changed; expected {len(data):,} bytes"):
        read_tensors(checkpoint)
    file.unlink()
    with pytest.raises(InputError, match=r"mp_rank_01_model_states.pt: missing or changed"):
        read_tensors(checkpoint)
    with pytest.raises(InputError, match="expected listed in the manifest"):
        checkpoint.load(MANIFEST)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda module: module.pop("ln_f.weight"), "'ln_f.weight' is missing"),
        (lambda module: module.update(other=torch.ones(1)), "'other' is unknown"),
        (lambda module: module.update({"ln_f.weight": 3}), "'ln_f.weight' is not a tensor"),
        (lambda module: module.update({"ln_f.weight": torch.ones(7)}), r"transformer\.ln_f\.weight is saved as .* \[7\], expected \[32\]"),
        (lambda module: module.update({"ln_f.weight": torch.ones(32, dtype=torch.int64)}), "is saved as torch.int64"),
    ],
)
def test_a_file_of_another_model_is_refused(change: Any, told: str, tmp_path: Path) -> None:
    folder = tmp_path / "step_00000003"
    write(folder)
    file = folder / "mp_rank_00_model_states.pt"
    root = torch.load(file, weights_only=True)
    change(root["module"])
    torch.save(root, file)
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.progress, manifest.identity, {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}})
    with pytest.raises(InputError, match=told):
        read_tensors(open_checkpoint(folder))
