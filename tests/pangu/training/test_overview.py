"""What a dry run says of each stage: parameters that add up to the model's, and stages that are the ones DeepSpeed builds."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, get_args

import pytest
from helpers.harness import run_distributed
from helpers.layouts import small_config, start
from rich.console import Console

from megatron_ext.sharding import canonical_parameters
from megatron_ext.topology import Order, Topology
from pangu.config import Config
from pangu.config.layout import resolve
from pangu.config.presets import MODEL_PRESETS
from pangu.config.sizes import flops_per_token, num_parameters
from pangu.model.block import Block
from pangu.training.overview import print_report, rank_map, stage_reports

ROOT = Path(__file__).parents[3]


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


def report(config: Config, world_size: int) -> str:
    out = io.StringIO()
    print_report(config, resolve(config, world_size), Console(file=out, soft_wrap=True))
    return out.getvalue()


def test_the_printed_report_shows_layout_and_stages() -> None:
    config = small_config(parallel={"tensor": 2, "pipeline": 2})
    text = report(config, 4)
    assert f"parameters: {num_parameters(config.model):,} in all; 4 layers, hidden 32, 4 heads, fp32\n" in text
    assert "layout: 4 processes = tensor 2 x pipeline 2 x data 1, ZeRO-1\n" in text
    assert "batch: 8 samples of 16 tokens = 4 micro-batches of 2 x data 1\n" in text
    assert "recompute none\n" in text
    rows = [line.split() for line in text.splitlines()[-2:]]
    for stage, (row, expected) in enumerate(zip(rows, stage_reports(config, resolve(config, 4)), strict=True)):
        memory, states = expected.memory, expected.memory.states
        assert row[:3] == [str(stage), str(expected.layers), f"{expected.parameters:,}"]
        kinds = (states.weights, states.gradients, states.optimizer, states.buffers, memory.activations + memory.recomputed)
        *in_mib, total = [value / 2**20 for value in (*kinds, memory.logits, memory.peak, memory.total)]
        assert [float(cell) for cell in row[3:-1]] == pytest.approx(in_mib, abs=0.00501)
        assert float(row[-1]) == pytest.approx(total, abs=0.501)


@pytest.mark.parametrize("order", get_args(Order))
@pytest.mark.parametrize("preset", MODEL_PRESETS)
@pytest.mark.parametrize(
    ("tensor", "pipeline", "data"), [(1, 1, 1), (1, 1, 64), (8, 1, 128), (8, 16, 16), (8, 4, 4), (1, 16, 4), (8, 16, 640)]
)
def test_a_report_is_80_columns_wide(preset: str, tensor: int, pipeline: int, data: int, order: str) -> None:
    config = large(preset, tensor=tensor, pipeline=pipeline, order=order)
    config = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": 64 * data})})
    assert max(map(len, report(config, tensor * pipeline * data).splitlines())) <= 80


def test_what_is_offloaded_is_said() -> None:
    offloaded = small_config().model_copy(update={"deepspeed": ROOT / "ds_configs/zero1-offload.json"})
    assert "in host memory: " in report(offloaded, 1) and "in host memory: " not in report(small_config(), 1)


def cells(drawn: str) -> dict[tuple[int, int], range]:
    """(stage, replica) -> ranks, read from a rank map."""
    _, heading, *lines = drawn.splitlines()
    replicas = heading.replace("data ", "").split()
    found = {}
    for name, line in ((line.split()[1], line.split()[2:]) for line in lines if line.startswith("stage")):
        for replica, cell in zip(replicas, line, strict=True):
            if replica != "...":
                first, _, last = cell.partition("-")
                found[int(name), int(replica)] = range(int(first), int(last or first) + 1)
    return found


@pytest.mark.parametrize("order", get_args(Order))
@pytest.mark.parametrize(("tensor", "pipeline", "data"), [(1, 1, 2), (2, 2, 2), (4, 3, 2), (1, 4, 1), (8, 16, 16), (2, 3, 500)])
def test_the_rank_map_is_the_topologys(tensor: int, pipeline: int, data: int, order: Order) -> None:
    topology = Topology(tensor, pipeline, data, order)
    drawn = rank_map(topology)
    found = cells(drawn)
    for (stage, replica), ranks in found.items():
        assert [topology.coordinates(rank) for rank in ranks] == [(stage, replica, number) for number in range(tensor)]
    assert {(0, 0), (pipeline - 1, data - 1)} <= found.keys()  # the corners are there even where the middle is left out
    assert ("..." in drawn) == (len(found) < pipeline * data)
    if pipeline * data <= 16:
        assert len(found) == pipeline * data


@pytest.mark.parametrize("order", get_args(Order))
def test_the_documented_rank_maps_are_those_that_are_drawn(order: Order) -> None:
    page = (ROOT / "docs/parallelism.md").read_text(encoding="utf-8")
    assert f"```text\n{rank_map(Topology(2, 2, 2, order))}\n```" in page


def test_flops_of_a_token() -> None:
    """Of 2.6B: 6 a parameter outside the position tables, and 12·L·H·S of attention, done by hand."""
    config = large("2.6B")
    assert flops_per_token(config.model, config.train.sequence_length) == 6 * (2_625_295_360 - 2 * 1024 * 2560) + 12 * 32 * 2560 * 1024
