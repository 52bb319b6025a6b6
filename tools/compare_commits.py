"""Compare what the programs do at another commit with what they do here: for changes that must change nothing.

    python tools/compare_commits.py COMMIT

A worktree of the commit is made in a temporary directory. In it and in this checkout the same commands run: the quickstart's corpus,
tokenizer training, preprocessing, 25 training steps on two processes (tensor and pipeline parallel), conversion into every format that can
be written, generation with a seed, a plan, and `--help` of every program. Compared are the bytes of files, the metrics of every step but
for times, and what is printed. Exit code 0: all equal; 1: something differs, each on a line of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pangu.errors import InputError, exit_code

ROOT = Path(__file__).resolve().parent.parent
DOORS = ("convert_checkpoint", "inspect_checkpoint", "plan_parallel", "plot_run", "preprocess_data", "supervise", "train_tokenizer")
STEP_FIELDS = ("step", "loss", "grad_norm", "learning_rate", "consumed_samples", "consumed_tokens")
FORMATS = {"mindspore": "model.ckpt", "npy": "npy", "megatron": "megatron", "huggingface": "huggingface"}
VARYING = {"manifest.json"}
"""Files that hold hashes of others, whose bytes depend on addresses and times."""


def run(checkout: Path, work: Path, *words: object) -> str:
    """What a command prints; it runs in `work`, with the code of `checkout`."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{checkout}: {' '.join(command[1:])} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout


def results(checkout: Path, work: Path) -> Iterator[tuple[str, str]]:
    """Name and content of everything that is compared."""
    tools, recipe = checkout / "tools", checkout / "ds_configs" / "quickstart.yaml"
    for door in DOORS:
        yield f"{door} --help", run(checkout, work, tools / f"{door}.py", "--help")
    for program in ("train", "generate", "evaluate"):
        yield f"pangu.{program} --help", run(checkout, work, "-m", f"pangu.{program}", "--help")
    run(checkout, work, tools / "make_quickstart_corpus.py", "--output", "corpus.jsonl")
    run(checkout, work, tools / "train_tokenizer.py", "--input", "corpus.jsonl", "--vocab-size", 640, "--output", "tokenizer")
    run(checkout, work, tools / "preprocess_data.py", "--input", "corpus.jsonl", "--tokenizer", "tokenizer", "--output", "data/corpus")
    yield from files(work, "tokenizer", "data")
    for axis in ("tensor", "pipeline"):
        paths = ("data.train=data/corpus", "data.tokenizer=tokenizer", f"run.dir=runs/{axis}", f"parallel.{axis}=2", "train.steps=25")
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
        run(checkout, work, *launcher, "-m", "pangu.train", "--config", recipe, *paths)
        lines = map(json.loads, (work / "runs" / axis / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        for line in lines:
            if "loss" in line:
                yield f"runs/{axis} step {line['step']}", str({key: line[key] for key in STEP_FIELDS})
        yield from files(work, f"runs/{axis}/weights", f"runs/{axis}/checkpoints")
    weights = "runs/tensor/weights"
    for name, output in FORMATS.items():
        more = ("--tensor-parallel", 2) if name == "megatron" else ()
        run(checkout, work, tools / "convert_checkpoint.py", "--to", name, "--input", weights, "--output", f"converted/{output}", *more)
    yield from files(work, "converted")
    prompts = ("--prompt", "问：四川的省会是哪里？答：", "--max-new-tokens", 20, "--temperature", 0.8, "--seed", 3, "--json")
    yield "generate", run(checkout, work, "-m", "pangu.generate", "--model", weights, *prompts)
    cluster = checkout / "ds_configs" / "clusters" / "ascend910_2048.yaml"
    plan = ("--model", "200B", "--cluster", cluster, "--global-batch-size", 2048, "--json")
    yield "plan", run(checkout, work, tools / "plan_parallel.py", *plan).replace(str(checkout), "")


def files(work: Path, *folders: str) -> Iterator[tuple[str, str]]:
    """SHA-256 of every file, by its path."""
    for folder in folders:
        for path in sorted((work / folder).rglob("*")):
            if path.is_file() and path.name not in VARYING:
                yield str(path.relative_to(work)), hashlib.sha256(path.read_bytes()).hexdigest()


@exit_code
def main() -> None:
    """Run both sides and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("commit", help="anything that git can check out")
    commit = parser.parse_args().commit
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "checkout"
        command = ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(before), commit]
        added = subprocess.run(command, capture_output=True, text=True, check=False)
        if added.returncode:
            raise InputError(f"{commit}: cannot be checked out ({added.stderr.strip().splitlines()[-1]}).")
        try:
            sides = []
            for name, checkout in (("before", before), ("after", ROOT)):
                work = Path(folder) / name
                work.mkdir()
                sides.append(dict(results(checkout, work)))
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(before)], check=False)
    old, new = sides
    different = [name for name in old | new if old.get(name) != new.get(name)]
    for name in different:
        kind = "only before" if name not in new else "only after" if name not in old else "differs"
        print(f"{kind}: {name}")
    print(f"{len(old | new) - len(different)} of {len(old | new)} results are equal")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
