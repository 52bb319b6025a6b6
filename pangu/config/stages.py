"""Which layers each stage of a pipeline holds.

A cut is given as the number of transformer layers of each stage, the query layer included. The embeddings belong to the first stage, the
final LayerNorm, the query layer and the logits to the last. No stage is without a layer: DeepSpeed's gradient norm issues one collective
per group of parameters, and a stage with embedding tables only, to which weight decay applies, would have one group less than the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

from pangu.config.schema import ModelConfig
from pangu.config.sizes import layer_costs


@lru_cache(maxsize=1024)
def balanced_layers(config: ModelConfig, num_stages: int) -> tuple[int, ...]:
    """Transformer layers of each of `num_stages` stages, cut so that the most expensive stage is as cheap as possible."""
    return tuple(end - begin for begin, end in pairwise(balance(layer_costs(config), num_stages)))


def stage_bounds(config: ModelConfig, layers: Sequence[int]) -> list[int]:
    """Bounds of the stages that hold `layers`: stage s holds `pipeline_layers[bounds[s]:bounds[s + 1]]` (pangu.engine.pipeline)."""
    return [0, *(2 + done for done in list(accumulate(layers))[:-1]), config.num_layers + 4]


def balance(costs: Sequence[int], num_parts: int) -> list[int]:
    """Bounds that cut `costs` into consecutive non-empty parts with the smallest maximum; among those, the most even parts."""
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
