"""The published model sizes (arXiv 2104.12369, Table 1; the 350M model was used to score the training data, section 3).

`num_layers` includes the query layer, as in the paper.
"""

from __future__ import annotations

from typing import Literal

Preset = Literal["350M", "2.6B", "13B", "200B"]

MODEL_PRESETS: dict[Preset, dict[str, int | str]] = {
    "350M": {"num_layers": 24, "hidden_size": 1024, "num_heads": 16},
    "2.6B": {"num_layers": 32, "hidden_size": 2560, "num_heads": 32},
    "13B": {"num_layers": 40, "hidden_size": 5120, "num_heads": 40},
    # The released code normalises before the query layer in the smaller models and after it in this one.
    "200B": {"num_layers": 64, "hidden_size": 16384, "num_heads": 128, "final_norm": "after_query"},
}
"""The values of the `model` section that each preset stands for; the other keys have the same default in every size."""
