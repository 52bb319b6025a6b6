from typing import get_args

import pytest

from pangu.config import ModelConfig
from pangu.config.presets import MODEL_PRESETS, Preset
from pangu.config.sizes import num_parameters


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("350M", 345_368_576), ("2.6B", 2_625_295_360), ("13B", 12_800_870_400), ("200B", 206_861_008_896)],
)
def test_parameter_count_is_the_released_models(preset: str, parameters: int) -> None:
    assert num_parameters(ModelConfig(preset=preset)) == parameters


def test_parameter_count_follows_every_size() -> None:
    model = ModelConfig(num_layers=2, hidden_size=4, num_heads=2, ffn_hidden_size=6, vocab_size=20, max_positions=10)
    layer = 4 * (4 * 4 + 4) + (4 * 6 + 6) + (6 * 4 + 4) + 2 * (4 + 4)
    assert num_parameters(model) == 20 * 4 + 2 * 10 * 4 + 2 * layer + 2 * 4


def test_every_preset_has_a_name_users_can_give() -> None:
    assert set(MODEL_PRESETS) == set(get_args(Preset))
