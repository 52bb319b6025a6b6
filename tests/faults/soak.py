"""A run of a thousand steps whose ranks are killed at random, again and again, ends with the weights of one that is left alone.

    python tests/faults/soak.py                                     both launchers; `make soak`
    python tests/faults/soak.py --steps 300 --kills 3 --seed 7 --launcher deepspeed

torchrun restarts by itself, the deepspeed launcher under tools/supervise.py. Dropout is on, checkpoints are written in the background. The
run that is left alone is watched meanwhile: memory, file descriptors and threads of its ranks must not grow. Prints a table in Markdown;
exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import conftest  # noqa: E402, F401  (the environment of the ranks)
from helpers.tiny_run import values, write_recipe  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

ROOT, BIN = TESTS.parent, Path(sys.executable).parent
RANKS = 2
LIMIT_SECONDS = 1200.0
SETTINGS = ["parallel.tensor=2", "model.hidden_dropout=0.1", "model.attention_dropout=0.1", "train.eval_every=0"]
SETTINGS += ["checkpoint.save_every=25", "checkpoint.async_save=true", "run.hang_timeout=60", "run.log_every=100"]
# Growth that is none: what allocators and lazy imports take in the first steps is over at a fifth of the run.
MAX_GROWTH_BYTES, MAX_GROWTH_COUNT = 24 * 2**20, 0


def command(launcher: str, recipe: Path, run: Path, steps: int, restarts: int) -> list[str]:
    """How a user would start it."""
    arguments = ["--config", str(recipe), f"run.dir={run}", f"train.steps={steps}", *SETTINGS]
    if launcher == "torchrun":
        torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(RANKS), "--max-restarts", str(restarts)]
        return [*torchrun, "-m", "pangu.train", *arguments]
    deepspeed = [str(BIN / "deepspeed"), "--num_gpus", str(RANKS), "--master_port", "29781", "--module", "pangu.train", *arguments]
    return [sys.executable, str(ROOT / "tools/supervise.py"), "--max-restarts", str(restarts), "--", *deepspeed]


def ranks_of(run: Path) -> dict[int, int]:
    """Process ids of a run's ranks by their number."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
            environment = dict(entry.partition("=")[::2] for entry in (process / "environ").read_bytes().decode().split("\0"))
        except OSError:
            continue
        # Launchers have the same words, but no rank.
        if f"run.dir={run}" in words and "RANK" in environment and "LOCAL_RANK" in environment and "torchrun" not in words[1]:
            found[int(environment["RANK"])] = int(process.name)
    return found


def steps_done(run: Path) -> int:
    """The newest step of a run's metrics."""
    try:
        return int(values(run, "step")[-1])
    except (OSError, IndexError, ValueError):
        return 0


def usage(pid: int) -> tuple[int, int, int]:
    """Bytes of its own memory, open files and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    return int(fields["RssAnon"].split()[0]) * 1024, len(os.listdir(f"/proc/{pid}/fd")), int(fields["Threads"])


def leave_alone(recipe: Path, run: Path, steps: int) -> list[str]:
    """A run that nobody kills; what grew in it."""
    process = subprocess.Popen(command("torchrun", recipe, run, steps, 0), stdout=subprocess.DEVNULL)
    first: dict[int, tuple[int, int, int]] = {}
    last: dict[int, tuple[int, int, int]] = {}
    while process.poll() is None:
        done = steps_done(run)
        for rank, pid in ranks_of(run).items():
            try:
                seen = usage(pid)
            except (OSError, KeyError):
                continue
            if steps // 5 <= done:
                first.setdefault(rank, seen)
            if done < steps - 5:  # at the end it writes its weights
                last[rank] = seen
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"the run that was left alone ended with code {process.returncode}")
    problems = [] if first else ["the ranks were never seen"]
    for rank, (memory, files, threads) in first.items():
        grown = [now - before for now, before in zip(last[rank], (memory, files, threads), strict=True)]
        told = f"memory {grown[0] / 2**20:+.1f} MiB, files {grown[1]:+d}, threads {grown[2]:+d}"
        print(f"rank {rank}, left alone, from step {steps // 5} on: {told}", flush=True)
        if grown[0] > MAX_GROWTH_BYTES or grown[1] > MAX_GROWTH_COUNT or grown[2] > MAX_GROWTH_COUNT:
            problems.append(f"rank {rank} grows")
    return problems


def kill_at_random(launcher: str, recipe: Path, run: Path, steps: int, kills: int, generator: random.Random) -> tuple[int, float]:
    """A run whose ranks are killed; how often that was, and how long it took."""
    began = time.monotonic()
    process = subprocess.Popen(command(launcher, recipe, run, steps, kills + 1), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = 0
    for at in sorted(generator.sample(range(5, steps - 5), kills)):
        while process.poll() is None and (steps_done(run) < at or len(ranks_of(run)) < RANKS):
            if time.monotonic() - began > LIMIT_SECONDS:
                process.kill()
                raise SystemExit(f"{launcher}: no end after {LIMIT_SECONDS:.0f} s")
            time.sleep(0.05)
        victim = ranks_of(run).get(generator.randrange(RANKS))
        if process.poll() is None and victim:
            os.kill(victim, signal.SIGKILL)
            done += 1
            time.sleep(1.0)  # until it has gone
    try:
        code = process.wait(LIMIT_SECONDS - (time.monotonic() - began))
    finally:
        process.kill()
    if code:
        raise SystemExit(f"{launcher}: the run ended with code {code}")
    return done, time.monotonic() - began


def differences(one: Path, other: Path) -> list[str]:
    """Tensors that are not the same bits, and steps whose last loss is not."""
    ours, theirs = (
        {name: tensor for file in sorted((run / "weights").glob("*.safetensors")) for name, tensor in load_file(file).items()}
        for run in (one, other)
    )
    found = [name for name in ours.keys() | theirs.keys() if name not in ours or name not in theirs or not ours[name].equal(theirs[name])]
    losses = [dict(zip(values(run, "step"), values(run, "loss"), strict=True)) for run in (one, other)]
    return found + [f"loss of step {step}" for step in losses[0] if losses[0][step] != losses[1].get(step)]


def main() -> None:
    """Soak, compare, and say what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=12, help="for each launcher")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--launcher", choices=["torchrun", "deepspeed"], action="append")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        recipe = write_recipe(root)
        problems = leave_alone(recipe, root / "alone", arguments.steps)
        print("| launcher | steps | kills | seconds | weights and losses |\n|---|---|---|---|---|", flush=True)
        for launcher in arguments.launcher or ["torchrun", "deepspeed"]:
            generator = random.Random(arguments.seed)
            killed, seconds = kill_at_random(launcher, recipe, root / launcher, arguments.steps, arguments.kills, generator)
            different = differences(root / "alone", root / launcher)
            verdict = "bit for bit those of the run left alone" if not different else f"{len(different)} differ: {', '.join(different[:3])}"
            print(f"| {launcher} | {arguments.steps} | {killed} | {seconds:.0f} | {verdict} |", flush=True)
            problems += [f"{launcher}: {verdict}"] if different else []
            problems += [f"{launcher}: just {killed} kills"] if killed < arguments.kills // 2 else []
    for problem in problems:
        print(f"problem: {problem}")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
