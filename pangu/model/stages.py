"""Which layers each stage of a pipeline holds.

A cut is written as the transformer layers of each stage, the query layer included. The embeddings always belong to the first stage and the
logits to the last; the final LayerNorm goes with what reads it: the query layer, or the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

from pangu.config import Config, ModelConfig


def stage_layers(config: Config) -> tuple[int, ...]:
    """Layers of each stage of a run: what `parallel.stage_layers` says, or the balanced cut."""
    return tuple(config.parallel.stage_layers or balanced_layers(config.model, config.parallel.pipeline))


@lru_cache(maxsize=1024)
def balanced_layers(config: ModelConfig, num_stages: int) -> tuple[int, ...]:
    """The cut whose heaviest stage is as light as can be."""
    if num_stages == 1:
        return (config.num_layers,)
    bounds = balance(unit_costs(config), num_stages)
    # The first unit, the embeddings, and the last, the logits, are no layers.
    inner = [min(max(bound - 1, 0), config.num_layers) for bound in bounds]
    return tuple(end - begin for begin, end in pairwise(inner))


def unit_costs(config: ModelConfig) -> list[int]:
    """What each part that is never cut weighs when stages are balanced: embeddings, each layer, logits. The weight is its parameters.

    A layer's time, memory and optimizer step go with its parameters; so do those of the logits, and the embedding's memory and step.
    """
    h, f = config.hidden_size, config.ffn_hidden_size
    words, positions, layer, norm = config.vocab_size * h, config.max_positions * h, 4 * h * h + 2 * h * f + 9 * h + f, 2 * h
    top = [layer + positions + norm, words] if config.final_norm == "before_query" else [layer + positions, norm + words]
    return [words + positions, *[layer] * (config.num_layers - 1), *top]


def stage_bounds(config: ModelConfig, layers: Sequence[int]) -> list[int]:
    """Stage s holds `pipeline_layers[bounds[s]:bounds[s + 1]]` (pangu.model.pipeline).

    Args:
        config: the model.
        layers: transformer layers of each stage.
    """
    # Word and position embeddings come before the layers; before the query layer may come the final LayerNorm, and go to its stage.
    with_norm = 1 if config.final_norm == "before_query" else 0
    ends = [2 + done + (with_norm if done == config.num_layers else 0) for done in accumulate(layers)]
    return [0, *ends[:-1], config.num_layers + 4]


def balance(costs: Sequence[int], num_parts: int) -> list[int]:
    """Bounds that cut `costs` into consecutive non-empty parts with the least maximum; among those, with evenly filled parts."""
    prefix = [0, *accumulate(costs)]
    # best[end]: (maximum, sum of squares, bounds) of the best cut of costs[:end] into the parts so far.
    best: dict[int, tuple[int, int, list[int]]] = {0: (0, 0, [0])}
    for part in range(1, num_parts + 1):
        longest = len(costs) - (num_parts - part)
        best = {
            end: min(
                (max(worst, prefix[end] - prefix[begin]), squares + (prefix[end] - prefix[begin]) ** 2, [*bounds, end])
                for begin, (worst, squares, bounds) in best.items()
                if begin < end
            )
            for end in range(part, longest + 1)
        }
    return best[len(costs)][2]
