"""Numbers gone wrong on one rank: no rank updates, all know it, and training goes on as if that step had not been."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.harness import run_distributed
from helpers.layouts import random_batches, small_config, start
from helpers.manifests import edit_manifest

from megatron_ext.collectives import world_rank, world_size
from megatron_ext.sharding import canonical_parameters
from pangu.config.layout import resolve
from pangu.data.indexed import IndexedDatasetWriter
from pangu.engine.engine import StepResult, TrainingEngine
from pangu.errors import InputError
from pangu.training.anomalies import MAX_ROLLBACKS, MAX_SKIPPED, fault_of

RECIPES = Path(__file__).parents[2] / "ds_configs"
BF16 = {"precision": "bf16"}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one process, no ZeRO": (1, {"zero_stage": 0}, {}),
    "data 2, no ZeRO": (2, {"zero_stage": 0}, {}),
    "data 2, ZeRO-1": (2, {"zero_stage": 1}, {}),
    "data 2, ZeRO-2": (2, {"zero_stage": 2}, {}),
    "data 2, ZeRO-3": (2, {"zero_stage": 3}, {}),
    "tensor 2, no ZeRO": (2, {"tensor": 2, "zero_stage": 0}, {}),
    "tensor 2": (2, {"tensor": 2}, {}),
    "tensor 2, ZeRO-3, bf16": (2, {"tensor": 2, "zero_stage": 3}, BF16),
    "pipeline 2": (2, {"pipeline": 2}, {}),
    "tensor 2 x pipeline 2": (4, {"tensor": 2, "pipeline": 2}, {}),
}
MORE: dict[str, tuple[int, dict[str, Any], dict[str, Any], Any]] = {
    "tensor 2, ZeRO-2, bf16": (2, {"tensor": 2, "zero_stage": 2}, BF16, {}),
    "tensor 2 x data 2, bf16": (4, {"tensor": 2}, BF16, {}),
    "bf16, gradients accumulated in fp32": (4, {"tensor": 2, "pipeline": 2}, BF16, {"data_types": {"grad_accum_dtype": "fp32"}}),
    "bf16, DeepSpeed told not to look": (2, {"tensor": 2}, BF16, {"bf16": {"check_grad_overflow": False}}),
    "ZeRO-2, offload": (2, {"tensor": 2, "zero_stage": 2}, {}, RECIPES / "zero2-offload.json"),
    "ZeRO-3, offload": (2, {"zero_stage": 3}, {}, RECIPES / "zero3-offload.json"),
}
"""With a DeepSpeed JSON, or what is to be in one."""


def state_of(engine: TrainingEngine) -> list[torch.Tensor]:
    """Copies of this rank's weights and optimizer states."""
    tensors = []
    for _, parameter in canonical_parameters(engine.module):
        with engine.whole(parameter) as whole:
            tensors.append(whole.clone())
    optimizer = engine.engine.optimizer
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        tensors += [value.clone() for _, value in sorted(state.items()) if isinstance(value, torch.Tensor)]
    return tensors


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def infinite_loss(engine: TrainingEngine) -> Callable[[], None]:
    """The loss of the last rank is infinite; its gradient is not."""
    import pangu.engine.pipeline
    import pangu.model.model

    modules = (pangu.model.model, pangu.engine.pipeline)
    intact = pangu.model.model.language_model_loss
    for module in modules:
        module.language_model_loss = lambda *args, **keywords: intact(*args, **keywords) + math.inf

    def undo() -> None:
        for module in modules:
            module.language_model_loss = intact

    return undo


def nan_in_gradient(name: str) -> Callable[[TrainingEngine], Callable[[], None]]:
    """The last rank's gradient of one parameter holds a NaN."""

    def inject(engine: TrainingEngine) -> Callable[[], None]:
        parameter = next(p for spec, p in canonical_parameters(engine.module) if spec.name.endswith(name))

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            gradient.view(-1)[0] = math.nan
            return gradient

        return parameter.register_hook(spoil).remove

    return inject


