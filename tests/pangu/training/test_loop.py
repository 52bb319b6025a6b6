"""What the loop does between two steps, on an engine that only tells results; with real ones: tests/faults and tests/cli/test_train.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.layouts import small_config

from megatron_ext.topology import Groups, Topology
from pangu.engine.engine import StepResult
from pangu.errors import InputError
from pangu.training import loop
from pangu.training.anomalies import MAX_ROLLBACKS, MAX_SKIPPED
from pangu.training.checkpoint import Progress

GOOD = StepResult(loss=2.0, grad_norm=1.0, skipped=False, overflow=False, loss_scale=None)
BAD = StepResult(loss=math.nan, grad_norm=math.inf, skipped=True, overflow=False, loss_scale=None)


class Story:
    """A loop over scripted steps, and what it did, in order: ("step", n), ("evaluate", n), ("save", n), ("load", path) …"""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, results: dict[int, StepResult], **sections: Any) -> None:
        self.events: list[tuple[str, Any]] = []
        self.rates: list[float] = []
        self.lines: list[dict[str, Any]] = []
        self.stop = SimpleNamespace(received=0)
        self.progress = Progress()
        self.config = small_config(**{"train": {"steps": 6}, "run": {"dir": "unused", "consistency_every": 0}} | sections)
        self._results, self._calls = results, 0
        groups = Groups.from_topology(Topology(tensor=1, pipeline=1, data=1), 0)
        self.engine = SimpleNamespace(config=self.config, groups=groups, train_step=self.train_step, evaluate=self.evaluate)
        monkeypatch.setattr(loop, "StopRequest", lambda: self.stop)
        saver = SimpleNamespace(save=self.save, poll=lambda: None, finish=lambda: self.events.append(("finish", self.progress.step)))
        monkeypatch.setattr(loop, "CheckpointSaver", lambda engine: saver)
        monkeypatch.setattr(loop, "load_checkpoint", self.load)
        monkeypatch.setattr(loop, "verify", lambda path, world: None)
        monkeypatch.setattr(loop, "micro_batches", lambda *args, **rest: iter(()))
        monkeypatch.setattr(loop, "gc", SimpleNamespace(collect=int, freeze=int))  # of a whole test process, it takes a second
        self.saved: dict[Path, Progress] = {}

    def run(self, checkpoint: Path | None = None) -> str | None:
        watchdog: Any = SimpleNamespace(beat=lambda step, what: None, each=lambda items: items)
        metrics: Any = SimpleNamespace(step=self.lines.append, say=lambda text: None, note=lambda *_: None, evaluation=self.lines.append)
        data: Any = SimpleNamespace(tokens_per_epoch=128)
        return loop.TrainingLoop(self.engine, self.progress, checkpoint, data, data, metrics, watchdog).run()  # type: ignore[arg-type]

    def train_step(self, batches: Iterator[Any], rate: float, limit: float) -> StepResult:
        self._calls += 1
        self.rates.append(rate)
        self.events.append(("step", self.progress.step + 1))
        return self._results.get(self._calls, GOOD)

    def evaluate(self, batches: Iterator[Any], number: int) -> float:
        self.events.append(("evaluate", self.progress.step))
        return 1.0

    def save(self, progress: Progress) -> None:
        self.events.append(("save", progress.step))
        path = self.config.checkpoint_dir / f"step_{progress.step:08d}"
        self.saved[path] = Progress(**{**vars(progress), "recent_losses": list(progress.recent_losses)})

    def load(self, engine: Any, path: Path) -> Progress:
        self.events.append(("load", path.name))
        return Progress(**vars(self.saved[path]))

    def of(self, *kinds: str) -> list[tuple[str, Any]]:
        return [event for event in self.events if event[0] in kinds]


def test_steps_evaluations_and_saves_come_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    sections = {"train": {"steps": 6, "eval_every": 3, "eval_batches": 1}, "data": {"train": ["unused"], "validation_fraction": 0.5}}
    story = Story(monkeypatch, {}, checkpoint={"save_every": 4}, **sections)
    assert story.run() is None
    expected = [("step", 1), ("step", 2), ("step", 3), ("evaluate", 3), ("step", 4), ("save", 4), ("step", 5), ("step", 6)]
    assert story.of("step", "evaluate", "save") == [*expected, ("evaluate", 6), ("save", 6)]
    assert story.events[-1][0] == "finish"  # nothing is left half written
    assert (story.progress.step, story.progress.consumed_samples, story.progress.consumed_tokens) == (6, 48, 48 * 16)
    steps = [line for line in story.lines if "loss" in line]
    assert [line["consumed_samples"] for line in steps] == [8, 16, 24, 32, 40, 48]
    assert steps[-1]["consumed_epochs"] == 6.0
    assert story.rates == [line["learning_rate"] for line in steps] and story.rates[0] < story.rates[2] > story.rates[5]


def test_a_run_goes_on_from_where_its_progress_is(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(monkeypatch, {})
    story.progress.step, story.progress.consumed_samples = 4, 32
    story.run()
    assert story.of("step", "save") == [("step", 5), ("step", 6), ("save", 6)]
    story.run()
    assert len(story.of("step")) == 2  # a run that is complete takes no step


def test_a_signal_ends_the_run_after_the_step_and_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(monkeypatch, {}, checkpoint={"save_every": 0})
    step = story.train_step

    def interrupted(*arguments: Any) -> StepResult:
        story.stop.received = 15 if story.progress.step == 2 else 0
        return step(*arguments)

    story.engine.train_step = interrupted
    assert story.run() == "SIGTERM"
    assert story.of("step", "save") == [("step", 1), ("step", 2), ("step", 3), ("save", 3)]


def test_a_signal_during_the_last_step_interrupts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(monkeypatch, {}, train={"steps": 1})
    story.stop.received = 2
    assert story.run() is None
    assert story.of("step", "save") == [("step", 1), ("save", 1)]


def test_bad_steps_are_skipped_counted_and_kept_out_of_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(monkeypatch, {2: BAD, 3: BAD, 5: BAD})
    story.run()
    assert [line["decision"] for line in story.lines] == [None, "skip", "skip", None, "skip", None]
    assert "loss" in story.lines[1] and story.lines[1]["loss"] is None and story.lines[1]["skipped"]
    assert story.progress.bad_steps == 0 and story.progress.recent_losses == [2.0] * 3


def test_too_many_in_a_row_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(monkeypatch, dict.fromkeys(range(2, 100), BAD), train={"steps": 50})
    with pytest.raises(InputError, match=rf"^step {MAX_SKIPPED + 1}: the loss is nan, {MAX_SKIPPED} bad steps in a row.*nothing was saved"):
        story.run()
    assert story.events[-1][0] == "finish"


def test_a_rollback_returns_to_the_checkpoint_but_not_to_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(monkeypatch, {4: BAD}, train={"steps": 5, "on_bad_step": "rollback"}, checkpoint={"save_every": 2})
    story.run()
    steps = [("step", 1), ("step", 2), ("save", 2), ("step", 3), ("step", 4), ("load", "step_00000002"), ("step", 3), ("step", 4)]
    assert story.of("step", "save", "load") == [*steps, ("save", 4), ("step", 5), ("save", 5)]
    assert story.progress.consumed_samples == 7 * 8 and story.progress.recent_losses == [2.0] * 5


def test_rollbacks_to_one_checkpoint_are_counted_anew_after_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = dict.fromkeys(range(3, 3 + MAX_ROLLBACKS), BAD)
    options = {"train": {"steps": 4, "on_bad_step": "rollback"}, "checkpoint": {"save_every": 2}}
    story = Story(monkeypatch, bad, **options)
    story.run()
    assert len(story.of("load")) == MAX_ROLLBACKS and story.progress.step == 4
    story = Story(monkeypatch, dict.fromkeys(range(3, 4 + MAX_ROLLBACKS), BAD), **options)
    with pytest.raises(InputError, match=rf"{MAX_ROLLBACKS} returns to a checkpoint.*step_00000002"):
        story.run()


def test_a_checkpoint_that_was_damaged_meanwhile_is_not_returned_to(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(monkeypatch, {3: BAD}, train={"steps": 4, "on_bad_step": "rollback"}, checkpoint={"save_every": 2})
    monkeypatch.setattr(loop, "verify", lambda path, world: "a file is missing")
    with pytest.raises(InputError, match=r"step_00000002: the run would return to it, but a file is missing"):
        story.run()


def test_replicas_are_compared_before_every_save_and_a_difference_saves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []

    def compare(progress: Progress) -> None:
        compared.append(progress.step)
        if progress.step == 4:
            raise InputError("replicas differ")

    monkeypatch.setattr(loop, "ReplicaCheck", lambda engine: compare)
    monkeypatch.setattr(loop.StragglerReport, "__call__", lambda self: [])
    story = Story(monkeypatch, {}, checkpoint={"save_every": 2}, run={"dir": "unused", "consistency_every": 3})
    with pytest.raises(InputError, match="replicas differ"):
        story.run()
    assert compared == [0, 2, 3, 4]
    assert story.of("save") == [("save", 2)] and story.events[-1] == ("finish", 4)
