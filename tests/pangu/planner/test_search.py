"""The search: what it finds is legal and best, what it leaves out is not."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest

from pangu.config import ModelConfig, parse_config
from pangu.config.layout import resolve
from pangu.planner.hardware import Cluster, load_cluster
from pangu.planner.memory import GIB
from pangu.planner.plan import Workload
from pangu.planner.profile import Profile
from pangu.planner.recipe import RECIPES, recipe
from pangu.planner.search import Outcome, Search, divisors, smallest_cluster

CLUSTERS = RECIPES / "clusters"
PAPER: dict[str, Any] = {"parallel.tensor": 8, "parallel.pipeline": 16, "parallel.recompute": "full", "parallel.order": "tp-pp-dp"}


def workload(preset: str, batch: int, precision: str = "fp16", **model: Any) -> Workload:
    return Workload(ModelConfig.model_validate({"preset": preset, **model}), 1024, batch, precision)


@lru_cache
def paper() -> tuple[Search, Outcome]:
    search = Search(workload("200B", 2048), load_cluster(CLUSTERS / "ascend910_2048.yaml"), Profile())
    return search, search.run()


def test_the_papers_plan_fits_and_the_best_is_no_slower() -> None:
    search, outcome = paper()
    plan = search.explain(PAPER)
    assert plan is not None and search.share(plan.memory) < 1
    assert plan.plan.layout.data == 16 and set(plan.plan.stage_layers) == {4}
    assert outcome.candidates[0].time.total <= plan.time.total


def test_the_papers_plan_without_optimizer_parallelism_does_not_fit() -> None:
    search, _ = paper()
    plan = search.explain(PAPER | {"parallel.zero_stage": 0})
    assert plan is not None and plan.memory.total > 40 * GIB
    assert search.need(plan.memory).endswith("GiB per device, of 32")


def test_every_plan_is_one_that_training_accepts() -> None:
    search, outcome = paper()
    assert len(outcome.candidates) > 100
    path = RECIPES / "some.yaml"
    for one in outcome.candidates[:: len(outcome.candidates) // 40]:
        values = recipe(path, RECIPES / "200B.yaml", [], search.workload, one.plan)
        assert resolve(parse_config(values, path), 2048).topology == one.plan.layout


@pytest.mark.parametrize(("devices", "limit"), [(2048, 10), (16384, 60)])
def test_large_clusters_are_planned_in_seconds(devices: int, limit: float) -> None:
    cluster = load_cluster(CLUSTERS / "ascend910_2048.yaml").with_devices(devices)
    began = time.process_time()
    assert Search(workload("200B", devices), cluster, Profile()).run().candidates
    assert time.process_time() - began < limit


def test_plans_are_sorted_and_the_front_falls() -> None:
    _, outcome = paper()
    times = [one.time.total for one in outcome.candidates]
    assert times == sorted(times)
    for one in outcome.candidates:
        dominated = any(other.time.total <= one.time.total and other.memory.total < one.memory.total for other in outcome.candidates)
        assert (one in outcome.pareto) <= (not dominated)
    sizes = [one.memory.total for one in outcome.pareto]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) > 3


def test_nothing_better_was_left_out() -> None:
    """Against a search without rules: every combination of values, each asked for by itself."""
    cluster = load_cluster(CLUSTERS / "a100_80.yaml").with_devices(16)
    search = Search(workload("2.6B", 64, attention="eager"), cluster, Profile())
    best = search.run().candidates[0]
    seconds = []
    for tensor in divisors(16):
        for pipeline in divisors(16 // tensor):
            for zero_stage in (1, 2, 3) if pipeline == 1 else (1,):
                for recompute in ("none", "selective", "full"):
                    for sequence in (False, True) if tensor > 1 else (False,):
                        for micro_batch in divisors(64):
                            wanted = {
                                "parallel.tensor": tensor,
                                "parallel.pipeline": pipeline,
                                "parallel.zero_stage": zero_stage,
                                "parallel.recompute": recompute,
                                "parallel.sequence": sequence,
                                "train.micro_batch_size": micro_batch,
                            }
                            seconds += [one.time.total for one in search.run(wanted).candidates]
    assert best.time.total == min(seconds)


def test_memory_and_devices_help() -> None:
    def best(devices: int, gib: float) -> float:
        cluster = load_cluster(CLUSTERS / "a100_40.yaml").with_devices(devices)
        memory = cluster.device.memory_gib.model_copy(update={"value": gib})
        device = cluster.device.model_copy(update={"memory_gib": memory})
        found = Search(workload("13B", 512), cluster.model_copy(update={"device": device}), Profile()).run()
        return found.candidates[0].time.total

    assert best(64, 80) <= best(64, 40) <= best(64, 24)
    assert best(128, 40) < best(64, 40) < best(32, 40)


def test_host_memory_bounds_offloading() -> None:
    cluster: Cluster = load_cluster(CLUSTERS / "a100_80.yaml").with_devices(8)
    search = Search(workload("200B", 512), cluster, Profile())
    assert not search.run().candidates
    plan = search.explain({"offload_optimizer": True, "parallel.zero_stage": 3})
    assert plan is not None and "host memory" in search.need(plan.memory)


def test_the_smallest_cluster_is_one() -> None:
    cluster = load_cluster(CLUSTERS / "a100_80.yaml").with_devices(8)
    search = Search(workload("200B", 512), cluster, Profile())
    number = smallest_cluster(search, Profile())
    assert number is not None
    assert Search(search.workload, cluster.with_devices(number), Profile()).run().candidates
    assert not Search(search.workload, cluster.with_devices(number // 2), Profile()).run().candidates


def test_reasons_are_given() -> None:
    _, outcome = paper()
    reasons = dict(outcome.pruned)
    assert "64 layers" in reasons["tensor 8, pipeline 128, 256"]
    assert "server has 8" in reasons["tensor 16, 32, 64, 128"]
    assert any("GiB per device" in reason for reason in reasons.values())


def test_batches_that_do_not_divide_are_left_out() -> None:
    search, _ = paper()
    odd = Search(replace(search.workload, global_batch_size=12), search.cluster, Profile()).run()
    assert all(12 % one.plan.layout.data == 0 for one in odd.candidates)
    assert any("does not divide the global batch of 12" in reason for _, reason in odd.pruned)
