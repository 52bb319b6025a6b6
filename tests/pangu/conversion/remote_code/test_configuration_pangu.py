"""The configuration that travels with the weights: what it refuses."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.in_transformers import changed, load

from pangu.conversion import huggingface

pytest.importorskip("transformers")


def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    runpy.run_path(str(huggingface.REMOTE_CODE / "configuration_pangu.py"))
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.3.0")  # it replaces its own module while it loads a model
    with pytest.raises(ImportError, match=r"transformers 5\.3\.0 found, 5\.4 or newer expected"):
        runpy.run_path(str(huggingface.REMOTE_CODE / "configuration_pangu.py"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"activation_function": "relu"}, "activation_function = 'relu'"),
        ({"final_norm": "nowhere"}, "final_norm = 'nowhere'"),
        ({"num_heads": 5}, "num_heads = 5"),
        ({"num_layers": 1}, "num_layers = 1"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(change: dict[str, Any], told: str, small: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        load(changed(small, tmp_path, lambda tensors: None, **change))
