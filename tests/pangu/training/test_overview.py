"""What a dry run says of each stage: parameters that add up to the model's, and stages that are the ones DeepSpeed builds."""

from __future__ import annotations

import io
from typing import Any

import pytest
from helpers.harness import run_distributed
from helpers.layouts import small_config, start
from rich.console import Console

from megatron_ext.sharding import canonical_parameters
from pangu.config import Config
from pangu.config.layout import resolve
from pangu.config.presets import MODEL_PRESETS
from pangu.config.sizes import flops_per_token, num_parameters
from pangu.model.block import Block
from pangu.training.overview import print_report, stage_reports


def large(preset: str, **parallel: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"preset": preset},
            "parallel": parallel,
            "train": {"micro_batch_size": 1, "global_batch_size": 64, "steps": 10},
            "data": {"train": "unused"},
            "run": {"dir": "unused"},
        }
    )


@pytest.mark.parametrize("preset", MODEL_PRESETS)
@pytest.mark.parametrize(("tensor", "pipeline"), [(8, 4), (8, 1), (1, 1), (1, 8)])
def test_ranks_hold_the_model_between_them(preset: str, tensor: int, pipeline: int) -> None:
    """Slices add up; what every tensor rank holds whole, and the tied table of the last stage, are counted off again."""
    config = large(preset, tensor=tensor, pipeline=pipeline)
    model = config.model
    reports = stage_reports(config, resolve(config, tensor * pipeline))
    assert len(reports) == pipeline
    assert sum(report.layers for report in reports) == model.num_layers
    h = model.hidden_size
    # In each layer two LayerNorms and the biases of the two row-parallel layers; position and query tables; the final LayerNorm.
    replicated = model.num_layers * (4 * h + 2 * h) + 2 * model.max_positions * h + 2 * h
    tied = model.vocab_size * h if pipeline > 1 else 0
    held = tensor * sum(report.parameters for report in reports)
    assert held - (tensor - 1) * replicated - tied == num_parameters(model)


def test_a_padded_vocabulary_counts_its_padding() -> None:
    config = small_config(parallel={"tensor": 4})
    (report,) = stage_reports(config, resolve(config, 4))
    h, layers, positions = 32, 4, 16
    matrices = layers * (12 * h * h + 7 * h) // 4  # query, key, value, c_fc with biases; both c_proj without
    assert report.parameters == 52 // 4 * h + matrices + layers * 6 * h + 2 * positions * h + 2 * h


@pytest.mark.parametrize("preset", MODEL_PRESETS)
def test_stages_are_balanced(preset: str) -> None:
    reports = stage_reports(config := large(preset, pipeline=4), resolve(config, 4))
    counts = [report.parameters for report in reports]
    a_block = num_parameters(config.model) / config.model.num_layers
    assert max(counts) - min(counts) < 1.5 * a_block
    assert min(report.layers for report in reports) >= 1


def build() -> list[tuple[int, int, int, list[str]]]:
    """(stage, layers, parameters, names) of what DeepSpeed really built on this rank, for one and the other place of the last norm."""
    found = []
    for final_norm in ("before_query", "after_query"):
        engine = start(stages(final_norm))
        parameters = list(canonical_parameters(engine.module))
        layers = sum(isinstance(module, Block) for module in engine.module.modules())
        counted = sum(parameter.numel() for _, parameter in parameters)
        found.append((engine.groups.coordinates.pipe, layers, counted, [spec.name for spec, _ in parameters]))
    return found


def stages(final_norm: str) -> Config:
    return small_config(model={"num_layers": 5, "final_norm": final_norm}, parallel={"tensor": 2, "pipeline": 2})


def test_stages_are_what_deepspeed_builds() -> None:
    built = run_distributed(build, 4)
    for number, final_norm in enumerate(("before_query", "after_query")):
        config = stages(final_norm)
        reports = stage_reports(config, resolve(config, 4))
        names: set[str] = set()
        for rank in range(4):
            stage, layers, parameters, held = built[rank][number]
            assert stage == rank // 2
            assert (reports[stage].layers, reports[stage].parameters) == (layers, parameters)
            names |= set(held)
        assert all("transformer.wte.weight" in held for *_, held in (ranks[number] for ranks in built))  # tied: both stages have it
        assert len(names) == 16 * 5 + 5  # every parameter of the model is somewhere


def test_the_printed_report_shows_configuration_layout_and_stages() -> None:
    config = small_config(parallel={"tensor": 2, "pipeline": 2})
    out = io.StringIO()
    print_report(config, layout := resolve(config, 4), Console(file=out, soft_wrap=True))
    text = out.getvalue()
    assert "num_layers: 4" in text and "global_batch_size: 8" in text
    assert "4 processes = tensor 2 x pipeline 2 x data 1, ZeRO-1, recompute none, 4 micro-batches of 2 a step" in text
    assert f"parameters: {num_parameters(config.model):,} in all" in text
    rows = [line.split() for line in text.splitlines()[-2:]]
    for stage, (row, report) in enumerate(zip(rows, stage_reports(config, layout), strict=True)):
        assert row[:3] == [str(stage), str(report.layers), f"{report.parameters:,}"]


def test_flops_of_a_token() -> None:
    """Of 2.6B: 6 a parameter outside the position tables, and 12·L·H·S of attention, done by hand."""
    config = large("2.6B")
    assert flops_per_token(config.model, config.train.sequence_length) == 6 * (2_625_295_360 - 2 * 1024 * 2560) + 12 * 32 * 2560 * 1024
