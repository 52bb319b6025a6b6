"""The original's optimizer, from its own gradients to its own parameters, and the choice of an implementation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.golden import golden_model, mindspore_name
from torch import Tensor, nn
from torch.optim import AdamW

from megatron_ext.context import ParallelContext
from megatron_ext.layers import LayerNorm, RowParallelLinear
from megatron_ext.sharding import ZEROS, Init, ShardSpec, spec_of
from pangu.config import OptimizerConfig
from pangu.engine import optimizer
from pangu.engine.optimizer import PanguAdam, build_optimizer, decay_groups

TOLERANCE = 5e-6


def parameter(name: str, values: Tensor, whole_shape: tuple[int, ...] | None = None) -> nn.Parameter:
    made = nn.Parameter(values.clone())
    made.shard_spec = ShardSpec(name, whole_shape or tuple(values.shape), ZEROS)
    return made


@pytest.mark.parametrize("fused", [True, False])
def test_steps_equal_the_originals(shared: Path, fused: bool) -> None:
    """Learning rates, gradients and parameters of the original; the first rate is 0."""
    golden = np.load(shared / "oracle/A/optimizer_only.npz")
    settings = json.loads((shared / "oracle/A/train_clip1.json").read_text())
    rates = json.loads((shared / "oracle/A/lr_schedule.json").read_text())["tiny_warm2_dec10_cos"]["lr"]
    names = [key.removeprefix("step0/") for key in golden if key.startswith("step0/")]
    parameters = {name: parameter(name, torch.from_numpy(golden[f"step0/{name}"])) for name in names}
    groups = decay_groups(parameters.values(), settings["weight_decay"])
    assert [len(group["params"]) for group in groups] == [3, 2]
    adam = PanguAdam(groups, lr=1.0, betas=tuple(settings["betas"]), eps=settings["eps"], fused=fused)
    for step in range(1, 5):
        for group in adam.param_groups:
            group["lr"] = rates[step - 1]
        for name in names:
            parameters[name].grad = torch.from_numpy(golden[f"grad{step}/{name}"]).clone()
        adam.step()
        for name in names:
            expected = golden[f"step{step}/{name}"]
            assert np.abs(parameters[name].detach().numpy() - expected).max() < TOLERANCE, (step, name)
            assert step == 1 or np.abs(expected - golden[f"step{step - 1}/{name}"]).max() > 100 * TOLERANCE


def textbook(
    values: np.ndarray, gradients: list[np.ndarray], lr: float, betas: tuple[float, float], eps: float, decay: float
) -> np.ndarray:
    """PanguAdam's docstring, in float64."""
    p, m, v = values.astype(np.float64), 0.0, 0.0
    for gradient in gradients:
        m = betas[0] * m + (1 - betas[0]) * gradient
        v = betas[1] * v + (1 - betas[1]) * gradient**2
        p = p - lr * (m / (np.sqrt(v) + eps) + decay * p)
    return p


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.5, 0.9999)])
def test_steps_equal_the_formula(betas: tuple[float, float]) -> None:
    values = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    gradients = [torch.randn(40, 30, generator=torch.Generator().manual_seed(step)) * 0.1**step for step in range(1, 6)]
    p = parameter("w", values)
    adam = PanguAdam([p], lr=0.02, betas=betas, eps=1e-6, weight_decay=0.3, fused=True)
    for gradient in gradients:
        p.grad = gradient.clone()
        adam.step()
    expected = textbook(values.numpy(), [gradient.numpy() for gradient in gradients], 0.02, betas, 1e-6, 0.3)
    assert np.abs(p.detach().numpy() - expected).max() < 5e-6
    assert np.abs(expected - values.numpy()).max() > 0.05


def test_a_parameter_without_a_gradient_waits() -> None:
    still, moving = parameter("a", torch.ones(3, 3)), parameter("b", torch.ones(3, 3))
    adam = PanguAdam([still, moving], lr=0.1, weight_decay=0.5, fused=True)
    for step in range(2):
        if step:
            still.grad = torch.ones(3, 3)
        moving.grad = torch.ones(3, 3)
        adam.step()
    # Its first gradient finds fresh moments, without a bias correction either.
    expected = textbook(np.ones((3, 3)), [np.ones((3, 3))], 0.1, (0.9, 0.999), 1e-8, 0.5)
    assert np.abs(still.detach().numpy() - expected).max() < 1e-6


