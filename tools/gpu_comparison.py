"""Measure the GPU utilisation of training next to the peers that are installed; takes minutes on a machine with a GPU.

    python tools/gpu_comparison.py --output gpu.json
    python tools/gpu_comparison.py --compile --output gpu-compiled.json
    python tools/gpu_comparison.py --only 2.6B --batch 8 --output gpu-2.6B.json

It runs from this source with this project's own dependencies. The peers are installed beforehand:

    pip install "transformers>=5.4,<6" megatron-core

It trains the 350M and the 2.6B model in bf16 on sequences of 1024 without recomputation or dropout: as pangu.train does with ZeRO-0 and
ZeRO-1, in a plain loop without the engine, and transformers' GPT-2 of equal shape; megatron-core's GPT too if it is installed (its local
layers, which need neither Transformer Engine nor apex). One after the other, each in a process of its own. It prints tokens per second,
peak memory and MFU, the share of the device's peak in operations counted as pangu.config.sizes.flops_per_token does, and writes all of it
as one JSON object. A peer that fails, for it needs more memory, is left out and named; without megatron-core the others are compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHAPES = {
    "350M": {"layers": 24, "hidden": 1024, "heads": 16, "batch": 16},
    "2.6B": {"layers": 32, "hidden": 2560, "heads": 32, "batch": 4},
}
"""The models to compare, with the batch size that fits on a device of 80 GB, also for GPT-2."""
COMMON = {"sequence": 1024, "vocab": 40000, "precision": "bf16", "dropout": 0.0, "threads": None}
NEEDED = {"torch": "torch", "deepspeed": "deepspeed", "pydantic": "pydantic", "rich": "rich", "yaml": "pyyaml", "numpy": "numpy"}
"""Required packages by their import name."""
PEERS = {"transformers": "transformers>=5.4,<6"}
OPTIONAL = {"megatron.core": "megatron-core"}
MEGATRON = "megatron-core, local layers"


def missing(packages: dict[str, str]) -> list[str]:
    """The packages that are not installed, by pip's name."""
    return [package for name, package in packages.items() if not _importable(name)]


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one shape in all ways.

    Args:
        arguments: the options of `tools/benchmark.py train`.

    Raises:
        InputError: if one of our own ways fails.
    """
    from pangu.benchmarks import train
    from pangu.benchmarks.machine import describe
    from pangu.benchmarks.workers import Course, Way, take_turns
    from pangu.errors import InputError

    ways = train.ways(arguments)
    if not missing(OPTIONAL):
        ways.append(Way(MEGATRON, train.settings(arguments, 0), "megatron", threads=ways[0].threads))
    courses: dict[str, Course] = {}
    failed = []
    for way in ways:
        try:
            courses |= take_turns([way], arguments.repeats)
        except InputError as error:
            if way.name in train.OURS:
                raise
            failed.append(way.name)
            print(error, file=sys.stderr, flush=True)
    return {"task": "train", "device": describe(), "failed": failed, **train.summary(ways, courses, arguments)}


def main() -> None:
    """Check what is installed, train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the JSON object to write")
    parser.add_argument("--only", choices=SHAPES, action="append", help="train only this shape; may be given twice")
    parser.add_argument("--batch", type=int, metavar="N", help="samples per step (default: 16 for 350M, 4 for 2.6B)")
    parser.add_argument(
        "--repeats", type=int, default=30, metavar="N", help="steps of each, after ten warm-up steps (default: %(default)s)"
    )
    parser.add_argument("--compile", action="store_true", help="train all with torch.compile; takes minutes more")
    arguments = parser.parse_args()
    if lacking := missing({**NEEDED, **PEERS}):
        print(f"error: not installed: {' '.join(lacking)}. Run pip install {' '.join(lacking)}.", file=sys.stderr)
        sys.exit(2)
    if lacking := missing(OPTIONAL):
        print(f"not compared with {' '.join(lacking)}, which is not installed", file=sys.stderr)
    sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
    from pangu.errors import exit_code

    exit_code(lambda: _run(arguments))()


def _run(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from pangu.benchmarks import train
    from pangu.benchmarks.workers import on_cpu
    from pangu.errors import InputError

    if on_cpu():
        raise InputError("no GPU or NPU was found. On a CPU run: python tools/benchmark.py train.")
    for option in ("batch", "repeats"):
        if getattr(arguments, option) is not None and getattr(arguments, option) < 1:
            raise InputError(f"--{option} {getattr(arguments, option)}: expected 1 or more.")
    results = {}
    for name in arguments.only or SHAPES:
        shape = {**SHAPES[name], **COMMON, "repeats": arguments.repeats, "compile": arguments.compile}
        shape |= {"batch": arguments.batch} if arguments.batch else {}
        print(f"{name}:", file=sys.stderr, flush=True)
        results[name] = compare(argparse.Namespace(**shape))
        Console().print(train.table(results[name]))
        arguments.output.write_text(json.dumps(results, indent=1), encoding="utf-8")  # what is done, if the next one fails


if __name__ == "__main__":
    main()
