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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from pangu.benchmarks.convert import copy
from pangu.benchmarks.results import median_and_all
from pangu.config.recipes import RECIPES
from pangu.errors import InputError

ROOT = Path(__file__).parents[2]
RECIPE = RECIPES / "quickstart.yaml"
PHASES = ("imports", "data index", "process group", "model", "engine", "until the first step", "first step")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this task."""
    parser.add_argument("--repeats", type=int, default=5, metavar="K", help="starts, and saves (default: %(default)s)")
    parser.add_argument("--parameters", type=int, default=25, metavar="N", help="millions, of the checkpoint (default: %(default)s)")
    parser.add_argument("--workdir", type=Path, default=Path(), metavar="DIR", help="on the disk to measure (default: this directory)")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the quickstart's data, start and save in turns, and remove everything.

    Raises:
        InputError: if an option is impossible or a run fails.
    """
    for option in ("repeats", "parameters"):
        if getattr(arguments, option) < 1:
            raise InputError(f"--{option} {getattr(arguments, option)}: expected 1 or more.")
    if not arguments.workdir.is_dir():
        raise InputError(f"--workdir {arguments.workdir}: no such directory. Name one that exists.")
    with tempfile.TemporaryDirectory(prefix="benchmark-startup-", dir=arguments.workdir) as name:
        folder = Path(name)
        prepare(folder)
        starts, imports = [], []
        for repeat in range(arguments.repeats):
            began = time.perf_counter()
            _run(["-c", "import torch"])
            imports.append(time.perf_counter() - began)
            # CLOCK_MONOTONIC is one for all processes.
            starts.append(_child(folder, "start", str(time.monotonic()), str(folder / f"run-{repeat}")))
            print(f"start {repeat + 1} of {arguments.repeats}: {sum(starts[-1].values()):.2f} s", file=sys.stderr, flush=True)
        saved = _child(folder, "checkpoint", str(arguments.parameters), str(arguments.repeats))
    starts_seconds = [sum(start.values()) for start in starts]
    seconds, torch_seconds = statistics.median(starts_seconds), statistics.median(imports)
    speed = {what: saved["bytes"] / statistics.median(saved[what]) for what in ("save", "verify", "load", "copy")}
    return {
        "model": {"checkpoint_bytes": saved["bytes"]},
        "ours": {
            **median_and_all("seconds", starts_seconds),
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
    _run(["-m", "pangu.quickstart.corpus", "--output", folder])
    _run(["-m", "pangu.train_tokenizer", "--input", corpus, "--vocab-size", vocab_size, "--output", folder / "tokenizer"])
    _run(["-m", "pangu.preprocess", "--input", corpus, "--tokenizer", folder / "tokenizer", "--output", folder / "corpus"])


def _run(words: list[object]) -> str:
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=one_thread, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{words[1]} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1].removeprefix('error: ')}")
    return done.stdout


def _child(folder: Path, function: str, *words: str) -> Any:
    """What a function below gives in a process of its own."""
    script = f"import sys; sys.path[:0] = {sys.path!r}; from pangu.benchmarks import startup; startup.{function}(*sys.argv[1:])"
    return json.loads(_run(["-c", script, folder, *words]).splitlines()[-1])


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
    from pangu.training import loop, run

    lap("imports")
    timed(run, "build_datasets", "data index")
    timed(rendezvous, "initialize", "process group")
    timed(engine, "PanguModel", "model")
    timed(deepspeed, "initialize", "engine")
    timed(loop.TrainingLoop, "_step", "first step")
    run.run_training(config, resolve(config, 1))
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
    table = Table(title="one start of ds_configs/quickstart.yaml, one checkpoint", caption=result["device"])
    for heading in ("", "", "peer"):
        table.add_column(heading, justify="right" if table.columns else "left", no_wrap=True)
    for phase in PHASES:
        peer = f"import torch {peers['import torch']['seconds']:.2f} s" if phase == "imports" else ""
        table.add_row(phase, f"{ours[f'seconds, {phase}']:.2f} s", peer)
    table.add_row("command to first step", f"{ours['seconds']:.2f} s", "", end_section=True)
    table.add_row("checkpoint", f"{result['model']['checkpoint_bytes'] / 1e6:,.0f} MB", "")
    for what in ("save", "verify", "load"):
        peer = f"copy {peers['copy']['bytes_per_second'] / 1e6:,.0f} MB/s" if what == "save" else ""
        table.add_row(what, f"{ours[f'bytes_per_second, {what}'] / 1e6:,.0f} MB/s", peer)
    return table
