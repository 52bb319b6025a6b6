"""From the command to the first step of the quickstart recipe, and a checkpoint's way to the disk and back.

Start: `python -m pangu.train` of ds_configs/quickstart.yaml, in a process of its own whose phases are timed where they are called. It
has one thread, as torchrun gives it. The peer is `python -c "import torch"`, which no program of this kind can do without.

Checkpoint: training state of a model of --parameters million is saved with fsync, verified against its hashes and loaded in one process.
The peer is copying as many bytes on the same disk, fsync included. What is read back lies in the page cache, for both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from pangu.benchmarks import harness
from pangu.benchmarks.convert import copy
from pangu.benchmarks.machine import call, run
from pangu.config.recipes import RECIPES

RECIPE = RECIPES / "quickstart.yaml"
PHASES = ("imports", "data index", "process group", "model", "engine", "until the first step", "first step")
COUNTS = {"repeats": (5, "starts, and saves"), "parameters": (25, "millions, of the checkpoint")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this task."""
    harness.add_counts(parser, COUNTS)
    harness.add_workdir(parser, "on the disk to measure")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the quickstart's data, start and save in turns, and remove everything.

    Raises:
        InputError: if an option is impossible or a run fails.
    """
    harness.check_counts(arguments, *COUNTS)
    with harness.working_folder(arguments) as folder:
        prepare(folder)
        starts: list[dict[str, float]] = []

        def started() -> float:
            # CLOCK_MONOTONIC is one for all processes.
            starts.append(_child("start", folder, time.monotonic(), folder / f"run-{len(starts)}"))
            return sum(starts[-1].values())

        seconds_of = harness.take_turns({"start": started, "import torch": lambda: _run("-c", "import torch")[1]}, arguments.repeats)
        saved = _child("checkpoint", folder, arguments.parameters, arguments.repeats)
    seconds, torch_seconds = map(statistics.median, seconds_of.values())
    speed = {what: saved["bytes"] / statistics.median(saved[what]) for what in ("save", "verify", "load", "copy")}
    return {
        "model": {"checkpoint_bytes": saved["bytes"]},
        "ours": {
            **harness.median_and_all("seconds", seconds_of["start"]),
            **{f"seconds, {phase}": statistics.median(start[phase] for start in starts) for phase in PHASES},
            **{f"bytes_per_second, {what}": speed[what] for what in ("save", "verify", "load")},
        },
        "peers": {"import torch": {"seconds": torch_seconds}, "copy": {"bytes_per_second": speed["copy"]}},
        "ratios": {
            "import torch": {"seconds": torch_seconds / seconds},
            "copy": {f"bytes_per_second, {what}": speed[what] / speed["copy"] for what in ("save", "load")},
        },
    }


def prepare(folder: Path) -> None:
    """The quickstart's corpus, tokenizer and tokens."""
    from pangu.config.parsing import read_yaml

    vocab_size = read_yaml(RECIPE)["model"]["vocab_size"]
    corpus = folder / "corpus.txt"
    _run("-m", "pangu.quickstart.corpus", "--output", folder)
    _run("-m", "pangu.train_tokenizer", "--input", corpus, "--vocab-size", vocab_size, "--output", folder / "tokenizer")
    _run("-m", "pangu.preprocess", "--input", corpus, "--tokenizer", folder / "tokenizer", "--output", folder / "corpus")


def _run(*words: object) -> tuple[str, float]:
    return run(words, str(words[1]), OMP_NUM_THREADS="1")


def _child(function: str, *words: object) -> Any:
    """What a function below gives in a process of its own."""
    printed, _ = run(call(f"{__name__}.{function}", *words), function, OMP_NUM_THREADS="1")
    return json.loads(printed.splitlines()[-1])


def _overrides(folder: str, run_dir: str) -> list[str]:
    return [f"data.train={folder}/corpus", f"data.tokenizer={folder}/tokenizer", f"run.dir={run_dir}"]


