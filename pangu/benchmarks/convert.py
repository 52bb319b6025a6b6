"""Conversion of weights, next to copying the same bytes on the same disk.

A model of random weights is written as one MindSpore file, never whole in memory, and goes through tools/convert_checkpoint.py to
huggingface, to megatron with eight tensor-parallel files, and back. What comes back must be the same file, byte for byte.

Each conversion is a process of its own, its start and imports counted. Before it, its input is copied: each file read and written in blocks
of 16 MiB with fsync at the end, as conversion does too. Both start with an input that is on the disk and not in the page cache. Copies and
conversions alternate; times are medians, memory is the highest. The import baseline is the same command on the same input, refused for its
output exists: it has imported everything and opened the source.
"""

from __future__ import annotations

import argparse
import filecmp
import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from pangu.benchmarks import harness
from pangu.benchmarks.machine import Usage, last_line, watch
from pangu.config.presets import MODEL_PRESETS
from pangu.errors import InputError
from pangu.files import remove, sync

if TYPE_CHECKING:
    import torch

    from pangu.config import ModelConfig
    from pangu.conversion.weights import Weights

TOOL = ("-m", "pangu.convert")
STEPS: list[tuple[str, str, list[str]]] = [
    ("mindspore", "huggingface", []),
    ("huggingface", "megatron", ["--tensor-parallel", "8"]),
    ("megatron", "mindspore", []),
]
BLOCK_BYTES = 16 * 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this task."""
    parser.add_argument("--preset", choices=MODEL_PRESETS, default="2.6B", help="size of the model (default: %(default)s)")
    parser.add_argument("--layers", type=int, metavar="N", help="its layers, query layer included; default: the preset's")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="fp16", help="of the weights (default: %(default)s)")
    harness.add_counts(parser, {"repeats": (3, "of each copy and conversion")})
    harness.add_workdir(parser, "on the disk to measure")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the weights, copy and convert them, and remove everything.

    Raises:
        InputError: if an option is impossible, the disk has no room, or a conversion is refused.
    """
    import torch

    from pangu.config import ModelConfig

    harness.check_counts(arguments, "layers", "repeats")
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[arguments.dtype]
    layers = {} if arguments.layers is None else {"num_layers": arguments.layers}
    # The 200B model's final norm sits where the published port, which megatron files are for, cannot have it.
    model = ModelConfig.model_validate({"preset": arguments.preset, "final_norm": "before_query", **layers})
    weights = random_weights(model, dtype)
    sizes = [math.prod(tensor.shape) * dtype.itemsize for tensor in weights.tensors.values()]
    with harness.working_folder(arguments) as folder:
        _check_room(arguments.workdir, sum(sizes))
        ours, copies = _measure(folder, weights, arguments.repeats)
    return {
        "model": {
            "preset": arguments.preset,
            "layers": model.num_layers,
            "dtype": arguments.dtype,
            "bytes": sum(sizes),
            "largest_tensor_bytes": max(sizes),
        },
        "ours": harness.of_ways(ours),
        "peers": {"copy": harness.of_ways(copies)},
        "ratios": {"copy": {f"seconds, {step}": copies[step]["seconds"] / ours[step]["seconds"] for step in ours}},
    }


def random_weights(model: ModelConfig, dtype: torch.dtype) -> Weights:
    """Weights that are drawn when they are read, the same ones every time."""
    import torch

    from pangu.conversion.weights import Weights, model_specs
    from pangu.tensor_files.lazy_tensor import LazyTensor

    def lazy(name: str, shape: tuple[int, ...]) -> LazyTensor:
        def read() -> torch.Tensor:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            return torch.empty(shape, dtype=dtype).normal_(std=0.02, generator=generator)

        return LazyTensor(shape, dtype, read)

    return Weights(model, {name: lazy(name, spec.shape) for name, spec in model_specs(model).items()}, "random")


def _check_room(workdir: Path, size: int) -> None:
    """There must be room for the source, a conversion's input and its output."""
    free = shutil.disk_usage(workdir).free
    needed = 3 * size + 2**28
    if free < needed:
        raise InputError(
            f"--workdir {workdir}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed (three times the model). "
            "Name another disk, or measure fewer --layers."
        )


