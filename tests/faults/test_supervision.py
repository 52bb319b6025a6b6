"""Runs of several processes one of which stops, hangs, fails, is told to stop, or never comes: what the others do, say and leave."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.harness import PRELOAD, free_port
from helpers.tiny_run import values, write_recipe

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TRAIN = str(Path(__file__).with_name("train_with_fault.py"))
HANG, LONG = 4.0, 120.0


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@dataclass
class Rank:
    """A process of a run, started as a batch system would: without a launcher that ends it when another has failed."""

    process: Any
    log: Path

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    @property
    def out(self) -> str:
        return self.log.with_suffix(".out").read_text()

    @property
    def err(self) -> str:
        return self.log.with_suffix(".err").read_text()

    def code(self, timeout: float) -> int:
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"rank still runs after {timeout} s: {self.out}{self.err}"
        return int(self.process.exitcode)


def rank_main(environment: dict[str, str], arguments: list[str], log: str) -> None:
    os.environ.update(environment)
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log + suffix, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.path.insert(0, str(Path(TRAIN).parent))
    from train_with_fault import train

    sys.argv = ["train", *arguments]
    train()


@contextlib.contextmanager
def ranks(
    recipe: Path, run_dir: Path, *overrides: str, size: int = 2, fault: str = "none 0 0", started: int = 0, **environment: str
) -> Iterator[list[Rank]]:
    """Start the ranks of a run from the tests' fork server; all are dead when the block is left."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    run_dir.mkdir(exist_ok=True)
    arguments = ["--config", str(recipe), f"run.dir={run_dir}", "train.eval_every=0", f"run.hang_timeout={HANG}", *overrides]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "FAULT": fault} | environment
    processes = []
    for rank in range(started or size):
        own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        if f"WORLD_SIZE_{rank}" in environment:
            own["WORLD_SIZE"] = environment[f"WORLD_SIZE_{rank}"]
        log = run_dir / f"log{rank}"
        process = context.Process(target=rank_main, args=(own, arguments, str(log)), daemon=True)
        process.start()
        processes.append(Rank(process, log))
    try:
        yield processes
    finally:
        for rank in processes:
            rank.process.kill()
            rank.process.join()


def await_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + LONG
    while not ((run_dir / "metrics.jsonl").exists() and len(values(run_dir, "loss")) >= step):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def told(*processes: Rank) -> list[str]:
    """Every line that the ranks wrote as an error, without traceback frames."""
    return [line for rank in processes for line in rank.err.splitlines() if line and not line.startswith(("  ", "Traceback"))]


@pytest.mark.parametrize("culprit", [pytest.param(0, marks=pytest.mark.slow), 1])  # rank 0 serves the store in which the ranks talk
def test_a_stopped_rank_is_named(recipe: Path, tmp_path: Path, culprit: int) -> None:
    with ranks(recipe, tmp_path / "run", fault=f"freeze {culprit} 3") as processes:
        assert processes[1 - culprit].code(LONG) == 75
        [line] = told(*processes)
    assert re.fullmatch(
        rf"error: rank {culprit} \(pipe 0, data {culprit}, tensor 0\) has made no progress in step 3 \(training\) for 4 s; it is stopped "
        rf"\(process \d+; SIGCONT lets it go on\), rank {1 - culprit} waits in all_reduce\(all ranks\). "
        rf"Stacks of all ranks: {tmp_path}/run/hang-3/\.",
        line,
    )
    stacks = tmp_path / "run/hang-3"
    assert "is stopped" in (stacks / f"rank_{culprit:05d}.txt").read_text()
    assert "in train_step" in (stacks / f"rank_{1 - culprit:05d}.txt").read_text()


def test_a_late_rank_is_told_from_those_that_wait_for_it(recipe: Path, tmp_path: Path) -> None:
    layout = ["parallel.tensor=2", "parallel.pipeline=2"]
    with ranks(recipe, tmp_path / "run", *layout, size=4, fault="pause 3 2") as processes:
        assert [rank.code(LONG) for rank in processes] == [75] * 4
        [line] = told(*processes)
    assert line.startswith("error: rank 3 (pipe 1, data 0, tensor 1) has made no progress in step 2 (training) for 4 s; it is in pause (")
    assert re.search(r"rank 2 waits in all_\w+\(tensor group 2,3\)", line)
    for rank in range(4):
        text = (tmp_path / f"run/hang-2/rank_{rank:05d}.txt").read_text()
        assert "in train_step" in text and (", training: is in pause" in text) == (rank == 3)


