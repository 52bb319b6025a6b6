"""train.profile: which steps are recorded, what is written, and that nothing is where it is off."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_run import write_recipe

from pangu.config import load_config
from pangu.errors import InputError
from pangu.training.step_profile import StepProfile

ROOT = Path(__file__).parents[3]


def events(path: Path) -> list[dict[str, Any]]:
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def steps_in(path: Path) -> set[str]:
    return {event["name"] for event in events(path) if event.get("name", "").startswith("step ") and event.get("ph") == "X"}


def work() -> None:
    torch.ones(30, 30) @ torch.ones(30, 30)


def test_a_pipeline_writes_the_profile_of_every_rank(tmp_path: Path) -> None:
    """The range goes beyond the last step: what there is of it is written."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pangu.train"]
    overrides = ["parallel.pipeline=2", "train.profile=5:59", "train.eval_every=0"]
    done = subprocess.run([*command, "--config", write_recipe(tmp_path), *overrides], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "profile of steps 5 to 6 in" in done.stdout
    folder = tmp_path / "run/profile"
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.json.gz", "rank-0.txt", "rank-1.json.gz", "rank-1.txt"]
    for rank in range(2):
        assert steps_in(folder / f"rank-{rank}.json.gz") == {"step 5", "step 6"}
        table = (folder / f"rank-{rank}.txt").read_text()
        assert table.startswith(f"rank {rank}, steps 5 to 6\n")
        assert "aten::mm" in table or "aten::addmm" in table


def test_only_the_steps_of_the_range(tmp_path: Path) -> None:
    with StepProfile(range(2, 4), tmp_path / "profile", 3) as profile:
        for number in range(1, 6):
            with profile.step(number):
                work()
            assert (tmp_path / "profile/rank-3.txt").exists() == (number >= 3)
    assert steps_in(tmp_path / "profile/rank-3.json.gz") == {"step 2", "step 3"}
    assert "aten::mm" in (tmp_path / "profile/rank-3.txt").read_text()


def test_an_error_in_the_range_leaves_what_was_recorded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bad step"), StepProfile(range(1, 9), tmp_path, 0) as profile:
        with profile.step(1):
            work()
        with profile.step(2):
            raise InputError("bad step")
    assert (tmp_path / "rank-0.txt").read_text().startswith("rank 0, steps 1 to 1\n")
    assert "step 1" in steps_in(tmp_path / "rank-0.json.gz")


def test_a_return_to_a_checkpoint_ends_the_range(tmp_path: Path) -> None:
    with StepProfile(range(5, 9), tmp_path, 0) as profile:
        for number in (5, 6, 3, 4, 5, 6):
            with profile.step(number):
                work()
    assert steps_in(tmp_path / "rank-0.json.gz") == {"step 5", "step 6"}


def test_a_disk_that_refuses_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profile").write_text("a file is in the way")
    with StepProfile(range(1, 2), tmp_path / "profile", 0) as profile, profile.step(1):
        work()
    [line] = capsys.readouterr().err.splitlines()
    assert "the profile could not be written" in line


def test_off_starts_no_profiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.profiler.profile", lambda **_: pytest.fail("a profiler was made"))
    assert not load_config(write_recipe(tmp_path)).train.profiled_steps
    with StepProfile(range(0), tmp_path / "profile", 0) as profile, profile.step(1):
        work()
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("value", ["10", "5:5", "7:3", "0:4", "a:b", "1:2:3", "-1:3", "[1, 3]"])
def test_bad_ranges_are_refused_in_one_line(value: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.profile = ") as refusal:
        load_config(write_recipe(tmp_path), [f"train.profile={value}"])
    assert len(str(refusal.value).splitlines()) == 1


def test_ranges_are_no_sexagesimal_numbers(tmp_path: Path) -> None:
    """YAML 1.1 reads 3:6 as 186."""
    recipe = write_recipe(tmp_path)
    config = load_config(recipe, ["train.profile=3:6"])
    assert config.train.profiled_steps == range(3, 6)
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml") == config
    with pytest.raises(InputError, match=r"begins after the last step, train\.steps = 6"):
        load_config(recipe, ["train.profile=7:9"])
