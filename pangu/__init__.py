"""PanGu-α in PyTorch. What a notebook needs is offered here by name and imported when it is used:

from pangu import TextGenerator, PanguTokenizer, load_weights
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pangu.conversion import load_weights
    from pangu.inference.generation import TextGenerator
    from pangu.text.tokenizer import PanguTokenizer

__version__ = "0.1.0"
__all__ = ["PanguTokenizer", "TextGenerator", "__version__", "load_weights"]

_HOME = {
    "TextGenerator": "pangu.inference.generation",
    "PanguTokenizer": "pangu.text.tokenizer",
    "load_weights": "pangu.conversion",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'pangu' has no attribute {name!r}")
