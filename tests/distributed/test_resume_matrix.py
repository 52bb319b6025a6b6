"""A checkpoint of every layout resumed on every other: bit for bit the same state, the same samples, and the losses of an unbroken run."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.resume_matrix import LAYOUTS, SAVED_AT, STEPS, Steps, largest_difference, resume, save_all, train
from helpers.harness import RankError, run_distributed
from helpers.layouts import small_config, start
from helpers.manifests import edit_manifest

from pangu.engine.manifest import read_manifest
from pangu.engine.optimizer_reader import STATES, read_optimizer
from pangu.errors import InputError
from pangu.training.checkpoint import load_checkpoint

PAIRS = list(itertools.permutations(LAYOUTS, 2))
NAMES = list(LAYOUTS)
# Each layout as source and as target, with and without a pipeline on either side, every ZeRO stage into every other; the rest is slow.
QUICK = {(NAMES[i], NAMES[(i + shift) % len(NAMES)]) for shift in (3, 8) for i in range(len(NAMES))}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    save_all(root)
    return root


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """One process that was never interrupted."""
    return run_distributed(train, 1, str(tmp_path_factory.mktemp("unbroken")), {}, STEPS)[0]


@pytest.mark.parametrize(("source", "target"), [pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS])
def test_every_layout_goes_on_with_the_checkpoint_of_every_other(
    source: str, target: str, saved: Path, unbroken: Steps, tmp_path: Path
) -> None:
    resumed = resume(saved, source, target, tmp_path)
    assert largest_difference(resumed, unbroken[SAVED_AT:]) < 5e-6
    assert_equal_states(saved / source, tmp_path / "echo")


def assert_equal_states(one: Path, other: Path) -> None:
    ours, theirs = read_optimizer(one), read_optimizer(other)
    assert ours.step % 1_000_000 == theirs.step % 1_000_000
    for state in STATES:
        assert ours.tensors[state].keys() == theirs.tensors[state].keys()
        for name, tensor in ours.tensors[state].items():
            assert torch.equal(tensor.read(), theirs.tensors[state][name].read()), (state, name)


SAME_SIZES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "another cut": (2, {"pipeline": 2}, {"pipeline": 2, "stage_layers": [1, 3]}),
    "another order": (4, {"pipeline": 2}, {"pipeline": 2, "order": "tp-pp-dp"}),
    "both": (4, {"pipeline": 2, "order": "tp-pp-dp", "stage_layers": [3, 1]}, {"pipeline": 2}),
}


@pytest.mark.parametrize("change", SAME_SIZES)
def test_a_run_goes_on_with_other_stages_on_as_many_ranks(change: str, unbroken: Steps, tmp_path: Path) -> None:
    ranks, before, after = SAME_SIZES[change]
    run_distributed(train, ranks, str(tmp_path / "run"), before, SAVED_AT)
    resumed = run_distributed(train, ranks, str(tmp_path / "run"), after, STEPS, str(tmp_path / "echo"))
    for steps in resumed:
        assert largest_difference(steps, unbroken[SAVED_AT:]) < 5e-6
    assert_equal_states(tmp_path / "run", tmp_path / "echo")


def test_a_cut_that_cannot_be_is_refused(tmp_path: Path) -> None:
    run_distributed(train, 2, str(tmp_path), {"pipeline": 2}, SAVED_AT)
    step = tmp_path / f"step_{SAVED_AT:08d}"
    assert read_manifest(step).identity["parallel.stage_layers"] == [2, 2]
    for layers in ([2, 3], [4], [4, 0], "22"):
        edit_manifest(step, lambda manifest, layers=layers: manifest["identity"].update({"parallel.stage_layers": layers}))
        with pytest.raises(InputError, match=r"parallel\.stage_layers = .*2 stages with 4 layers"):
            read_optimizer(tmp_path)
    edit_manifest(step, lambda manifest: manifest["identity"].pop("parallel.stage_layers"))
    assert len(read_optimizer(tmp_path).tensors["fp32"]) == 4 * 16 + 5  # older than the key: the balanced cut


# --- 16 bits -----------------------------------------------------------------------------------------------------------------------------


def deepspeed_json(folder: Path, **settings: Any) -> dict[str, Any]:
    (folder / "settings.json").write_text(json.dumps(settings))
    return {"deepspeed": str(folder / "settings.json")}


def train_in_16_bits(
    directory: str, parallel: dict[str, Any], num_steps: int, echo: str | None, sections: dict[str, Any]
) -> dict[str, Any]:
    """As `train`; what the loss scaler holds when the run was resumed."""
    from deepspeed.accelerator import get_accelerator

    from megatron_ext import accelerator

    accelerator.name()
    type(get_accelerator()).is_fp16_supported = lambda self: True  # type: ignore[method-assign]
    train(directory, parallel, num_steps, echo, **sections)
    if not echo:
        return {}
    config = small_config(parallel=parallel, checkpoint={"dir": echo}, **sections)
    engine = start(config)
    load_checkpoint(engine, next(Path(echo).glob("step_*")))
    scaler = getattr(engine.engine.optimizer, "loss_scaler", None)  # one of the optimizers for bf16 has none
    return {key: value for key, value in vars(scaler).items() if isinstance(value, (int, float))} if scaler else {}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((2, {"tensor": 2}), (4, {"tensor": 2, "pipeline": 2})),
        ((4, {"tensor": 2, "pipeline": 2}), (2, {"zero_stage": 3})),
        ((2, {"zero_stage": 3}), (2, {"zero_stage": 2})),
    ],
    ids=str,
)
@pytest.mark.parametrize("scale_power", [32, 20])
def test_the_loss_scale_comes_along(scale_power: int, source: tuple[int, Any], target: tuple[int, Any], tmp_path: Path) -> None:
    """The first steps overflow. From 2 to the 32nd, all twelve do, and there is no state of Adam yet when the checkpoint is saved."""
    sections = {"train": {"precision": "fp16"}, **deepspeed_json(tmp_path, fp16={"initial_scale_power": scale_power})}
    run_distributed(train_in_16_bits, source[0], str(tmp_path / "run"), source[1], 12, None, sections)
    held = run_distributed(train_in_16_bits, target[0], str(tmp_path / "run"), target[1], 13, str(tmp_path / "echo"), sections)
    expected = read_optimizer(tmp_path / "run/step_00000012").loss_scaler
    assert 1 < expected["cur_scale"] < 2 ** (scale_power - 1)
    assert (read_optimizer(tmp_path / "run/step_00000012").step == 0) == (scale_power == 32)
    assert all(one == held[0] for one in held)
    assert {key: value for key, value in held[0].items() if key in expected} == dict(expected)
    assert_equal_states(tmp_path / "run/step_00000012", tmp_path / "echo")


@pytest.mark.parametrize("accumulate", ["fp32", "bf16"])
def test_bf16_with_either_accumulation(accumulate: str, tmp_path: Path) -> None:
    """DeepSpeed has two optimizers for bf16, and a checkpoint of one goes on in the other."""
    there = {"train": {"precision": "bf16"}, **deepspeed_json(tmp_path, data_types={"grad_accum_dtype": accumulate})}
    back = {"train": {"precision": "bf16"}}
    run_distributed(train_in_16_bits, 2, str(tmp_path / "run"), {}, SAVED_AT, None, there)
    run_distributed(train_in_16_bits, 4, str(tmp_path / "run"), {"tensor": 2}, SAVED_AT, str(tmp_path / "one"), back)
    assert_equal_states(tmp_path / f"run/step_{SAVED_AT:08d}", tmp_path / "one")
    run_distributed(train_in_16_bits, 2, str(tmp_path / "one"), {}, SAVED_AT, str(tmp_path / "two"), there)
    assert_equal_states(tmp_path / f"run/step_{SAVED_AT:08d}", tmp_path / "two")


# --- the same layout, other settings -----------------------------------------------------------------------------------------------------


def test_buffers_cut_in_another_way_are_another_layout(tmp_path: Path) -> None:
    """DeepSpeed pairs ZeRO-3's sub-groups in order, and would go on with other numbers."""
    small = deepspeed_json(tmp_path, zero_optimization={"stage": 3, "sub_group_size": 3000})
    parallel = {"zero_stage": 3}
    run_distributed(train, 2, str(tmp_path / "run"), parallel, SAVED_AT)
    run_distributed(train_in_16_bits, 2, str(tmp_path / "run"), parallel, SAVED_AT, str(tmp_path / "echo"), small)
    assert_equal_states(tmp_path / "run", tmp_path / "echo")


def hyper_parameters(directory: str) -> list[tuple[float, Any]]:
    config = small_config(checkpoint={"dir": directory}, optimizer={"weight_decay": 0.3, "betas": [0.8, 0.9]})
    engine = start(config)
    load_checkpoint(engine, Path(directory) / f"step_{SAVED_AT:08d}")
    return [(group["weight_decay"], tuple(group["betas"])) for group in engine.param_groups]


def test_what_the_configuration_says_now_counts(tmp_path: Path) -> None:
    """DeepSpeed brings back the hyper-parameters of the run that saved the checkpoint."""
    run_distributed(train, 1, str(tmp_path), {}, SAVED_AT)
    assert run_distributed(hyper_parameters, 1, str(tmp_path))[0] == [(0.3, (0.8, 0.9)), (0.0, (0.8, 0.9))]


def test_another_model_or_precision_is_refused(tmp_path: Path) -> None:
    run_distributed(train, 1, str(tmp_path), {}, SAVED_AT)
    with pytest.raises(RankError, match=r"train\.precision was fp32 and is bf16"):
        run_distributed(train_in_16_bits, 2, str(tmp_path), {"tensor": 2}, STEPS, None, {"train": {"precision": "bf16"}})
