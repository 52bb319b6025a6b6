"""One process's engine against the same model without DeepSpeed; that every layout follows it: tests/distributed/test_layouts.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.harness import run_distributed
from helpers.layouts import random_batches, small_config, start

from megatron_ext.context import ParallelContext
from megatron_ext.initialize import random_weights
from megatron_ext.random import derive_seed
from megatron_ext.sharding import canonical_parameters
from pangu.config import Config
from pangu.engine.engine import TrainingEngine
from pangu.model.block import RunOptions
from pangu.model.model import PanguModel

RATE, BETAS = 1e-2, (0.9, 0.95)
OPTIONS = RunOptions(reset_at_document=True)


def weights(engine: TrainingEngine) -> dict[str, torch.Tensor]:
    return {spec.name: parameter.detach().clone() for spec, parameter in canonical_parameters(engine.module)}


def streams_of(engine: TrainingEngine) -> dict[str, list[int]]:
    return {name: state.tolist() for name, state in engine.rng.state_dict().items()}


def expected_step(config: Config, engine: TrainingEngine) -> tuple[float, float]:
    """Mean loss and gradient norm of the first global batch, by autograd alone."""
    model = PanguModel(config.model, ParallelContext(fill=random_weights(config.train.seed)), OPTIONS)
    batches = random_batches(config, engine.groups)
    losses = [model(*next(batches)) / engine.micro_batches for _ in range(engine.micro_batches)]
    sum(losses, start=torch.zeros(())).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return sum(loss.item() for loss in losses), float(torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in gradients])))


def look_at(config: Config) -> dict[str, Any]:
    """Everything below in one start: the first step, a step over the limit, an evaluation, counters and random streams."""
    engine = start(config)
    told: dict[str, Any] = {"expected": expected_step(config, engine), "micro-batches": engine.micro_batches}
    batches = random_batches(config, engine.groups)
    before = weights(engine)
    first = engine.train_step(batches, RATE)
    told["first"], told["rates"] = first, [group["lr"] for group in engine.param_groups]
    after = weights(engine)
    told["moved"] = max(float((after[name] - before[name]).abs().max()) for name in before)

    told["over"] = engine.train_step(batches, RATE, loss_limit=first.loss / 100)
    told["kept"] = all(torch.equal(value, after[name]) for name, value in weights(engine).items())

    told["evaluated"] = [engine.evaluate(random_batches(config, engine.groups), 2) for _ in range(2)]
    model = PanguModel(config.model, ParallelContext(fill=lambda local, spec, rank, size: local.copy_(after[spec.name])), OPTIONS)
    again = random_batches(config, engine.groups)
    with torch.no_grad():
        told["evaluation"] = sum(float(model.eval()(*next(again))) for _ in range(2 * engine.micro_batches)) / (2 * engine.micro_batches)
    told["kept by an evaluation"] = all(torch.equal(value, after[name]) for name, value in weights(engine).items())
    told["is training"] = engine.module.training

    engine.count_from(41, 328)
    told["counters"] = (engine.engine.global_steps, engine.engine.global_samples)
    told["third"] = engine.train_step(batches, RATE)
    told["counters later"] = engine.engine.global_steps
    states = []
    for step in (5, 5, 6):
        engine.reseed(step)
        states.append(streams_of(engine))
    told["reseeded"] = (states[0] == states[1], states[1] == states[2])
    with engine.whole(next(iter(engine.module.parameters()))) as whole:
        told["whole"] = whole.requires_grad
    return told


@pytest.fixture(scope="module", params=[0, 1], ids=["no ZeRO", "ZeRO-1"])
def told(request: pytest.FixtureRequest) -> dict[str, Any]:
    return run_distributed(
        look_at, 1, small_config(parallel={"zero_stage": request.param}, optimizer={"betas": list(BETAS), "grad_clip": 0.5})
    )[0]


def test_the_first_step_has_the_loss_and_the_norm_of_the_model_alone(told: dict[str, Any]) -> None:
    loss, norm = told["expected"]
    assert told["micro-batches"] == 4
    assert told["first"].loss == pytest.approx(loss, abs=5e-6)
    assert told["first"].grad_norm == pytest.approx(norm, rel=1e-5) and norm > 0.5  # told before it is clipped
    assert not told["first"].skipped and not told["first"].overflow and told["first"].loss_scale is None


def test_the_learning_rate_is_that_of_the_call(told: dict[str, Any]) -> None:
    assert set(told["rates"]) == {RATE}
    first = (1 - BETAS[0]) / (1 - BETAS[1]) ** 0.5  # without bias correction, whatever the gradient is
    assert told["moved"] == pytest.approx(RATE * first, rel=0.05)  # weight decay is the rest


def test_a_loss_above_its_limit_leaves_the_weights_alone(told: dict[str, Any]) -> None:
    assert told["over"].skipped and not told["over"].overflow and told["over"].grad_norm == math.inf and math.isfinite(told["over"].loss)
    assert told["kept"]
    assert not told["third"].skipped


def test_an_evaluation_is_the_mean_and_changes_nothing(told: dict[str, Any]) -> None:
    assert told["evaluated"][0] == told["evaluated"][1] == pytest.approx(told["evaluation"], abs=5e-6)
    assert told["kept by an evaluation"] and told["is training"]


def test_counters_and_random_streams_go_on_from_where_they_are_put(told: dict[str, Any]) -> None:
    assert told["counters"] == (41, 328) and told["counters later"] == 42
    assert told["reseeded"] == (True, False) and derive_seed(7, 5) != derive_seed(7, 6)
    assert told["whole"] is False
