"""The small and the original's model as directories that transformers loads with the code that travels with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.small_model import VOCAB
from megatron_ext.sharding import canonical_parameters
from pangu.conversion import huggingface
from pangu.conversion.weights import Weights, WriteOptions
from pangu.model.model import PanguModel
from pangu.tensor_files.lazy_tensor import LazyTensor

IMPLEMENTATIONS = ["sdpa", "eager"]
TOLERANCE = 5e-5


def export(path: Path, model: PanguModel, *, tokenizer: Path | None = None, dtype: torch.dtype | None = None) -> Path:
    """Write a model of ours as a directory of weights; returns the directory."""
    tensors = {
        spec.name: LazyTensor(spec.shape, torch.float32, lambda parameter=parameter: parameter.detach())
        for spec, parameter in canonical_parameters(model)
    }
    huggingface.write(Weights(model.config, tensors, "a test", tokenizer=tokenizer), path, WriteOptions(dtype))
    return path


def load(path: Path, implementation: str = "sdpa", **arguments: Any) -> Any:
    """The model in a directory, as a user of transformers loads it, ready to be evaluated."""
    import transformers

    arguments = {"trust_remote_code": True, "attn_implementation": implementation, **arguments}
    return transformers.AutoModelForCausalLM.from_pretrained(path, **arguments).eval()


def tokens_of(seed: int, *shape: int) -> Tensor:
    """Ids without separator and padding."""
    return torch.randint(10, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def changed(small: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], **config: Any) -> Path:
    """A copy of the small model in one file with other tensors."""
    path = tmp_path / "changed"
    shutil.copytree(small, path)
    (path / huggingface.INDEX).unlink()
    [file] = path.glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    change(tensors)
    save_file(tensors, path / huggingface.SINGLE, metadata={"format": "pt"})
    values = json.loads((path / huggingface.CONFIG).read_text())
    (path / huggingface.CONFIG).write_text(json.dumps({**values, **config}))
    return path
