"""Training checkpoints of every layout: the weights are, bit for bit, those that the same run exports."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.harness import run_distributed
from helpers.layouts import random_batches, small_config, start
from helpers.manifests import edit_manifest
from safetensors.torch import load_file
from torch import Tensor

from megatron_ext.sharding import canonical_parameters
from pangu.conversion.deepspeed import detect, read
from pangu.conversion.export import write_weights
from pangu.conversion.weights import Overrides, Weights
from pangu.engine.manifest import MANIFEST
from pangu.errors import InputError
from pangu.training.checkpoint import Progress, save_checkpoint

# Parameters are sharded however small they are, and the optimizer's buffers cut in the middle of one.
SMALL_GROUPS = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 3000}}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process, no ZeRO": (1, {"parallel": {"zero_stage": 0}}),
    "one process": (1, {"model": {"gelu": "erf"}}),
    "tensor 2 x pipeline 2": (4, {"parallel": {"tensor": 2, "pipeline": 2}, "model": {"final_norm": "after_query"}}),
    "data 2, ZeRO-3": (2, {"parallel": {"zero_stage": 3}}),
    "tensor 2, ZeRO-2": (2, {"parallel": {"tensor": 2, "zero_stage": 2}}),
    "tensor 2, bf16": (2, {"parallel": {"tensor": 2}, "train": {"precision": "bf16"}}),
    "tensor 2 x data 2, ZeRO-3, bf16": (4, {"parallel": {"tensor": 2, "zero_stage": 3}, "train": {"precision": "bf16"}}),
}


def train_and_export(directory: str, sections: dict[str, Any], json_path: str | None) -> None:
    """Three steps: a checkpoint after the second and the third, and the weights at the end."""
    config = small_config(checkpoint={"dir": f"{directory}/checkpoints"}, **sections)
    if json_path:
        config = config.model_copy(update={"deepspeed": Path(json_path)})
    engine = start(config)
    batches = random_batches(config, engine.groups)
    for step in range(1, 4):
        engine.train_step(batches, 1e-2)
        if step > 1:
            save_checkpoint(engine, Progress(step=step))
    parameters = ((spec, partial(engine.whole, parameter)) for spec, parameter in canonical_parameters(engine.module))
    write_weights(Path(directory) / "weights", config.model, engine.groups, parameters)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each layout's run under its name."""
    root = tmp_path_factory.mktemp("runs")
    (root / "small_groups.json").write_text(json.dumps(SMALL_GROUPS))
    for layout, (ranks, sections) in LAYOUTS.items():
        json_path = str(root / "small_groups.json") if layout == "data 2, ZeRO-3" else None
        run_distributed(train_and_export, ranks, str(root / layout), sections, json_path)
    return root


