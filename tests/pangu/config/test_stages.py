"""Where the stages of a pipeline are cut."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest

from pangu.config import ModelConfig
from pangu.config.presets import MODEL_PRESETS, Preset
from pangu.config.sizes import layer_costs, num_parameters
from pangu.config.stages import balance, balanced_layers, stage_bounds


@pytest.mark.parametrize("seed", range(20))
def test_the_heaviest_part_is_as_light_as_any_cut_allows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = [int(cost) for cost in rng.integers(1, 20, rng.integers(4, 10))]
    parts = int(rng.integers(1, len(costs) + 1))

    def heaviest(bounds: tuple[int, ...]) -> int:
        return max(sum(costs[begin:end]) for begin, end in pairwise(bounds))

    best = min(heaviest((0, *cuts, len(costs))) for cuts in combinations(range(1, len(costs)), parts - 1))
    bounds = balance(costs, parts)
    assert len(bounds) == parts + 1 and all(begin < end for begin, end in pairwise(bounds))
    assert heaviest(tuple(bounds)) == best


def test_the_200b_plan_has_four_layers_a_stage() -> None:
    config = ModelConfig(preset="200B")  # type: ignore[call-arg]
    assert balanced_layers(config, 16) == (4,) * 16
    # Before the blocks come the word and position embeddings, after the query layer the final norm and the logits.
    assert stage_bounds(config, (4,) * 16) == [0, *(2 + 4 * stage for stage in range(1, 16)), 68]


def test_one_stage_has_all() -> None:
    config = ModelConfig(num_layers=3, hidden_size=64, num_heads=4)
    assert balanced_layers(config, 1) == (3,)
    assert stage_bounds(config, (3,)) == [0, 7]


@pytest.mark.parametrize("preset", MODEL_PRESETS)
def test_no_stage_is_without_a_layer(preset: Preset) -> None:
    config = ModelConfig(preset=preset)  # type: ignore[call-arg]
    for stages in range(1, config.num_layers + 1):
        layers = balanced_layers(config, stages)
        assert len(layers) == stages and sum(layers) == config.num_layers and min(layers) >= 1


def test_a_large_vocabulary_counts_like_layers() -> None:
    config = ModelConfig(num_layers=8, hidden_size=64, num_heads=4, vocab_size=12 * 64 * 3)  # the table weighs three blocks
    layers = balanced_layers(config, 4)
    assert sum(layers) == 8
    assert layers[0] < layers[1] and layers[-1] < layers[-2]


def test_costs_are_the_layers_parameters() -> None:
    config = ModelConfig(num_layers=5, hidden_size=64, num_heads=4, vocab_size=300, ffn_hidden_size=100)
    assert sum(layer_costs(config)) == num_parameters(config) + 300 * 64  # the tied table stands at both ends
