"""Recomputing with dropout changes no bit of the loss or of any gradient, in the order that pipelines run; and the test would notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.harness import run_distributed
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_ext.context import ParallelContext
from megatron_ext.initialize import random_weights
from megatron_ext.random import RngStreams
from megatron_ext.recompute import recompute
from megatron_ext.sharding import canonical_parameters
from megatron_ext.supervision import rendezvous
from megatron_ext.topology import SINGLE, Coordinates, Group, Groups, Topology
from pangu.config import ModelConfig
from pangu.model import block
from pangu.model.block import RunOptions
from pangu.model.model import PanguModel

SEQUENCE = 8


def run(mode: str, group: Group, *, sequence_parallel: bool, dropout: float = 0.1, attention: str = "sdpa") -> dict[str, Tensor]:
    """Losses, gradients and final streams of two micro-batches whose forwards both come before their backwards (1F1B)."""
    config = ModelConfig(
        num_layers=3,
        hidden_size=16,
        num_heads=4,
        vocab_size=20,
        max_positions=SEQUENCE,
        hidden_dropout=dropout,
        attention_dropout=dropout,
        attention=attention,
    )
    rng = RngStreams(3, Coordinates(0, 0, group.rank))
    context = ParallelContext(tensor=group, sequence_parallel=sequence_parallel, fill=random_weights(3), rng=rng)
    model = PanguModel(config, context, RunOptions(recompute=mode, reset_at_document=True)).train()
    positions = torch.arange(SEQUENCE).repeat(2, 1) % 5
    losses = []
    for number in range(2):
        ids = torch.randint(20, (2, SEQUENCE + 1), generator=torch.Generator().manual_seed(number))
        losses.append(model(ids[:, :-1], positions, ids[:, 1:], torch.ones(2, SEQUENCE)))
    for loss in losses:
        loss.backward()
    gradients = {spec.name: parameter.grad for spec, parameter in canonical_parameters(model)}
    return {"loss 0": losses[0].detach(), "loss 1": losses[1].detach(), **gradients, **rng.state_dict()}


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def naive(function: Callable[..., Tensor], *args: object, rng: RngStreams) -> Tensor:
    """torch's checkpoint alone, which restores the default stream but knows no other."""
    return checkpoint(function, *args, use_reentrant=False)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_recompute_changes_no_bit(mode: str, attention: str) -> None:
    expected = run("none", SINGLE, sequence_parallel=False, attention=attention)
    assert differing(run(mode, SINGLE, sequence_parallel=False, attention=attention), expected) == []
    assert "loss 0" in differing(run(mode, SINGLE, sequence_parallel=False, attention=attention, dropout=0.0), expected)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_forgetting_the_tensor_parallel_stream_would_show(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run("none", SINGLE, sequence_parallel=False)
    monkeypatch.setattr(block, "recompute", naive)
    wrong = differing(run(mode, SINGLE, sequence_parallel=False), expected)
    assert "transformer.h.0.attn.q_proj.weight" in wrong
    assert "loss 0" not in wrong and "loss 1" not in wrong  # the error would be a silent one


def two_ranks() -> dict[str, list[str]]:
    rendezvous.initialize(60)
    group = Groups.create(Topology(tensor=2, pipeline=1, data=1)).tensor
    found = {}
    for sequence_parallel in (False, True):
        expected = run("none", group, sequence_parallel=sequence_parallel)
        for mode in ("selective", "full"):
            found[f"{mode} {sequence_parallel}"] = differing(run(mode, group, sequence_parallel=sequence_parallel), expected)
    block.recompute = naive
    found["naive"] = differing(run("full", group, sequence_parallel=True), expected)
    return found


def test_recompute_changes_no_bit_on_two_ranks() -> None:
    for found in run_distributed(two_ranks, 2):
        # Under sequence parallelism the dropout of the residual stream draws from the tensor-parallel stream too.
        assert {"transformer.wte.weight", "transformer.h.0.mlp.c_proj.bias"} <= set(found.pop("naive"))
        assert found == {f"{mode} {sequence}": [] for mode in ("selective", "full") for sequence in (False, True)}


def activations_kept(function: Callable[[], Any]) -> int:
    """Elements that autograd keeps for the backward pass of what `function` computes."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = function()
    assert result.requires_grad
    return sum(kept.values())


def test_only_the_arguments_are_kept() -> None:
    rng = RngStreams(3, Coordinates(0, 0, 0))
    x = torch.randn(10, 10, requires_grad=True)

    def long_chain(x: Tensor) -> Tensor:
        for _ in range(20):
            x = rng.dropout(x.tanh(), 0.5, training=True, split=True)
        return x

    assert activations_kept(lambda: long_chain(x)) > 20 * 100
    assert activations_kept(lambda: recompute(long_chain, x, rng=rng)) <= 100