def exported(run: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted((run / "weights").glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(found: Weights, expected: dict[str, Tensor]) -> None:
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        value = found.tensors[name].read()
        assert value.dtype == found.tensors[name].dtype == tensor.dtype and torch.equal(value, tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_those_that_training_exports(layout: str, runs: Path) -> None:
    found = read(runs / layout, Overrides())
    assert_same(found, exported(runs / layout))
    config = small_config(**LAYOUTS[layout][1]).model
    sizes = ("num_layers", "hidden_size", "num_heads", "vocab_size", "max_positions", "ffn_hidden_size", "gelu", "final_norm")
    assert [getattr(found.config, key) for key in sizes] == [getattr(config, key) for key in sizes]
    assert found.step == 3 and f"ZeRO-{small_config(**LAYOUTS[layout][1]).parallel.zero_stage}" in found.source
    assert any("rng_rank" in name for name in found.left_out)
    for name, tensor in found.tensors.items():
        if tensor.read_part is not None:
            begin, end = tensor.shape[-1] // 3, tensor.shape[-1] - 1
            assert torch.equal(tensor.read_part(-1 % len(tensor.shape), begin, end), tensor.read()[..., begin:end]), name


def test_the_small_groups_are_small(runs: Path) -> None:
    """The ZeRO-3 case would show little if one buffer held everything."""
    (optimizer,) = (runs / "data 2, ZeRO-3/checkpoints/step_00000003").glob("zero_pp_rank_0*optim_states.pt")
    state = torch.load(optimizer, weights_only=False)["optimizer_state_dict"]
    assert len(state["fp32_flat_groups"]) > 4


def test_the_newest_or_the_named_checkpoint_is_read(runs: Path, tmp_path: Path) -> None:
    run = runs / "one process"
    for path in (run, run / "checkpoints", run / "checkpoints/step_00000003"):
        assert detect(path)
        assert_same(read(path, Overrides()), exported(run))
    earlier = read(run / "checkpoints/step_00000002", Overrides())
    assert earlier.step == 2
    assert not torch.equal(earlier.tensors["transformer.wte.weight"].read(), exported(run)["transformer.wte.weight"])
    shutil.copytree(run / "checkpoints/step_00000002", tmp_path / "step_00000002")
    (tmp_path / "step_00000009.partial").mkdir()
    (tmp_path / "step_00000008").mkdir()  # without a manifest it is not complete
    assert read(tmp_path, Overrides()).step == 2
    assert not detect(tmp_path / "step_00000008") and not detect(tmp_path / "nowhere")


def test_the_users_word_counts(runs: Path) -> None:
    assert read(runs / "one process", Overrides(num_heads=2, gelu="tanh")).config.gelu == "tanh"


def test_the_exported_tokenizer_is_found(runs: Path, tmp_path: Path) -> None:
    assert read(runs / "one process", Overrides()).tokenizer is None
    shutil.copytree(runs / "one process", tmp_path / "run")
    (tmp_path / "run/weights/vocab.model").write_bytes(b"pieces")
    assert read(tmp_path / "run", Overrides()).tokenizer == tmp_path / "run/weights/vocab.model"


# --- what is refused ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def step(request: pytest.FixtureRequest, runs: Path, tmp_path: Path) -> Path:
    """A copy of a layout's checkpoint, to be spoilt."""
    return Path(shutil.copytree(runs / request.param / "checkpoints/step_00000003", tmp_path / "step_00000003"))


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        for tensor in read(path, Overrides()).tensors.values():
            tensor.read()
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    return str(error.value)


def edit_file(file: Path, change: Callable[[Any], Any]) -> None:
    """Change what a file holds, and what the manifest says of its size."""
    root = torch.load(file, weights_only=False)
    change(root)
    torch.save(root, file)
    edit_manifest(file.parent, lambda manifest: manifest["files"][file.name].update(bytes=file.stat().st_size))


EVERY = pytest.mark.parametrize("step", ["one process", "tensor 2 x pipeline 2", "tensor 2 x data 2, ZeRO-3, bf16"], indirect=True)


@EVERY
def test_every_lost_or_cut_file_is_named(step: Path) -> None:
    left_out = set(read(step, Overrides()).left_out)
    for file in sorted(step.glob("*.pt")):
        if file.name in left_out:
            continue
        data = file.read_bytes()
        file.unlink()
        assert file.name in refusal(step)
        file.write_bytes(data[:-1])
        assert file.name in refusal(step)
        file.write_bytes(data)
    read(step, Overrides())


@EVERY
def test_the_files_that_are_left_out_are_not_needed(step: Path) -> None:
    for name in read(step, Overrides()).left_out:
        (step / name).unlink()
    for tensor in read(step, Overrides()).tensors.values():
        tensor.read()


@pytest.mark.parametrize("step", ["one process"], indirect=True)
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"identity": {}, "files": {}, "progress": {}}', "[" * 100_000, "\ufffd", '{"identity": 1}']
)
def test_a_manifest_that_is_none_is_refused(text: str, step: Path) -> None:
    (step / MANIFEST).write_text(text)
    assert MANIFEST in refusal(step)


@EVERY
@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("parallel.tensor", [0, -1, 3, 10**30, "2", None, True]),
        ("parallel.pipeline", [0, 7, "2", 10**30]),
        ("data-parallel size", [0, "2", 10**30]),
        ("parallel.zero_stage", [-1, "3", None, 10**30]),
        ("train.precision", ["int8", None, ["bf16"]]),
        ("model.num_layers", [0, -1, 3, 5, 10**4, 10**9, 10**30, "4", None]),
        ("model.hidden_size", [16, 64, 10**9, "32"]),
        ("model.vocab_size", [10, 51, 10**9, None]),
        ("model.num_heads", [5, 10**9]),
        ("model.gelu", ["relu", 1]),
        ("model.final_norm", ["nowhere"]),
    ],
)
def test_a_manifest_that_tells_another_model_is_refused(key: str, values: list[Any], step: Path) -> None:
    pipeline = any(step.glob("layer_*"))
    for value in values:
        original = (step / MANIFEST).read_text()
        edit_manifest(step, lambda manifest, value=value: manifest["identity"].update({key: value}))
        if not (key == "parallel.pipeline" and pipeline and value == 7):  # how many stages there were does not matter
            refusal(step)
        (step / MANIFEST).write_text(original)


