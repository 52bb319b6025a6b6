"""From text to a token data set, by one process and by more.

tools/preprocess_data.py turns the same file into a data set with 1, 2, 4 ... workers, up to --workers. Each run is a process of its own,
its start and imports counted; the numbers of workers take turns, and every other turn goes backwards. Of the times of one number the least
counts: what else the machine does can only add to them. Memory is the highest of all processes of a run together, in one more run each,
because looking at it takes time. The data sets must be the same, byte for byte. The peer is one worker.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from pangu.benchmarks import prose
from pangu.benchmarks.machine import watch
from pangu.benchmarks.results import of_ways
from pangu.errors import InputError

TOOL = ("-m", "pangu.preprocess")
ONE = "one worker"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this task."""
    prose.add_arguments(parser, megabytes=60)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help="the most workers (default: %(default)s, all processors)")
    parser.add_argument("--repeats", type=int, default=5, metavar="K", help="runs with each number of workers (default: %(default)s)")
    parser.add_argument("--workdir", type=Path, default=Path(), metavar="DIR", help="for text and data sets (default: this directory)")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the text, turn it into data sets, and remove everything.

    Raises:
        InputError: if an option is impossible, text or tokenizer cannot be read, or a run fails.
    """
    for option in ("workers", "repeats"):
        if getattr(arguments, option) < 1:
            raise InputError(f"--{option} {getattr(arguments, option)}: expected 1 or more.")
    if not arguments.workdir.is_dir():
        raise InputError(f"--workdir {arguments.workdir}: no such directory. Name one that exists.")
    texts = prose.texts(arguments)
    counts = sorted({min(2**power, arguments.workers) for power in range(arguments.workers.bit_length() + 1)})
    with tempfile.TemporaryDirectory(prefix="benchmark-preprocess-", dir=arguments.workdir) as name:
        folder = Path(name)
        tokenizer = prose.tokenizer(arguments, folder).path
        corpus = folder / "corpus.txt"
        corpus.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        seconds: dict[int, list[float]] = {workers: [] for workers in counts}
        for turn in range(arguments.repeats):
            for workers in counts[:: 1 if turn % 2 else -1]:
                seconds[workers].append(_run(corpus, tokenizer, folder / str(workers), workers))
                print(
                    f"turn {turn + 1} of {arguments.repeats}: {workers} workers {seconds[workers][-1]:.2f} s", file=sys.stderr, flush=True
                )
        memory = {
            workers: watch(_command(corpus, tokenizer, folder / str(workers), workers), family=True).family_bytes for workers in counts
        }
        for workers in counts:
            for suffix in (".bin", ".idx"):
                if not filecmp.cmp(folder / f"{workers}{suffix}", folder / f"1{suffix}", shallow=False):
                    raise AssertionError(f"{workers} workers and one wrote another {suffix}")
    described = prose.describe(arguments, texts)
    found = {workers: _summary(seconds[workers], memory[workers], described) for workers in counts}
    one = found.pop(1)
    return {
        "text": described,
        "ours": of_ways({f"{workers} workers": more for workers, more in found.items()}),
        "peers": {ONE: one},
        "ratios": {ONE: {f"seconds, {workers} workers": one["seconds"] / more["seconds"] for workers, more in found.items()}},
    }


def _command(corpus: Path, tokenizer: Path, output: Path, workers: int) -> list[str]:
    words = [sys.executable, *TOOL, "--input", corpus, "--tokenizer", tokenizer, "--output", output, "--workers", workers]
    return [str(word) for word in words]


def _run(corpus: Path, tokenizer: Path, output: Path, workers: int) -> float:
    """Seconds of one run."""
    began = time.perf_counter()
    done = subprocess.run(_command(corpus, tokenizer, output, workers), capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"preprocessing failed: {(done.stderr.strip().splitlines() or ['no message'])[-1].removeprefix('error: ')}")
    return time.perf_counter() - began


def _summary(every: list[float], peak_bytes: int, text: dict[str, Any]) -> dict[str, Any]:
    seconds = min(every)
    return {
        "seconds": seconds,
        "all_seconds": every,
        "documents_per_second": text["documents"] / seconds,
        "bytes_per_second": text["bytes"] / seconds,
        "peak_bytes": peak_bytes,
    }


def table(result: dict[str, Any]) -> Table:
    """The result for people: a row for each number of workers."""
    text = result["text"]
    table = Table(
        title=f"{text['source']}: {text['documents']:,} documents, {text['bytes'] / 1e6:,.1f} MB\nall runs wrote the same bytes",
        caption=result["device"],
    )
    for heading in ("workers", "seconds", "range", "documents/s", "MB/s", "speed", "memory, MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    ways = [metric.removeprefix("seconds, ") for metric in result["ours"] if metric.startswith("seconds, ")]
    sides = {ONE: result["peers"][ONE], **{way: {key: result["ours"][f"{key}, {way}"] for key in result["peers"][ONE]} for way in ways}}
    for way, one in sides.items():
        speed = result["ratios"][ONE].get(f"seconds, {way}", 1.0)
        table.add_row(
            "1" if way == ONE else way.removesuffix(" workers"),
            f"{one['seconds']:.2f}",
            f"{min(one['all_seconds']):.2f} .. {max(one['all_seconds']):.2f}",
            f"{one['documents_per_second']:,.0f}",
            f"{one['bytes_per_second'] / 1e6:.1f}",
            f"{speed:.2f}x",
            f"{one['peak_bytes'] / 1e6:,.0f}",
        )
    return table