def test_a_process_alone_that_hangs_ends(recipe: Path, tmp_path: Path) -> None:
    with ranks(recipe, tmp_path / "run", size=1, fault="pause 0 2") as [rank]:
        assert rank.code(LONG) == 75
        [line] = told(rank)
    assert line.startswith("error: rank 0 (pipe 0, data 0, tensor 0) has made no progress in step 2 (training) for 4 s; it is in pause (")


@pytest.mark.slow
def test_a_run_that_was_suspended_as_a_whole_goes_on(recipe: Path, tmp_path: Path) -> None:
    with ranks(recipe, tmp_path / "run", "train.steps=20") as processes:
        await_step(tmp_path / "run", 3)
        for rank in processes:
            os.kill(rank.pid, signal.SIGSTOP)
        time.sleep(HANG + 2)
        for rank in processes:
            os.kill(rank.pid, signal.SIGCONT)
        assert [rank.code(LONG) for rank in processes] == [0, 0], told(*processes)
    assert values(tmp_path / "run", "step") == list(range(1, 21))


@pytest.mark.parametrize("kind", ["forward", "backward", "loader", "collective"])
def test_the_first_failure_is_shown_once_and_ends_all(recipe: Path, tmp_path: Path, kind: str) -> None:
    with ranks(recipe, tmp_path / "run", "run.hang_timeout=0", fault=f"{kind} 1 3") as processes:
        await_step(tmp_path / "run", 2)
        began = time.monotonic()
        assert [rank.code(30) for rank in processes] == [1, 1]
        assert time.monotonic() - began < 30
        assert told(processes[1]) == ["rank 1 failed:", "train_with_fault.Fault: injected"]
        assert told(processes[0]) == ["rank 0: stopped because rank 1 failed"]


def test_a_killed_rank_is_named_by_the_one_that_misses_it(recipe: Path, tmp_path: Path) -> None:
    with ranks(recipe, tmp_path / "run", fault="die 1 3") as processes:
        assert [rank.code(LONG) for rank in processes] == [1, -signal.SIGKILL]
        [line] = told(*processes)
    assert re.fullmatch(r"error: rank 0 lost rank 1 \(pipe 0, data 1, tensor 0\), which is dead \(process \d+\)", line)


def test_a_collective_of_another_shape_ends_all(recipe: Path, tmp_path: Path) -> None:
    with ranks(recipe, tmp_path / "run", fault="shape 1 3") as processes:
        assert all(rank.code(LONG) for rank in processes)
        assert "Received data size doesn't match expected size" in processes[0].err
        assert "rank 1 lost rank 0" in processes[1].err or "stopped because rank 0 failed" in processes[1].err


def test_refused_input_is_told_once(recipe: Path, tmp_path: Path) -> None:
    with ranks(recipe, tmp_path / "run", "checkpoint.resume=missing") as processes:
        assert [rank.code(LONG) for rank in processes] == [2, 2]
        [line] = told(*processes)
    assert line == "error: checkpoint.resume = missing: it has no readable manifest.json, so it is not a complete checkpoint."


@pytest.mark.parametrize(("name", "rank"), [("SIGTERM", 1), ("SIGINT", 0), ("SIGUSR1", 1)])
def test_a_signal_to_one_rank_saves_the_same_step_on_all(recipe: Path, tmp_path: Path, name: str, rank: int) -> None:
    with ranks(recipe, tmp_path / "run", "train.steps=500") as processes:
        await_step(tmp_path / "run", 3)
        os.kill(processes[rank].pid, getattr(signal, name))
        assert [rank.code(LONG) for rank in processes] == [0, 0], told(*processes)
        step = int(re.search(rf"{name}: saved at step (\d+)", processes[0].out)[1])
    assert step == values(tmp_path / "run", "step")[-1] < 500
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step_*")] == [f"step_{step:08d}"]


def test_a_second_signal_acts_at_once_even_in_a_collective(recipe: Path, tmp_path: Path) -> None:
    with ranks(recipe, tmp_path / "run", "run.hang_timeout=0", fault="freeze 1 3") as processes:
        await_step(tmp_path / "run", 2)
        time.sleep(1)  # rank 0 waits for a rank that is stopped
        os.kill(processes[0].pid, signal.SIGTERM)
        time.sleep(1.5)
        assert processes[0].process.exitcode is None
        os.kill(processes[0].pid, signal.SIGTERM)
        assert processes[0].code(5) == 128 + signal.SIGTERM
        assert told(processes[0]) == ["rank 0: SIGTERM again: ended without saving"]


