"""The optimizer of training checkpoints of every layout is, bit for bit, what DeepSpeed itself says it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.harness import run_distributed
from helpers.layouts import random_batches, small_config, start
from helpers.manifests import edit_manifest
from torch import Tensor

from megatron_ext.collectives import all_gather
from megatron_ext.sharding import canonical_parameters
from pangu.conversion import mindspore
from pangu.conversion.convert import convert
from pangu.conversion.deepspeed import read
from pangu.conversion.weights import Overrides, WriteOptions
from pangu.engine.optimizer_reader import STATES, read_optimizer
from pangu.errors import InputError
from pangu.training.checkpoint import Progress, save_checkpoint

# Parameters are sharded however small they are, and the optimizer's buffers cut in the middle of one.
SMALL_GROUPS = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 3000}}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2, no ZeRO": (2, {"parallel": {"tensor": 2, "zero_stage": 0}}),
    "data 2, ZeRO-1, AdamW": (2, {"optimizer": {"name": "adamw"}}),
    "tensor 2 x data 2, ZeRO-2": (4, {"parallel": {"tensor": 2, "zero_stage": 2}}),
    "data 2, ZeRO-3": (2, {"parallel": {"zero_stage": 3}}),
    "tensor 2 x pipeline 2 x data 2, bf16": (8, {"parallel": {"tensor": 2, "pipeline": 2}, "train": {"precision": "bf16"}}),
}


def train_and_tell(directory: str, sections: dict[str, Any], json_path: str | None) -> dict[str, dict[str, Tensor]]:
    """Three steps and a checkpoint; the optimizer by state and canonical name, asked of DeepSpeed."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    config = small_config(checkpoint={"dir": f"{directory}/checkpoints"}, **sections)
    if json_path:
        config = config.model_copy(update={"deepspeed": Path(json_path)})
    engine = start(config)
    batches = random_batches(config, engine.groups)
    for _ in range(3):
        engine.train_step(batches, 1e-2)
    save_checkpoint(engine, Progress(step=3))
    if config.parallel.zero_stage in (1, 2):
        # DeepSpeed links a parameter to its states after the first group's first step, when other groups have none yet: link again.
        engine.engine.optimizer._hp_optimizer_states_linked = False
        engine.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def local(parameter: Any, state: str) -> Tensor:
        if config.parallel.zero_stage == 0:
            return parameter.detach() if state == "fp32" else engine.engine.optimizer.state[parameter][state]
        return safe_get_full_fp32_param(parameter) if state == "fp32" else safe_get_full_optimizer_state(parameter, state)

    told: dict[str, dict[str, Tensor]] = {state: {} for state in STATES}
    for state in STATES:
        for spec, parameter in canonical_parameters(engine.module):
            value = local(parameter, state).view(spec.local_shape(engine.groups.tensor.size))
            pieces = [all_gather(value, engine.groups.tensor, spec.split_dim)] if spec.split_dim is not None else [value]
            told[state][spec.name] = spec.merge(pieces).clone()
    return told


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, dict[str, Tensor]]]]:
    """Each layout's run under its name, and what its ranks told."""
    root = tmp_path_factory.mktemp("runs")
    (root / "small_groups.json").write_text(json.dumps(SMALL_GROUPS))
    told = {}
    for layout, (ranks, sections) in LAYOUTS.items():
        json_path = str(root / "small_groups.json") if layout == "data 2, ZeRO-3" else None
        answers = run_distributed(train_and_tell, ranks, str(root / layout), sections, json_path)
        told[layout] = {state: {name: value for answer in answers for name, value in answer[state].items()} for state in STATES}
    return root, told