@pytest.mark.parametrize("step", ["one process"], indirect=True)
@pytest.mark.parametrize("size", [-1, "many", None, 10**30, [1]])
def test_sizes_that_cannot_be_are_refused(size: Any, step: Path) -> None:
    edit_manifest(step, lambda manifest: manifest["files"]["mp_rank_00_model_states.pt"].update(bytes=size))
    refusal(step)


@pytest.mark.parametrize("step", ["one process"], indirect=True)
def test_modules_that_are_not_the_models_are_refused(step: Path) -> None:
    file = step / "mp_rank_00_model_states.pt"
    good = file.read_bytes()
    changes: list[Callable[[Any], Any]] = [
        lambda root: root["module"].pop("wte.weight"),
        lambda root: root["module"].update(more=torch.ones(1)),
        lambda root: root["module"].update({"wte.weight": torch.ones(49, 32)}),
        lambda root: root["module"].update({"wte.weight": torch.ones(50, 32, dtype=torch.int32)}),
        lambda root: root["module"].update({"wte.weight": "text"}),
        lambda root: root.pop("module"),
        lambda root: root.update(module=[1]),
    ]
    for change in changes:
        edit_file(file, change)
        refusal(step)
        file.write_bytes(good)


@pytest.mark.parametrize("step", ["tensor 2 x data 2, ZeRO-3, bf16"], indirect=True)
def test_partitions_that_do_not_fit_are_refused(step: Path) -> None:
    optimizer, model = step / "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt", step / "zero_pp_rank_0_mp_rank_01_model_states.pt"
    changes: list[tuple[Path, Callable[[Any], Any]]] = [
        (optimizer, lambda root: root["optimizer_state_dict"]["fp32_flat_groups"].pop()),
        (optimizer, lambda root: root["optimizer_state_dict"].update(fp32_flat_groups=[torch.ones(3, 3)])),
        (optimizer, lambda root: root["optimizer_state_dict"].update(fp32_flat_groups=7)),
        (optimizer, lambda root: root.pop("optimizer_state_dict")),
        (model, lambda root: root["param_shapes"].pop()),
        (model, lambda root: root["param_shapes"].append({"more": torch.Size([1])})),
        (model, lambda root: root.update(param_shapes=None)),
        (model, lambda root: root.pop("module")),
    ]
    for file, change in changes:
        good = file.read_bytes()
        edit_file(file, change)
        refusal(step)
        file.write_bytes(good)


@EVERY
def test_mutated_checkpoints_are_read_or_refused(step: Path) -> None:
    source = random.Random(5)
    read_files = sorted({file.name for file in step.glob("*.pt")} - set(read(step, Overrides()).left_out))
    for _ in range(60):
        file = step / source.choice([*read_files, MANIFEST])
        good = file.read_bytes()
        data = bytearray(good)
        for _ in range(source.randint(1, 3)):
            data[source.randrange(len(data))] = source.randrange(256)
        file.write_bytes(data)
        try:
            for tensor in read(step, Overrides()).tensors.values():
                tensor.read()
        except InputError as error:
            assert "\n" not in str(error)
        file.write_bytes(good)