def _measure(folder: Path, weights: Weights, repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics of the conversions and of the copies, by step."""
    from pangu.conversion.convert import convert
    from pangu.conversion.weights import WriteOptions

    harness.say(f"writing random weights to {folder}")
    source = given = folder / "mindspore.ckpt"
    convert(weights, "mindspore", source, WriteOptions())
    ours: dict[str, Any] = {}
    copies: dict[str, Any] = {}
    for number, (before, after, options) in enumerate(STEPS):
        step, output = f"{before} -> {after}", folder / f"{number}-{after}"
        command = [sys.executable, *TOOL, "--from", before, "--to", after, "--input", given, *options, "--output"]
        ours[step], copies[step] = _measure_step(step, command, given, output, repeats)
        if given != source:
            remove(given)
        given = output
    if not filecmp.cmp(source, given, shallow=False):
        raise AssertionError(f"{given} differs from {source} after {' -> '.join(after for _, after, _ in STEPS)}")
    return ours, copies


def _measure_step(step: str, command: list[object], given: Path, output: Path, repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics of a conversion, whose command lacks its output, and of copying what it is given."""
    baseline = _run([*command, given.parent], refused="exists already")
    converted: list[Usage] = []

    def conversion() -> float:
        remove(output)
        _drop_from_cache(given)
        converted.append(_run([*command, output]))
        return converted[-1].seconds

    def copying() -> float:
        _drop_from_cache(given)
        seconds = copy(given, given.parent / "copy")
        remove(given.parent / "copy")
        return seconds

    seconds = harness.take_turns({"conversion": conversion, "copy": copying}, repeats, label=f"{step}, turn")
    peak = max(usage.peak_bytes for usage in converted)
    ours = {
        **harness.median_and_all("seconds", seconds["conversion"]),
        "peak_bytes": peak,
        "baseline_bytes": baseline.peak_bytes,
        "over_baseline_bytes": peak - baseline.peak_bytes,
        "anonymous_over_baseline_bytes": max(usage.anonymous_bytes for usage in converted) - baseline.anonymous_bytes,
        "baseline_seconds": baseline.seconds,
    }
    return ours, harness.median_and_all("seconds", seconds["copy"])


def _run(command: Sequence[object], refused: str = "") -> Usage:
    """A conversion that is done, or refused with these words."""
    usage = watch(command)
    if usage.exit_code != (2 if refused else 0) or refused not in usage.errors:
        raise InputError(f"a conversion failed: {last_line(usage.errors)}")
    return usage


def _files(path: Path) -> list[Path]:
    return [entry for entry in sorted(path.rglob("*")) if entry.is_file()] if path.is_dir() else [path]


def _drop_from_cache(path: Path) -> None:
    """So that the next reader reads from the disk. What was written and not synced would stay."""
    for file in _files(path):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy(source: Path, target: Path) -> float:
    """Copy a file, or a directory's files, through this process's memory onto the disk; in seconds.

    No copy inside the kernel, which file systems do without copying.
    """
    began = time.perf_counter()
    block = memoryview(bytearray(BLOCK_BYTES))
    for number, file in enumerate(_files(source)):
        copy = target if source.is_file() else target / str(number)
        copy.parent.mkdir(exist_ok=True)
        with open(file, "rb", buffering=0) as reader, open(copy, "wb", buffering=0) as writer:
            while count := reader.readinto(block):
                left = block[:count]
                while left:
                    left = left[writer.write(left) :]
            os.fsync(writer.fileno())
    sync(target)
    return time.perf_counter() - began


def table(result: dict[str, Any]) -> Table:
    """The result for people: a column for each conversion."""
    model, ours, copies, ratios = result["model"], result["ours"], result["peers"]["copy"], result["ratios"]["copy"]
    steps = [f"{before} -> {after}" for before, after, _ in STEPS]
    table = harness.new_table(
        f"{model['preset']}, num_layers {model['layers']}, {model['dtype']}: {model['bytes'] / 1e9:.2f} GB, "
        f"largest tensor {model['largest_tensor_bytes'] / 1e6:,.0f} MB\nthe round trip gives the same bytes",
        result["device"],
        "",
        *(step.replace(" -> ", "\n-> ") for step in steps),
    )
    table.add_row("seconds", *(f"{ours[f'seconds, {step}']:.1f}" for step in steps))
    table.add_row("copy, seconds", *(f"{copies[f'seconds, {step}']:.1f}" for step in steps))
    table.add_row("speed of copying", *(f"{ratios[f'seconds, {step}']:.2f}x" for step in steps))
    table.add_row("MB/s", *(f"{model['bytes'] / 1e6 / ours[f'seconds, {step}']:,.0f}" for step in steps))
    for name, key in (
        ("peak resident, MB", "peak_bytes"),
        ("import baseline, MB", "baseline_bytes"),
        ("over the baseline, MB", "over_baseline_bytes"),
        ("of it no file's, MB", "anonymous_over_baseline_bytes"),
    ):
        table.add_row(name, *(f"{ours[f'{key}, {step}'] / 1e6:,.0f}" for step in steps))
    return table