@pytest.mark.parametrize("layout", LAYOUTS)
def test_states_are_those_that_deepspeed_tells(layout: str, runs: tuple[Path, dict[str, Any]]) -> None:
    root, told = runs
    found = read_optimizer(root / layout)
    assert found.step == (3 if "AdamW" in layout else 1_000_003)
    weights = read(root / layout, Overrides())
    for state in STATES:
        assert found.tensors[state].keys() == told[layout][state].keys() == weights.tensors.keys()
        for name, expected in told[layout][state].items():
            tensor = found.tensors[state][name]
            value = tensor.read()
            assert tensor.dtype == value.dtype == torch.float32 and torch.equal(value, expected), (state, name)
            begin, end = tensor.shape[-1] // 3, tensor.shape[-1] - 1
            assert tensor.read_part is not None
            assert torch.equal(tensor.read_part(len(tensor.shape) - 1, begin, end), value[..., begin:end]), (state, name)
    assert any(value.abs().max() > 0 for value in told[layout]["exp_avg"].values())
    for name, tensor in weights.tensors.items():
        assert torch.equal(found.tensors["fp32"][name].read().to(tensor.dtype), tensor.read()), name


def test_mindspore_files_keep_the_optimizer(runs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, told = runs
    layout = "tensor 2 x pipeline 2 x data 2, bf16"
    convert(read(root / layout, Overrides()).with_optimizer(), "mindspore", tmp_path / "with.ckpt", WriteOptions())
    again = mindspore.read(tmp_path / "with.ckpt", Overrides(num_heads=4))
    assert again.step == 3
    for name, expected in told[layout]["fp32"].items():
        assert torch.equal(again.tensors[name].read(), expected), name  # the fp32 weights, and not their bf16 copies
    states = again.with_optimizer().optimizer
    for state in STATES[1:]:
        assert all(torch.equal(states[state][name].read(), expected) for name, expected in told[layout][state].items())


def test_the_originals_optimizer_comes_along_byte_for_byte(shared: Path, tmp_path: Path) -> None:
    """But for its last value, the loss scale."""
    source = shared / "oracle/A/pangu_tiny_train_step5.ckpt"
    convert(mindspore.read(source, Overrides(num_heads=4)).with_optimizer(), "mindspore", tmp_path / "with.ckpt", WriteOptions())
    written, original = (tmp_path / "with.ckpt").read_bytes(), source.read_bytes()
    assert original.startswith(written) and b"global_step" in written and b"loss_scale" in original[len(written) :]


def test_what_has_no_optimizer_or_no_place_for_one_is_refused(shared: Path, runs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, _ = runs
    with pytest.raises(InputError, match="holds no optimizer states"):
        mindspore.read(shared / "oracle/A/pangu_tiny.ckpt", Overrides(num_heads=4)).with_optimizer()
    weights = read(root / "data 2, ZeRO-3", Overrides()).with_optimizer()
    with pytest.raises(InputError, match="cannot hold optimizer states"):
        convert(weights, "huggingface", tmp_path / "out", WriteOptions())


def spoil(root: Any, layout: str) -> None:
    """Make one rank's part of a parameter disappear."""
    state = root["optimizer_state_dict"]
    if layout == "data 2, ZeRO-3":
        state["fp32_flat_groups"][0] = state["fp32_flat_groups"][0][:-1].clone()
    else:
        del state["param_slice_mappings"][0][next(iter(state["param_slice_mappings"][0]))]


@pytest.mark.parametrize("layout", ["data 2, ZeRO-1, AdamW", "data 2, ZeRO-3"])
def test_a_part_that_is_missing_is_named(layout: str, runs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    step = Path(shutil.copytree(runs[0] / layout / "checkpoints/step_00000003", tmp_path / "step_00000003"))
    victim = step / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    root = torch.load(victim, weights_only=False)
    spoil(root, layout)
    torch.save(root, victim)
    edit_manifest(step, lambda manifest: manifest["files"][victim.name].update(bytes=victim.stat().st_size))
    with pytest.raises(InputError, match=r"elements are there|not as long as its parameters need") as error:
        for tensors in read_optimizer(step).tensors.values():
            for tensor in tensors.values():
                tensor.read()
    assert "\n" not in str(error.value)
