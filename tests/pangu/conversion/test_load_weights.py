"""Weights of any format straight into a model, whole or split over tensor-parallel ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.golden import golden_model
from helpers.harness import run_distributed
from helpers.small_model import VOCAB, WINDOW, small_config, small_model

from megatron_ext.context import ParallelContext
from megatron_ext.sharding import canonical_parameters
from megatron_ext.supervision import rendezvous
from megatron_ext.topology import Groups, Topology
from pangu.conversion import load_weights
from pangu.conversion.convert import convert
from pangu.conversion.formats import FORMATS
from pangu.conversion.weights import Overrides, Weights, WriteOptions
from pangu.errors import InputError
from pangu.model.model import PanguModel, gather_logits
from pangu.tensor_files.lazy_tensor import LazyTensor

ALONE = Topology(tensor=1, pipeline=1, data=1)
HEADS = Overrides(num_heads=4)
TOKENS = torch.arange(2 * WINDOW).view(2, WINDOW) % VOCAB
POSITIONS = torch.arange(WINDOW).expand(2, -1)


def logits_of_a_rank(path: str, tensor: int) -> torch.Tensor:
    rendezvous.initialize(60)
    topology = Topology(tensor=tensor, pipeline=1, data=1)
    group = Groups.create(topology).tensor
    model = PanguModel(small_config(), ParallelContext(tensor=group)).eval()
    load_weights(path, model, topology, HEADS)
    with torch.no_grad():
        return gather_logits(model.logits(TOKENS, POSITIONS), vocab_size=VOCAB, group=group)


@pytest.mark.parametrize("form", [name for name, known in FORMATS.items() if known.write])
def test_each_rank_gets_its_slice(form: str, tmp_path: Path) -> None:
    """The vocabulary does not divide: the last rank's slice is padded."""
    original = small_model()
    tensors = {spec.name: LazyTensor(spec.shape, torch.float32, parameter.detach) for spec, parameter in canonical_parameters(original)}
    convert(Weights(original.config, tensors, "made here"), form, tmp_path / "weights", WriteOptions(tensor_parallel=2))
    with torch.no_grad():
        expected = original.logits(TOKENS, POSITIONS)
    for tensor in (1, 4):
        for found in run_distributed(logits_of_a_rank, tensor, str(tmp_path / "weights"), tensor):
            assert (found - expected).abs().max() < 5e-5


def test_the_parameters_keep_their_type(shared: Path) -> None:
    expected = golden_model(shared)
    model = PanguModel(expected.config, ParallelContext(dtype=torch.bfloat16))
    load_weights(shared / "oracle/A/pangu_tiny.ckpt", model, ALONE, HEADS)
    for (_, found), (spec, original) in zip(canonical_parameters(model), canonical_parameters(expected), strict=True):
        assert found.dtype == torch.bfloat16 and torch.equal(found, original.to(torch.bfloat16)), spec.name


def test_weights_of_another_model_are_refused(shared: Path) -> None:
    with pytest.raises(InputError, match=r"its hidden_size is 64, but model\.hidden_size = 32"):
        load_weights(shared / "oracle/A/pangu_tiny.ckpt", PanguModel(small_config(), ParallelContext()), ALONE, HEADS)
