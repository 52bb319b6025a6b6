"""What all tests of the remote code share: transformers away from the net and from this project, and two directories to load."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.golden import golden_model
from helpers.in_transformers import IMPLEMENTATIONS, export, load
from helpers.small_model import small_model


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers offline, its copies of our modules in a temporary directory, and this project out of their reach."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr(sys, "path", [*sys.path])
        for name in ("pangu", "megatron_ext"):  # `import pangu` fails from here on
            patch.setitem(sys.modules, name, None)
        yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]  # they came from the directory of this file's tests


@pytest.fixture(scope="module")
def golden(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original's tiny model, in a directory with a dot in its name, as a size has."""
    return export(tmp_path_factory.mktemp("golden") / "golden-0.2M", golden_model(shared), tokenizer=shared / "tokenizer" / "vocab.model")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose next token depends on every parameter."""
    return export(tmp_path_factory.mktemp("small") / "small", small_model())


@pytest.fixture(params=IMPLEMENTATIONS)
def model(request: pytest.FixtureRequest, small: Path) -> Any:
    return load(small, request.param)
