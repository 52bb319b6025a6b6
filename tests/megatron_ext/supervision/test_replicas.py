"""A replica that is not what it should be is named, with its ranks; equal ones cost one small collective a group."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import fake_hccl
from helpers.harness import run_distributed
from helpers.layouts import random_batches, small_config, start

from megatron_ext.collectives import world_rank
from megatron_ext.sharding import canonical_parameters
from megatron_ext.supervision.replicas import Replica, digest, find_differences
from megatron_ext.topology import SINGLE
from pangu.engine.engine import TrainingEngine
from pangu.engine.replicas import ReplicaCheck
from pangu.errors import InputError
from pangu.training.checkpoint import Progress

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]


def changed(x: torch.Tensor, *changes: tuple[int, Any]) -> torch.Tensor:
    x = x.clone()
    for place, value in changes:
        x.view(-1)[place] = value
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_digest_sees_one_bit_and_two_that_changed_places(dtype: torch.dtype) -> None:
    x = torch.arange(3000).to(dtype).view(30, 100)
    seen = {int(digest(x))}
    for place in range(0, 3000, 7):
        y = x.clone()
        y.view(torch.uint8).view(-1)[place * x.element_size()] ^= 1
        seen.add(int(digest(y)))
    assert len(seen) == 1 + len(range(0, 3000, 7))
    assert digest(changed(x, (17, x.view(-1)[101]), (101, x.view(-1)[17]))) not in seen
    assert digest(x) == digest(x.clone()) == digest(x.t().contiguous().t())


def test_digest_sees_signs_nan_and_changes_that_cancel() -> None:
    x = torch.zeros(100)
    others = [changed(x, (3, value)) for value in (-0.0, math.nan, math.inf, 1e-45)]
    # Integers 1, -2, 1 at neighbouring places: the sum and the sum weighted by the place are both 0.
    others.append(changed(x.view(torch.int32), (5, 1), (6, -2), (7, 1)).view(torch.float32))
    assert len({int(digest(y)) for y in (x, *others)}) == 6
    nans = torch.full((100,), math.nan)
    assert digest(nans) == digest(nans.clone())


def test_digest_of_many_chunks_and_of_nothing() -> None:
    x = torch.arange(2_500_000, dtype=torch.int32)
    assert len({int(digest(y)) for y in (x, x.roll(1 << 20), changed(x, (2_499_999, 0)), x[:-1])}) == 4
    assert digest(torch.zeros(0)) != digest(torch.zeros(1))


def test_one_process_has_nothing_to_compare() -> None:
    assert find_differences([Replica("x", SINGLE, torch.zeros(3))], SINGLE, torch.device("cpu")) == []


Injection = Callable[[TrainingEngine], None]


def parameter(engine: TrainingEngine, name: str) -> torch.Tensor:
    return next(p for spec, p in canonical_parameters(engine.module) if spec.name == name)


def perturb(name: str) -> Injection:
    def inject(engine: TrainingEngine) -> None:
        held = parameter(engine, name)
        getattr(held, "ds_tensor", held).detach().view(-1)[5] += 1e-3

    return inject


def advance_rng(engine: TrainingEngine) -> None:
    torch.rand(1)


def perturb_moment(engine: TrainingEngine) -> None:
    state = engine.engine.optimizer.state[parameter(engine, "transformer.h.1.mlp.c_proj.weight")]
    state["exp_avg_sq"].view(-1)[0] *= -1.0


def halve_loss_scale(engine: TrainingEngine) -> None:
    engine.engine.optimizer.loss_scaler.cur_scale /= 2


LN, WORDS = "transformer.h.1.ln_1.weight", "transformer.wte.weight"
SIZE = r" \(largest difference 1\.0e-03\)"
CASES: dict[str, tuple[int, dict[str, Any], int, Injection, str]] = {
    "data 2, no ZeRO": (2, {"zero_stage": 0}, 1, perturb(LN), rf"{LN}: rank 1 differs from rank 0{SIZE}"),
    "data 3, ZeRO-1": (3, {"zero_stage": 1}, 0, perturb(LN), rf"{LN}: rank 0 differs from ranks 1, 2{SIZE}"),
    "data 2, ZeRO-2": (2, {"zero_stage": 2}, 1, perturb(WORDS), rf"{WORDS}: rank 1 differs from rank 0{SIZE}"),
    "optimizer state": (2, {"zero_stage": 0}, 1, perturb_moment, r"mlp\.c_proj\.weight \(exp_avg_sq\): rank 1 differs from rank 0"),
    "tensor 2": (2, {"tensor": 2}, 1, perturb(LN), rf"{LN}: rank 1 differs from rank 0{SIZE}"),
    "tensor 2 x data 2": (4, {"tensor": 2}, 1, perturb(LN), rf"{LN}: rank 1 differs from ranks 0, 2, 3{SIZE}"),
    "tensor 2 x data 2, ZeRO-3": (4, {"tensor": 2, "zero_stage": 3}, 3, perturb(LN), rf"{LN} \(shard\): rank 3 differs from rank 2{SIZE}"),
    "split weight": (4, {"tensor": 2}, 3, perturb(WORDS), rf"{WORDS}: rank 3 differs from rank 1{SIZE}"),
    "tied embedding": (4, {"pipeline": 4}, 3, perturb(WORDS), rf"{WORDS}: rank 3 differs from rank 0{SIZE}"),
    "tied embedding, split": (4, {"tensor": 2, "pipeline": 2}, 2, perturb(WORDS), rf"{WORDS}: rank 2 differs from rank 0{SIZE}"),
    "random stream": (2, {"tensor": 2}, 1, advance_rng, r"the default random stream: rank 1 differs from rank 0\."),
    "loss scale": (2, {"tensor": 2}, 1, halve_loss_scale, r"the loss scale: rank 1 differs from rank 0 \(largest difference 5\.0e-01\)"),
}


def check_after_two_steps(parallel: dict[str, Any], rank: int, case: str) -> str:
    """Two steps, a check that must pass, an injection on one rank, and a check."""
    engine = start(small_config(parallel=parallel, train={"global_batch_size": 12}, model={"hidden_dropout": 0.1}))
    check = ReplicaCheck(engine)
    check(Progress())
    batches = random_batches(engine.config, engine.groups)
    for _ in range(2):
        engine.train_step(batches, 1e-2)
    check(Progress(step=2))
    if world_rank() == rank:
        CASES[case][3](engine)
    try:
        check(Progress(step=2))
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("case", CASES)
def test_what_differs_is_named(case: str) -> None:
    world_size, parallel, rank, _, expected = CASES[case]
    messages = run_distributed(check_after_two_steps, world_size, parallel, rank, case)
    assert len(set(messages)) == 1
    assert re.search(expected, messages[0]), messages[0]
    assert messages[0].startswith("replicas differ at step 2: ")


def check_on_hccl(parallel: dict[str, Any], perturbed: bool) -> str:
    """A check over a backend that refuses what HCCL refuses."""
    fake_hccl.install()
    engine = start(small_config(parallel=parallel))
    if perturbed and world_rank() == 1:
        perturb(LN)(engine)
    try:
        ReplicaCheck(engine)(Progress())
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"zero_stage": 0}], ids=str)
def test_hccl_can_compare(parallel: dict[str, Any]) -> None:
    assert run_distributed(check_on_hccl, 2, parallel, False) == ["", ""]
    assert f"{LN}: rank 1 differs from rank 0" in run_distributed(check_on_hccl, 2, parallel, True)[0]


def step_and_check_seconds(parallel: dict[str, Any]) -> tuple[float, float]:
    """Medians of a step and of a check, of a model as large as the quickstart's."""
    torch.set_num_threads(1)
    sizes = {"hidden_size": 128, "vocab_size": 640, "max_positions": 128}
    engine = start(small_config(model=sizes, parallel=parallel, train={"micro_batch_size": 8, "global_batch_size": 16}))
    batches, check = random_batches(engine.config, engine.groups), ReplicaCheck(engine)
    steps, checks = [], []
    for step in range(9):
        began = time.perf_counter()
        engine.train_step(batches, 1e-3)
        trained = time.perf_counter()
        check(Progress(step))
        steps.append(trained - began)
        checks.append(time.perf_counter() - trained)
    return statistics.median(steps), statistics.median(checks)


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"zero_stage": 0}], ids=str)
def test_checks_cost_less_than_a_hundredth(parallel: dict[str, Any]) -> None:
    every = small_config().run.consistency_every
    for step, check in run_distributed(step_and_check_seconds, 2, parallel):
        print(f"{parallel}: a step {step * 1e3:.0f} ms, a check {check * 1e3:.0f} ms, {check / (every * step):.3%} of the time")
        assert check < 0.01 * every * step