def start(folder: str, began: str, run_dir: str) -> None:
    """Train one step as `python -m pangu.train` does, and print the seconds of each phase."""
    spent = dict.fromkeys(PHASES, 0.0)
    mark = float(began)

    def lap(phase: str) -> None:
        nonlocal mark
        now = time.monotonic()
        spent[phase] += now - mark
        mark = now

    def timed(owner: Any, name: str, phase: str) -> None:
        """Count what happens before a call as idle between phases, and the call to its phase."""
        function: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            lap("until the first step")
            try:
                return function(*args, **kwargs)
            finally:
                lap(phase)

        setattr(owner, name, call)

    from pangu.config import load_config

    config = load_config(RECIPE, [*_overrides(folder, run_dir), "train.steps=1", "train.eval_every=0"])
    import deepspeed

    from megatron_ext.supervision import rendezvous
    from pangu.config.layout import resolve
    from pangu.engine import engine
    from pangu.training import loop
    from pangu.training import run as training

    lap("imports")
    timed(training, "build_datasets", "data index")
    timed(rendezvous, "initialize", "process group")
    timed(engine, "PanguModel", "model")
    timed(deepspeed, "initialize", "engine")
    timed(loop.TrainingLoop, "_step", "first step")
    training.run_training(config, resolve(config, 1))
    os.write(1, (json.dumps(spent) + "\n").encode())


def checkpoint(folder: str, millions: str, repeats: str) -> None:
    """Save, verify, load and copy in turns, and print the seconds of each and the bytes of a checkpoint."""
    from megatron_ext.initialize import random_weights
    from megatron_ext.supervision import rendezvous
    from megatron_ext.topology import Groups
    from pangu.config import load_config
    from pangu.config.layout import resolve
    from pangu.engine.engine import TrainingEngine
    from pangu.engine.manifest import Progress
    from pangu.training.checkpoint import load_checkpoint, save_checkpoint, verify

    layers, width = 4, 64 * round((int(millions) * 1e6 / 4 / 12) ** 0.5 / 64) or 64
    sizes = [f"model.num_layers={layers}", f"model.hidden_size={width}", f"model.num_heads={width // 64}"]
    config = load_config(RECIPE, [*_overrides(folder, f"{folder}/saved"), *sizes, "checkpoint.keep=1"])
    rendezvous.initialize(60)
    layout = resolve(config, 1)
    groups = Groups.create(layout.topology, 60)
    engine = TrainingEngine(config, layout, groups, random_weights(1))
    seconds: dict[str, list[float]] = {what: [] for what in ("save", "verify", "load", "copy")}

    def timed(what: str, action: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = action()
        seconds[what].append(time.perf_counter() - began)
        return result

    for number in range(int(repeats) + 1):
        path = timed("save", partial(save_checkpoint, engine, Progress(step=number)))
        timed("verify", partial(verify, path, groups.world))
        timed("load", partial(load_checkpoint, engine, path))
        timed("copy", partial(copy, path, Path(folder) / "copied"))
    size = sum(file.stat().st_size for file in path.iterdir())
    seconds = {what: every[1:] for what, every in seconds.items()}  # the first warms up
    os.write(1, (json.dumps({**seconds, "bytes": size}) + "\n").encode())


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    ours, peers = result["ours"], result["peers"]
    table = harness.new_table("one start of ds_configs/quickstart.yaml, one checkpoint", result["device"], "", "", "peer")
    for phase in PHASES:
        peer = f"import torch {peers['import torch']['seconds']:.2f} s" if phase == "imports" else ""
        table.add_row(phase, f"{ours[f'seconds, {phase}']:.2f} s", peer)
    table.add_row("command to first step", f"{ours['seconds']:.2f} s", "", end_section=True)
    table.add_row("checkpoint", f"{result['model']['checkpoint_bytes'] / 1e6:,.0f} MB", "")
    for what in ("save", "verify", "load"):
        peer = f"copy {peers['copy']['bytes_per_second'] / 1e6:,.0f} MB/s" if what == "save" else ""
        table.add_row(what, f"{ours[f'bytes_per_second, {what}'] / 1e6:,.0f} MB/s", peer)
    return table