def test_a_rank_that_never_comes_is_named(recipe: Path, tmp_path: Path) -> None:
    with ranks(recipe, tmp_path / "run", "run.hang_timeout=2", size=4, started=2) as processes:
        assert processes[0].code(LONG) == 2
        [line] = told(processes[0])
        assert line.startswith("error: ranks 2,3 of WORLD_SIZE=4 did not join within 2 s. Start all ranks with the same MASTER_ADDR")
        assert processes[1].code(LONG) == 2


def test_ranks_that_disagree_on_the_number_of_ranks_are_named(recipe: Path, tmp_path: Path) -> None:
    with ranks(recipe, tmp_path / "run", WORLD_SIZE_1="4") as processes:
        assert processes[0].code(LONG) == 2
        [line] = told(processes[0])
    assert re.match(r"error: rank 1 \(.*, process \d+\) was started with WORLD_SIZE=4, rank 0 with 2\.", line)


def test_a_port_that_is_taken_is_named(recipe: Path, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        with ranks(recipe, tmp_path / "run", MASTER_PORT=port, started=1) as [rank]:
            assert rank.code(LONG) == 2
            [line] = told(rank)
    assert line.startswith(f"error: MASTER_PORT={port} ") and "address already in use" in line


def launch(launcher: list[str], recipe: Path, run_dir: Path, *overrides: str, fault: str) -> subprocess.Popen[str]:
    run_dir.mkdir(exist_ok=True)
    words = [*launcher, "--config", str(recipe), f"run.dir={run_dir}", "train.eval_every=0", *overrides]
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "FAULT": fault}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT)


TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"]
DROPOUT = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1", "checkpoint.save_every=2"]


@pytest.fixture(scope="module")
def unbroken(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("unbroken")
    with ranks(recipe, run_dir, *DROPOUT) as processes:
        assert [rank.code(LONG) for rank in processes] == [0, 0], told(*processes)
    return values(run_dir, "loss")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["torchrun", "deepspeed under supervise.py"])
def test_a_run_with_a_killed_rank_restarts_and_ends_as_if_nothing_had_happened(
    recipe: Path, unbroken: list[float], tmp_path: Path, command: str
) -> None:
    deepspeed = [sys.executable, "tools/supervise.py", "--", str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    launcher = [*TORCHRUN, "--max-restarts", "2", TRAIN] if command == "torchrun" else [*deepspeed, TRAIN]
    process = launch(launcher, recipe, tmp_path / "run", *DROPOUT, fault="die 1 4")
    output, _ = process.communicate(timeout=LONG)
    assert process.returncode == 0, output
    assert "step_00000002 at step 2" in output
    losses = dict(zip(values(tmp_path / "run", "step"), values(tmp_path / "run", "loss"), strict=True))
    assert list(losses.values()) == unbroken


@pytest.mark.slow
def test_torchrun_is_rid_of_a_stopped_rank(recipe: Path, tmp_path: Path) -> None:
    process = launch([*TORCHRUN, TRAIN], recipe, tmp_path / "run", f"run.hang_timeout={HANG}", fault="freeze 1 3")
    await_step(tmp_path / "run", 2)
    began = time.monotonic()
    output, _ = process.communicate(timeout=HANG + 60)
    assert time.monotonic() - began < HANG + 45  # torchrun itself waits for 30 s before it kills what does not end
    assert output.count("error: rank 1 (pipe 0, data 1, tensor 0) has made no progress in step 3") == 1
    assert process.returncode != 0


@pytest.mark.slow
def test_ranks_save_when_the_deepspeed_command_is_killed(recipe: Path, tmp_path: Path) -> None:
    launcher = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), TRAIN]
    process = launch(launcher, recipe, tmp_path / "run", "train.steps=500", fault="none 0 0")
    await_step(tmp_path / "run", 3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)  # the ranks hold the pipe too: until they have ended
    assert "the launcher has gone: saving" in output and "SIGTERM: saved at step" in output
    assert len(list((tmp_path / "run/checkpoints").glob("step_*"))) == 1
