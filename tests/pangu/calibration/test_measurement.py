"""What training tells about a machine: on one whose constants are known, they are found; and training really runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ext.topology import Topology
from pangu.calibration import measurement as calibration
from pangu.calibration.trial import try_plan
from pangu.config import Config, load_config
from pangu.config.layout import resolve
from pangu.config.stages import balanced_layers
from pangu.errors import InputError
from pangu.planner.hardware import load_cluster
from pangu.planner.plan import Plan, workload_of
from pangu.planner.profile import MeasuredEngine, MeasuredLink, Profile
from pangu.planner.time import TimeModel

ROOT = Path(__file__).parents[3]
CLUSTER = load_cluster(ROOT / "ds_configs" / "clusters" / "cpu_gloo.yaml")
QUICKSTART = ROOT / "ds_configs" / "quickstart.yaml"


def test_constants_of_a_known_machine_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def links(latency_us: float) -> tuple[MeasuredLink, ...]:
        return tuple(MeasuredLink(level="server", ranks=ranks, bandwidth=1.0, latency_us=latency_us * ranks) for ranks in (2, 4))

    kinds = ("zero0", "zero1", "zero2", "zero3", "pipeline")
    engines = tuple(MeasuredEngine(kind=kind, ranks=4, step_us=1e4 * n, micro_batch_us=3e3 * n) for n, kind in enumerate(kinds))
    measured = Profile(sharing=2.0, links=links(200.0))
    truth = measured.model_copy(update={"engines": engines, "links": links(700.0)})

    def pretend(config: Config, world_size: int, steps: int) -> float:
        parallel = config.parallel
        layout = Topology(parallel.tensor, parallel.pipeline, world_size // parallel.tensor // parallel.pipeline)
        plan = Plan(layout, config.train.micro_batch_size, balanced_layers(config.model, layout.pipeline), zero_stage=parallel.zero_stage)
        return TimeModel(workload_of(config), CLUSTER, truth).step(plan).total

    monkeypatch.setattr(calibration, "try_plan", pretend)
    found = calibration.measure_training(measured, CLUSTER, "fp32", 4)
    for link, true in zip(found.links, truth.links, strict=True):
        assert link.latency_us == pytest.approx(true.latency_us, rel=0.02)
    for engine in engines:
        again = next(one for one in found.engines if one.kind == engine.kind)
        assert again.step_us == pytest.approx(engine.step_us, rel=0.02, abs=200)
        assert again.micro_batch_us == pytest.approx(engine.micro_batch_us, rel=0.02, abs=200)


def test_a_plan_is_really_trained() -> None:
    config = load_config(QUICKSTART, ["parallel.tensor=2", "train.micro_batch_size=1", "train.global_batch_size=2"])
    assert 1e-4 < try_plan(config, 2, steps=2) < 60


def test_a_trial_that_fails_says_why() -> None:
    config = load_config(QUICKSTART, ["parallel.tensor=2", "parallel.pipeline=2"])
    with pytest.raises(InputError, match=r"process [01]: InputError: "):
        try_plan(config, 2, steps=1)


def test_engines_are_measured_on_runs_that_training_accepts() -> None:
    for layout, stage in ((Topology(1, 1, 4), 3), (Topology(1, 2, 2), 1), (Topology(4, 1, 1), 1)):
        assert resolve(calibration._probe(layout, stage, 8, "fp32"), 4).topology == layout
