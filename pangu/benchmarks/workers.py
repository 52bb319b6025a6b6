"""Ways to train that wait: each is a set of processes that take one step when they are told to, and say how it went.

A process of its own has its own allocator, threads and peak of memory, so that no way bears on another. On the CPU all of them are alive
and take turns, a step a turn, so that a machine that slows down slows all of them. A device's memory would not hold them all and its speed
changes little: there they run one after the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ext.supervision.local_ranks import free_port, rank_environment
from pangu.benchmarks import harness
from pangu.errors import InputError

ROOT = Path(__file__).parents[2]
TUNED = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184"
"""GLIBC_TUNABLES: huge pages, and memory that was freed is kept for the next step."""


@dataclass(frozen=True)
class Way:
    """One way to do a step."""

    name: str
    config: Mapping[str, Any]
    """The run as pangu.train would be told it; another model takes its shape and settings from it."""
    program: str = "engine"
    """`engine`, what pangu.train runs; or in a plain loop of PyTorch `bare`, our model, or `gpt2` or `megatron`, a peer's."""
    processes: int = 1
    threads: int = 1
    """CPU threads of each process."""
    allocator: str = "kept"
    """glibc's, on the CPU: `default`; `kept`, which keeps what was freed as pangu.train does, the engine always; `tuned`, with `TUNED`."""


@dataclass
class Course:
    """What a way's processes did, the warm-up left out."""

    seconds: list[float] = field(default_factory=list)
    """Seconds of each step, the slowest process's."""
    losses: list[float] = field(default_factory=list)
    """Loss of each step, the warm-up's too."""
    peak_bytes: int = 0
    """Most memory of a process: resident on the CPU, imports included; on a device what tensors took of it."""


def on_cpu() -> bool:
    """Whether there is no device to train on."""
    from megatron_ext import accelerator

    return accelerator.name() == "cpu"


def take_turns(ways: Sequence[Way], repeats: int, *, label: str = "turn") -> dict[str, Course]:
    """Let each way take its steps; every other turn goes backwards.

    The first turns warm up and are not counted: two on the CPU; more on a device, whose allocator and clock take longer to settle.

    Raises:
        InputError: if a process ends early.
    """
    together = on_cpu()
    courses = {way.name: Course() for way in ways}
    for group in [ways] if together else [[way] for way in ways]:
        with ExitStack() as stack:
            sides = {way.name: partial(step, way.name, stack.enter_context(started(way)), courses[way.name]) for way in group}
            for name, seconds in harness.take_turns(sides, repeats, warm_up=2 if together else 10, label=label).items():
                courses[name].seconds = seconds
    return courses


def same_work(courses: Mapping[str, Course], names: Sequence[str]) -> None:
    """Hold that these ways had the same losses, so that all did the same."""
    for losses in zip(*(courses[name].losses for name in names), strict=True):
        assert max(losses) - min(losses) < 1e-3, f"not the same work: {dict(zip(names, losses, strict=True))}"


@contextmanager
def started(way: Way) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of a way, which build it and wait; they are gone afterwards."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    path = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": str(way.threads)}
    if way.allocator == "tuned":
        environment["GLIBC_TUNABLES"] = TUNED
    command = [sys.executable, "-m", "pangu.benchmarks.worker", way.program, way.allocator, json.dumps(way.config)]
    processes = []
    try:
        for rank in range(way.processes):
            own = environment | rank_environment(rank, way.processes, port)
            # Its errors go to ours: a pipe that nobody reads fills.
            processes.append(subprocess.Popen(command, env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()


def step(name: str, processes: Sequence[subprocess.Popen[str]], course: Course) -> float:
    """One step of all processes: seconds of the slowest. Loss and memory go into the course.

    Raises:
        InputError: if a process ends instead.
    """
    for process in processes:
        assert process.stdin is not None
        try:
            process.stdin.write("step\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer that does not come tells
    answers = []
    for process in processes:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise InputError(f"a process of {name!r} ended; its error is above. Lower the sizes if memory ran out.")
        answers.append(json.loads(line))
    course.losses.append(answers[0]["loss"])
    course.peak_bytes = max(answer["peak_bytes"] for answer in answers)
    return max(answer["seconds"] for answer in answers)
