"""Where the stages of a pipeline are cut."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest

from pangu.config import ModelConfig
from pangu.model.pipeline import balance, layer_costs, stage_bounds
from pangu.presets import num_parameters


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
    bounds = stage_bounds(ModelConfig(preset="200B"), 16)  # type: ignore[call-arg]
    # Before the blocks come the word and position embeddings, after the query layer the final norm and the logits.
    assert bounds == [0, *(2 + 4 * stage for stage in range(1, 16)), 68]


def test_a_large_vocabulary_counts_like_layers() -> None:
    config = ModelConfig(num_layers=8, hidden_size=64, num_heads=4, vocab_size=12 * 64 * 3)  # the table weighs three blocks
    bounds = stage_bounds(config, 4)
    stages = [end - begin for begin, end in pairwise(bounds)]
    assert stages[0] < stages[1] and stages[-1] < stages[-2] + 2
    costs = layer_costs(config)
    assert max(sum(costs[begin:end]) for begin, end in pairwise(bounds)) < 1.35 * sum(costs) / 4


def test_costs_are_the_layers_parameters() -> None:
    config = ModelConfig(num_layers=5, hidden_size=64, num_heads=4, vocab_size=300, ffn_hidden_size=100)
    assert sum(layer_costs(config)) == num_parameters(config) + 300 * 64  # the tied table stands at both ends