def nan_in_parameter(engine: TrainingEngine) -> Callable[[], None]:
    """One element of one of the last rank's parameters is NaN during the step."""
    parameter = list(canonical_parameters(engine.module))[-1][1]
    data = getattr(parameter, "ds_tensor", parameter.data)
    kept = data.view(-1)[0].clone()
    data.view(-1)[0] = math.nan

    def undo() -> None:
        getattr(parameter, "ds_tensor", parameter.data).view(-1)[0] = kept

    return undo


FAULTS = {
    2: infinite_loss,
    3: nan_in_gradient("mlp.c_fc.weight"),  # split over the tensor-parallel ranks
    5: nan_in_gradient("ln_1.weight"),  # whole on each
    7: nan_in_parameter,
}
"""By step."""
NUM_STEPS = 9


def train(parallel: dict[str, Any], section: dict[str, Any], deepspeed: Path | None, *, leave_out: bool) -> list[str]:
    """Losses of the good steps as bits. The last rank has the faults; or their steps are left out."""
    engine = start(small_config(parallel=parallel, train=section).model_copy(update={"deepspeed": deepspeed}))
    batches = random_batches(engine.config, engine.groups)
    reads = not engine.has_pipeline or engine.groups.coordinates.pipe in (0, engine.groups.topology.pipeline - 1)
    losses = []
    for step in range(NUM_STEPS):
        if step not in FAULTS:
            result = engine.train_step(batches, 1e-2)
            assert not result.skipped
            losses.append(result.loss.hex())
        elif leave_out:
            for _ in range(engine.micro_batches * reads):
                next(batches)
        else:
            before = state_of(engine)
            undo = FAULTS[step](engine) if world_rank() == world_size() - 1 else None
            result = engine.train_step(batches, 1e-2)
            if undo:
                undo()
            assert result.skipped and not result.overflow and fault_of(result, math.inf), step
            assert equal(before, state_of(engine)), step
    return losses


def with_faults(parallel: dict[str, Any], section: dict[str, Any], deepspeed: Path | None = None) -> list[str]:
    return train(parallel, section, deepspeed, leave_out=False)


