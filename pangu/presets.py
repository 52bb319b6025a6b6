"""The published model sizes (arXiv 2104.12369, Table 1; the 350M model scored the training data, section 3).

`num_layers` counts as the paper does: the query layer is one of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pangu.config import ModelConfig

Preset = Literal["350M", "2.6B", "13B", "200B"]

MODEL_PRESETS: dict[Preset, dict[str, int | str]] = {
    "350M": {"num_layers": 24, "hidden_size": 1024, "num_heads": 16},
    "2.6B": {"num_layers": 32, "hidden_size": 2560, "num_heads": 32},
    "13B": {"num_layers": 40, "hidden_size": 5120, "num_heads": 40},
    # The released code normalises before the query layer in the smaller models and after it in this one.
    "200B": {"num_layers": 64, "hidden_size": 16384, "num_heads": 128, "final_norm": "after_query"},
}
"""The values of the `model` section that each preset stands for; the other keys have the same default in every size."""


def num_parameters(model: ModelConfig) -> int:
    """Exact number of trainable parameters, the output tied to the word embedding and the vocabulary without padding.

    With ffn = 4h a layer has 12h² + 13h, and the model V·h + 2·P·h + L·(12h² + 13h) + 2h: word embedding, position and query embeddings,
    layers, final LayerNorm.
    """
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    attention = 4 * hidden * hidden + 4 * hidden
    mlp = 2 * hidden * ffn + ffn + hidden
    layer_norms = 4 * hidden
    embeddings = (model.vocab_size + 2 * model.max_positions) * hidden
    return embeddings + model.num_layers * (attention + mlp + layer_norms) + 2 * hidden
