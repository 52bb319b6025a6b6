"""What a layout costs on this machine: the same step by one process and by several, and by the engine and a bare PyTorch loop.

Each way to train is a set of processes that wait. One step at a time they take turns, so that a machine that slows down slows all of
them; the losses are compared, so that all do the same work. Each process computes with the threads that its share of the cores gives it.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from pangu.errors import InputError

COUNTS = {"layers": 4, "hidden": 1024, "heads": 16, "vocab": 8192, "sequence": 256, "repeats": 5, "cores": 2}
"""Whole-number options and their defaults."""
WORKER = Path(__file__).with_name("layout_worker.py")


@dataclass(frozen=True)
class Way:
    """One way to do a step."""

    name: str
    processes: int = 1
    bare: bool = False
    """A loop of forward, backward, clipping and optimizer without DeepSpeed."""
    parallel: dict[str, int] = field(default_factory=dict)
    micro_batch: int = 2


@dataclass(frozen=True)
class Comparison:
    """Ways to do the same step; the first is what the others are measured by."""

    name: str
    ways: tuple[Way, ...]
    samples: int
    """Of a step."""
    shorter: int = 1
    """Divides the sequence."""


COMPARISONS = (
    Comparison(
        "engine",
        (
            Way("bare PyTorch loop", bare=True),
            Way("engine, ZeRO-0", parallel={"zero_stage": 0}),
            Way("engine, ZeRO-1", parallel={"zero_stage": 1}),
        ),
        samples=2,
    ),
    Comparison(
        "tensor",
        (Way("one process", parallel={"zero_stage": 0}), Way("tensor 2", 2, parallel={"zero_stage": 0, "tensor": 2})),
        samples=2,
    ),
    Comparison(
        "pipeline",
        (Way("one process, 8 micro-batches"), Way("pipeline 2, 8 micro-batches", 2, parallel={"pipeline": 2})),
        samples=16,
        shorter=2,
    ),
    Comparison("data", (Way("one process", micro_batch=4), Way("data 2, ZeRO-1", 2)), samples=4),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this task."""
    for name, default in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"(default {default})")
    names = [comparison.name for comparison in COMPARISONS]
    parser.add_argument("--only", choices=names, action="append", help="one comparison; may be given several times")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train in turns.

    Raises:
        InputError: if an option is impossible or a process ends early.
    """
    for name in COUNTS:
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} {getattr(arguments, name)}: expected 1 or more.")
    result: dict[str, Any] = {"model": {name: getattr(arguments, name) for name in COUNTS}, "ours": {}, "peers": {}, "ratios": {}}
    result["all_ratios"] = {}
    for comparison in COMPARISONS:
        if arguments.only and comparison.name not in arguments.only:
            continue
        seconds = take_turns(comparison, arguments)
        first, *others = comparison.ways
        peer = f"{comparison.name}: {first.name}"
        result["peers"][peer] = {"step_seconds": statistics.median(seconds[first.name])}
        for way in others:
            name = f"{comparison.name}: {way.name}"
            ratios = [theirs / ours for theirs, ours in zip(seconds[first.name], seconds[way.name], strict=True)]
            result["ours"][name] = {"step_seconds": statistics.median(seconds[way.name])}
            result["ratios"].setdefault(peer, {})[f"speed, {way.name}"] = statistics.median(ratios)
            result["all_ratios"].setdefault(peer, {})[f"speed, {way.name}"] = ratios
    return result


def take_turns(comparison: Comparison, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each way's steps, one a turn. Two turns warm up and are not counted; every other turn goes backwards."""
    seconds: dict[str, list[float]] = {way.name: [] for way in comparison.ways}
    with ExitStack() as stack:
        workers = {way.name: stack.enter_context(_started(way, comparison, arguments)) for way in comparison.ways}
        for turn in range(arguments.repeats + 2):
            losses = {}
            for name in list(workers)[:: 1 if turn % 2 else -1]:
                spent, losses[name] = _step(name, workers[name])
                if turn >= 2:
                    seconds[name].append(spent)
                    print(f"{comparison.name}, turn {turn - 1} of {arguments.repeats}: {name} {spent:.3f} s", file=sys.stderr, flush=True)
            assert max(losses.values()) - min(losses.values()) < 1e-3, f"not the same work: losses {losses}"
    return seconds


@contextmanager
def _started(way: Way, comparison: Comparison, arguments: argparse.Namespace) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of a way, built and waiting."""
    sequence = max(1, arguments.sequence // comparison.shorter)
    config = {
        "model": {
            "num_layers": arguments.layers,
            "hidden_size": arguments.hidden,
            "num_heads": arguments.heads,
            "vocab_size": arguments.vocab,
            "max_positions": sequence,
            "hidden_dropout": 0.0,  # ways draw different masks, and would have different losses
            "attention_dropout": 0.0,
        },
        "parallel": way.parallel,
        "train": {"micro_batch_size": way.micro_batch, "global_batch_size": comparison.samples, "steps": 1000},
        "data": {"train": ["synthetic"]},
        "run": {"dir": "unused"},
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    threads = str(max(1, arguments.cores // way.processes))
    workers = []
    try:
        for rank in range(way.processes):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(way.processes)}
            environment = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": threads}
            command = [sys.executable, str(WORKER), json.dumps(config), *["--bare"] * way.bare]
            # Its errors go to ours: a pipe that nobody reads fills.
            workers.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        yield workers
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.communicate()


def _step(name: str, workers: Sequence[subprocess.Popen[str]]) -> tuple[float, float]:
    """One step of all processes: seconds of the slowest, and the loss."""
    for worker in workers:
        assert worker.stdin is not None
        try:
            worker.stdin.write("step\n")
            worker.stdin.flush()
        except BrokenPipeError:
            pass  # the answer that does not come tells
    answers = []
    for worker in workers:
        assert worker.stdout is not None
        line = worker.stdout.readline()
        if not line:
            raise InputError(f"a process of {name!r} ended; its error is above. Lower the sizes if memory ran out.")
        answers.append(json.loads(line))
    return max(answer["seconds"] for answer in answers), answers[0]["loss"]


def table(result: dict[str, Any]) -> Table:
    """The result for people: a row for each way to train."""
    model = result["model"]
    table = Table(
        title=f"{model['layers']} layers, hidden {model['hidden']}, vocabulary {model['vocab']}, sequence {model['sequence']}",
        caption=f"{result['device']}; medians of {model['repeats']} paired steps",
    )
    for heading in ("", "step s", "speed", "range"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for peer, ratios in result["all_ratios"].items():
        table.add_row(peer, f"{result['peers'][peer]['step_seconds']:.3f}", "1", "")
        for name, values in ratios.items():
            own = f"{peer.partition(':')[0]}: {name.removeprefix('speed, ')}"
            row = f"{statistics.median(values):.2f}x", f"{min(values):.2f} .. {max(values):.2f}"
            table.add_row(own, f"{result['ours'][own]['step_seconds']:.3f}", *row)
        table.add_section()
    return table