def without(parallel: dict[str, Any], section: dict[str, Any], deepspeed: Path | None = None) -> list[str]:
    return train(parallel, section, deepspeed, leave_out=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_fault_reaches_the_weights(layout: str) -> None:
    world_size, *settings = LAYOUTS[layout]
    expected = run_distributed(without, world_size, *settings)
    assert run_distributed(with_faults, world_size, *settings) == expected
    assert all(losses == expected[0] for losses in expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", MORE)
def test_no_fault_reaches_the_weights_under_other_settings(layout: str, tmp_path: Path) -> None:
    world_size, parallel, section, recipe = MORE[layout]
    if isinstance(recipe, dict):
        (tmp_path / "recipe.json").write_text(json.dumps(recipe))
        recipe = tmp_path / "recipe.json"
    expected = run_distributed(without, world_size, parallel, section, recipe)
    assert run_distributed(with_faults, world_size, parallel, section, recipe) == expected


def outlive_a_refusal() -> None:
    """A refusal would end this process, which is the test's. No rank need hear of another's, for all are refused."""
    from megatron_ext.supervision import watchdog

    watchdog._leave, watchdog._ANSWER_SECONDS = lambda code: None, 0.5  # type: ignore[assignment]


def run(directory: str, overrides: dict[str, dict[str, Any]], faults: dict[int, float]) -> tuple[list[dict[str, Any]], str]:
    """A whole training run; something is added to the losses of some batches on the last rank.

    Args:
        directory: of the run and its data.
        overrides: sections of the configuration.
        faults: what is added, by the number of the batch in the data, counted from 1.

    Returns:
        The lines of metrics.jsonl, and the error that ended the run.
    """
    import pangu.engine.pipeline
    import pangu.model.model
    from pangu.training import run

    sections: dict[str, dict[str, Any]] = {
        "model": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
        "data": {"train": [f"{directory}/corpus"]},
        "run": {"dir": f"{directory}/run", "tensorboard": False, "consistency_every": 5},
    }
    config = small_config(**{name: sections.get(name, {}) | overrides.get(name, {}) for name in {**sections, **overrides}})
    layout = resolve(config, int(os.environ["WORLD_SIZE"]))
    a_step = config.train.global_batch_size // config.train.micro_batch_size // layout.topology.data
    manifests = sorted(config.checkpoint_dir.glob("step_*/manifest.json"))
    consumed = json.loads(manifests[-1].read_text())["progress"]["consumed_samples"] if manifests else 0
    calls = itertools.count(consumed // config.train.global_batch_size * a_step)
    is_last = int(os.environ["RANK"]) == layout.topology.world_size - 1
    intact = pangu.model.model.language_model_loss

    def spoilt(*args: Any, **keywords: Any) -> torch.Tensor:
        batch = next(calls) // a_step + 1
        return intact(*args, **keywords) + (faults.get(batch, 0.0) if is_last else 0.0)

    pangu.model.model.language_model_loss = pangu.engine.pipeline.language_model_loss = spoilt
    error = ""
    outlive_a_refusal()
    try:
        run.run_training(config, layout)
    except InputError as refused:
        error = str(refused)
    return [json.loads(line) for line in (config.run.dir / "metrics.jsonl").read_text().splitlines()], error


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of random documents."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(1)
    with IndexedDatasetWriter(folder / "corpus", vocab_size=50, separator_id=9, tokenizer_sha256="0" * 64) as writer:
        for length in rng.integers(5, 40, 200):
            writer.add(np.append(rng.integers(10, 50, length - 1), 9).astype(np.uint16), np.array([length], np.int32))
    return folder


def directory_of(corpus: Path, folder: Path) -> str:
    for file in corpus.iterdir():
        shutil.copy(file, folder)
    return str(folder)


@pytest.mark.parametrize(("world_size", "parallel"), [(2, {"zero_stage": 3}), (2, {"pipeline": 2})], ids=str)
def test_rollback_goes_on_from_the_checkpoint_with_later_data(
    world_size: int, parallel: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    common = {
        "parallel": parallel,
        "checkpoint": {"save_every": 4, "keep": 5, "async_save": True},
        "train": {"steps": 8, "on_bad_step": "rollback"},
    }
    directory = directory_of(corpus, tmp_path / "a")
    lines, error = run_distributed(run, world_size, directory, common, {6: math.nan})[0]
    assert not error
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    assert [line["consumed_samples"] for line in lines] == [8 * n for n in range(1, 11)]
    assert [line.get("decision") for line in lines] == [None] * 5 + ["rollback"] + [None] * 4
    assert lines[5]["fault"] == "the loss is nan" and lines[5]["skipped"] and "loss" not in lines[5]

    # The same by hand: a checkpoint of step 4 that has consumed six batches.
    shutil.copytree(tmp_path / "a", tmp_path / "b", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "b/run/checkpoints/step_00000008")
    (tmp_path / "b/run/metrics.jsonl").unlink()
    counts = {"consumed_samples": 48, "consumed_tokens": 48 * 16}
    edit_manifest(tmp_path / "b/run/checkpoints/step_00000004", lambda manifest: manifest["progress"].update(counts))
    resumed, error = run_distributed(run, world_size, str(tmp_path / "b"), common, {})[0]
    assert not error
    assert [(line["step"], line["loss"], line["grad_norm"]) for line in resumed] == [
        (line["step"], line["loss"], line["grad_norm"]) for line in lines[6:]
    ]


def test_rollbacks_that_do_not_help_end_the_run(corpus: Path, tmp_path: Path) -> None:
    overrides = {"checkpoint": {"save_every": 2}, "train": {"steps": 8, "on_bad_step": "rollback"}}
    faults = dict.fromkeys(range(4, 20), math.inf)
    lines, error = run_distributed(run, 1, directory_of(corpus, tmp_path), overrides, faults)[0]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 3, 3, 3]
    assert [line.get("decision") for line in lines[3:]] == ["rollback"] * MAX_ROLLBACKS + ["stop"]
    assert "the loss is inf" in error and "step_00000002" in error


def test_spikes_are_skipped_and_a_resumed_run_knows_what_a_spike_is(corpus: Path, tmp_path: Path) -> None:
    directory = directory_of(corpus, tmp_path)
    faults = {10: 100.0, 23: 1.0, 25: 10.0}  # the first comes before there is a median, the second is below the limit

    def section(steps: int) -> dict[str, Any]:
        return {"train": {"steps": steps, "spike_factor": 2.0}, "schedule": {"decay_steps": 26}, "checkpoint": {"save_every": 24}}

    run_distributed(run, 1, directory, section(24), faults)
    lines, error = run_distributed(run, 1, directory, section(26), faults)[0]
    assert not error
    assert [line["step"] for line in lines if "fault" in line] == [25]
    assert "is above its limit of" in lines[24]["fault"] and lines[24]["decision"] == "skip" and lines[24]["loss"] > 10
    (tmp_path / "unbroken").mkdir()
    unbroken, _ = run_distributed(run, 1, directory_of(corpus, tmp_path / "unbroken"), section(26), faults)[0]
    keys = ("step", "loss", "grad_norm", "fault", "decision", "skipped")
    assert [[line.get(key) for key in keys] for line in lines] == [[line.get(key) for key in keys] for line in unbroken]


def test_skipping_ends_after_a_while_and_stop_at_once(corpus: Path, tmp_path: Path) -> None:
    faults = dict.fromkeys(range(3, 30), math.nan)
    directory = directory_of(corpus, tmp_path)
    lines, error = run_distributed(run, 2, directory, {"checkpoint": {"save_every": 2}, "train": {"steps": 20}}, faults)[1]
    assert [line.get("decision") for line in lines] == [None] * 2 + ["skip"] * (MAX_SKIPPED - 1) + ["stop"]
    assert f"{MAX_SKIPPED} bad steps in a row" in error and "step_000000" in error
    (tmp_path / "stop").mkdir()
    overrides = {"train": {"steps": 20, "on_bad_step": "stop"}}
    lines, error = run_distributed(run, 1, directory_of(corpus, tmp_path / "stop"), overrides, faults)[0]
    assert [line.get("decision") for line in lines] == [None, None, "stop"]
    assert error.startswith("step 3: the loss is nan") and "nothing was saved" in error


def run_with_a_corrupted_layer_norm(directory: str, sections: dict[str, dict[str, Any]], step: int) -> str:
    """A training run in which the last rank's first LayerNorm changes after a step; the error that ended it."""
    from pangu.training import run

    intact, steps = TrainingEngine.train_step, itertools.count(1)

    def corrupting(engine: TrainingEngine, *args: Any) -> StepResult:
        result = intact(engine, *args)
        if next(steps) == step and world_rank() == world_size() - 1:
            next(p for spec, p in canonical_parameters(engine.module) if spec.name.endswith("ln_1.weight")).detach()[3] -= 1e-3
        return result

    TrainingEngine.train_step = corrupting  # type: ignore[method-assign]
    outlive_a_refusal()
    with pytest.raises(InputError) as refused:
        config = small_config(data={"train": [f"{directory}/corpus"]}, run={"dir": f"{directory}/run"}, **sections)
        run.run_training(config, resolve(config, int(os.environ["WORLD_SIZE"])))
    return str(refused.value)


def test_a_corrupted_replica_pushes_out_no_checkpoint(corpus: Path, tmp_path: Path) -> None:
    sections = {"parallel": {"tensor": 2}, "checkpoint": {"save_every": 2, "keep": 1, "async_save": True}}
    messages = run_distributed(run_with_a_corrupted_layer_norm, 2, directory_of(corpus, tmp_path), sections, 4)
    expected = "replicas differ at step 4: transformer.h.0.ln_1.weight: rank 1 differs from rank 0 (largest difference 1.0e-03)."
    assert all(message.startswith(expected) for message in messages)
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").glob("step_*"))] == ["step_00000002"]
