"""The closed form against the modules of the real model, built without memory."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch

from megatron_ext.context import ParallelContext
from megatron_ext.sharding import canonical_parameters
from megatron_ext.topology import Groups, Topology
from pangu.config import ModelConfig
from pangu.config.presets import MODEL_PRESETS
from pangu.config.sizes import RankParameters, rank_parameters, stage_parameters
from pangu.config.stages import balanced_layers, stage_bounds
from pangu.engine.pipeline import pipeline_layers
from pangu.model.block import RunOptions
from pangu.model.model import PanguModel


def build(config: ModelConfig, tensor: int, layers: tuple[int, ...]) -> list[RankParameters]:
    group = Groups.from_topology(Topology(tensor=tensor, pipeline=1, data=1), 0).tensor
    context = ParallelContext(tensor=group, device=torch.device("meta"))
    if len(layers) == 1:
        stages = [torch.nn.ModuleList([PanguModel(config, context)])]
    else:
        specs, bounds = pipeline_layers(config, context, RunOptions()), stage_bounds(config, layers)
        stages = [torch.nn.ModuleList([spec.build() for spec in specs[begin:end]]) for begin, end in itertools.pairwise(bounds)]
    found = []
    for stage in stages:
        sizes = [(len(spec.shape), parameter.numel()) for spec, parameter in canonical_parameters(stage)]
        found.append(RankParameters(tuple(n for dims, n in sizes if dims > 1), tuple(n for dims, n in sizes if dims == 1)))
    return found


@pytest.mark.parametrize("final_norm", ["before_query", "after_query"])
@pytest.mark.parametrize("preset", MODEL_PRESETS)
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (8, 1), (2, 2), (8, 4), (1, 16)])
def test_presets(preset: str, tensor: int, pipeline: int, final_norm: str) -> None:
    config = ModelConfig(preset=preset, final_norm=final_norm)  # type: ignore[call-arg, arg-type]
    layers = balanced_layers(config, pipeline)
    assert sort(stage_parameters(config, tensor, layers)) == sort(build(config, tensor, layers))


@pytest.mark.parametrize("final_norm", ["before_query", "after_query"])
@pytest.mark.parametrize(("tensor", "layers"), [(1, (7,)), (4, (7,)), (4, (1, 6)), (4, (6, 1)), (2, (1, 3, 2, 1)), (4, (1,) * 7)])
def test_padding_and_uneven_stages(tensor: int, layers: tuple[int, ...], final_norm: Any) -> None:
    config = ModelConfig(
        num_layers=7, hidden_size=64, num_heads=4, ffn_hidden_size=200, vocab_size=1001, max_positions=48, final_norm=final_norm
    )
    assert stage_parameters(config, tensor, layers)[0].matrices[0] == -(-1001 // tensor) * 64
    assert sort(stage_parameters(config, tensor, layers)) == sort(build(config, tensor, layers))


def test_the_order_is_the_models() -> None:
    """ZeRO-2 cuts a buffer of all parameters, so that their order decides which lie on two ranks; without a pipeline all are equal."""
    config = ModelConfig(num_layers=3, hidden_size=64, num_heads=4, ffn_hidden_size=200, vocab_size=1001, max_positions=48)
    assert stage_parameters(config, 2, (3,)) == build(config, 2, (3,))


def sort(stages: list[RankParameters]) -> list[tuple[list[int], list[int]]]:
    return [(sorted(stage.matrices), sorted(stage.vectors)) for stage in stages]


def test_a_search_can_afford_it() -> None:
    config = ModelConfig(preset="200B")  # type: ignore[call-arg]
    rank_parameters(config, 8, 4, first=False, last=False)
    began = time.perf_counter()
    for _ in range(1000):
        rank_parameters(config, 8, 4, first=False, last=False)
    assert time.perf_counter() - began < 0.5  # 5 ms here; a build takes a second
