"""A small model all of whose parameters matter, and a tokenizer whose text is its ids, for tests of generation and scoring."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.context import ParallelContext, ParamInit
from megatron_ext.initialize import random_weights
from megatron_ext.sharding import Init, ShardSpec, canonical_parameters
from megatron_ext.topology import SINGLE, Group, Groups, Topology
from pangu.config import ModelConfig
from pangu.conversion.export import write_weights
from pangu.model.model import PanguModel

# Divides by neither 2 nor 4, and the model has 11 ids that the tokenizer lacks.
VOCAB, TOKENIZER_VOCAB, WINDOW = 101, 90, 24


def sharp_weights(seed: int) -> ParamInit:
    """Every parameter normal and so large that the next token depends on all of them, on the position most of all: no text repeats."""

    def fill(local: Tensor, spec: ShardSpec, rank: int, size: int) -> None:
        if len(spec.shape) == 1:
            deviation = 0.1
        elif ".h." in spec.name:
            deviation = spec.shape[1] ** -0.5
        else:
            deviation = 0.5 if "wte" in spec.name else 2.0
        random_weights(seed)(local, replace(spec, init=Init("normal", deviation)), rank, size)
        if ".ln_" in spec.name and spec.name.endswith("weight"):
            local.add_(1.0)

    return fill


def small_config(**changes: Any) -> ModelConfig:
    """Two layers and a query layer."""
    sizes = {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "vocab_size": VOCAB, "max_positions": WINDOW}
    return ModelConfig(**{**sizes, **changes})


def small_model(group: Group = SINGLE, **changes: Any) -> PanguModel:
    """The small model, or a rank's slice of it."""
    return PanguModel(small_config(**changes), ParallelContext(tensor=group, fill=sharp_weights(3))).eval()


def write_model(path: Path, tokenizer: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
    """Write the small model as a weights directory."""
    model = small_model(**changes).to(dtype)
    parameters = ((spec, partial(nullcontext, parameter)) for spec, parameter in canonical_parameters(model))
    groups = Groups.from_topology(Topology(tensor=1, pipeline=1, data=1), 0)
    write_weights(path, model.config, groups, parameters, tokenizer=tokenizer)


class NumberTokenizer:
    """ "3 14 15" is [3, 14, 15]."""

    path = Path("numbers")
    vocab_size = TOKENIZER_VOCAB
    unk_id = 0

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, ids))