def test_decay_groups_are_the_originals(shared: Path) -> None:
    golden = json.loads((shared / "oracle/A/train_clip1.json").read_text())["groups"]
    decayed, kept = decay_groups(golden_model(shared).parameters(), 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    for group, key in ((decayed, "decay"), (kept, "no_decay")):
        assert sorted(mindspore_name(spec_of(p).name) for p in group["params"]) == sorted(golden[key])


def test_groups_go_by_the_whole_shape_and_leave_out_empty_ones() -> None:
    context = ParallelContext()
    norm = LayerNorm(4, context, name="ln")
    assert [group["weight_decay"] for group in decay_groups(norm.parameters(), 0.1)] == [0.0]
    linear = RowParallelLinear(4, 4, context, name="row", init=Init("normal", 1.0))
    assert [group["weight_decay"] for group in decay_groups([linear.weight], 0.1)] == [0.1]
    # ZeRO-3 leaves an empty vector where the matrix was.
    flat = parameter("w", torch.zeros(0), whole_shape=(4, 4))
    assert [group["weight_decay"] for group in decay_groups([flat, *norm.parameters()], 0.1)] == [0.1, 0.0]


def test_a_saved_state_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def made(values: Tensor) -> tuple[nn.Parameter, PanguAdam]:
        p = parameter("w", values)
        return p, PanguAdam([p], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def steps(p: nn.Parameter, adam: PanguAdam, numbers: range) -> None:
        for number in numbers:
            p.grad = torch.randn(17, 9, generator=torch.Generator().manual_seed(number))
            adam.step()

    start = torch.randn(17, 9, generator=torch.Generator().manual_seed(99))
    p, adam = made(start)
    steps(p, adam, range(3))
    torch.save({"state": adam.state_dict(), "values": p.detach()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed, second = made(saved["values"])
    second.load_state_dict(saved["state"])
    fresh, third = made(saved["values"])
    steps(p, adam, range(3, 6))
    steps(resumed, second, range(3, 6))
    steps(fresh, third, range(3, 6))
    assert torch.equal(resumed, p)
    assert not torch.equal(fresh, p)  # the moments matter


@pytest.mark.parametrize(("name", "kind", "label"), [("pangu_adam", PanguAdam, "torch PanguAdam"), ("adamw", AdamW, "torch AdamW")])
@pytest.mark.parametrize("offload", [False, True])
def test_the_optimizer_on_this_machine(name: str, kind: type, label: str, offload: bool) -> None:
    config = OptimizerConfig(name=name, lr=3e-4, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.2)
    built, said = build_optimizer(config, LayerNorm(4, ParallelContext(), name="ln").parameters(), offload=offload)
    assert type(built) is kind and said == label
    group = built.param_groups[0]
    assert (group["lr"], tuple(group["betas"]), group["eps"], group["weight_decay"], group["fused"]) == (3e-4, (0.8, 0.9), 1e-7, 0.0, True)


def test_adamw_is_torchs() -> None:
    values, gradient = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)), torch.full((5, 5), 0.5)
    p, q = parameter("w", values), nn.Parameter(values.clone())
    mine, _ = build_optimizer(OptimizerConfig(name="adamw", lr=0.1, weight_decay=0.2), [p], offload=False)
    theirs = AdamW([q], lr=0.1, weight_decay=0.2)
    p.grad, q.grad = gradient.clone(), gradient.clone()
    mine.step()
    theirs.step()
    torch.testing.assert_close(p, q)
    # With a bias correction the first step is the whole rate, and not 0.1/√0.001 of it.
    torch.testing.assert_close(p.detach(), values * (1 - 0.02) - 0.1)


class Fused:
    """A fused optimizer of somebody else's."""

    def __init__(self, groups: list[dict[str, Any]], **arguments: Any) -> None:
        self.groups, self.arguments = groups, arguments


@pytest.mark.parametrize(("name", "correct"), [("pangu_adam", False), ("adamw", True)])
@pytest.mark.parametrize("source", ["_apex_fused_adam", "_deepspeed_fused_adam"])
def test_cuda_takes_a_fused_adam_and_tells_it_of_the_bias_correction(
    source: str, name: str, correct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer.accelerator, "name", lambda: "cuda")
    for other in ("_apex_fused_adam", "_deepspeed_fused_adam"):
        monkeypatch.setattr(optimizer, other, lambda other=other: Fused if other == source else None)
    config = OptimizerConfig(name=name, lr=3e-4, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.2)
    built, said = build_optimizer(config, [parameter("w", torch.ones(2, 2))], offload=False)
    assert built.arguments == {"bias_correction": correct, "adam_w_mode": True, "lr": 3e-4, "betas": (0.8, 0.9), "eps": 1e-7}
    assert [group["weight_decay"] for group in built.groups] == [0.2]
    assert said == f"{__name__}.Fused"
    offloaded, _ = build_optimizer(config, [parameter("w", torch.ones(2, 2))], offload=True)
    assert isinstance(offloaded, AdamW)  # on the host


@pytest.mark.parametrize(("name", "kind"), [("pangu_adam", PanguAdam), ("adamw", Fused)])
def test_npu_has_a_fused_adamw_that_cannot_leave_out_the_bias_correction(name: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer.accelerator, "name", lambda: "npu")
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    monkeypatch.setitem(sys.modules, "torch_npu.optim", SimpleNamespace(NpuFusedAdamW=Fused))
    built, _ = build_optimizer(OptimizerConfig(name=name), [parameter("w", torch.ones(2, 2))], offload=False)
    assert type(built) is kind


def test_the_other_apex_is_not_taken_for_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    assert optimizer._apex_fused_adam() is None
    monkeypatch.setitem(sys.modules, "apex.optimizers", SimpleNamespace(FusedAdam=Fused))
    assert optimizer._apex_fused_adam() is Fused
