"""From text to a token data set, by one process and by more.

tools/preprocess_data.py turns the same file into a data set with 1, 2, 4 ... workers, up to --workers. Each run is a process of its own,
its start and imports counted; the numbers of workers take turns, and every other turn goes backwards. Of the times of one number the least
counts: what else the machine does can only add to them. Memory is the highest of all processes of a run together, in one more run each,
because looking at it takes time. The data sets must be the same, byte for byte. The peer is one worker.
"""

from __future__ import annotations

import argparse
import filecmp
import sys
from functools import partial
from typing import Any

from rich.table import Table

from pangu.benchmarks import harness, prose
from pangu.benchmarks.machine import run, watch

TOOL = ("-m", "pangu.preprocess")
ONE = "one worker"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this task."""
    prose.add_arguments(parser, megabytes=60)
    parser.add_argument(
        "--workers", type=int, default=harness.cores(), metavar="N", help="the most workers (default: %(default)s, all processors)"
    )
    harness.add_counts(parser, {"repeats": (5, "runs with each number of workers")})
    harness.add_workdir(parser, "for text and data sets")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the text, turn it into data sets, and remove everything.

    Raises:
        InputError: if an option is impossible, text or tokenizer cannot be read, or a run fails.
    """
    harness.check_counts(arguments, "workers", "repeats")
    texts = prose.texts(arguments)
    counts = sorted({min(2**power, arguments.workers) for power in range(arguments.workers.bit_length() + 1)})
    with harness.working_folder(arguments) as folder:
        tokenizer = prose.tokenizer(arguments, folder).path
        corpus = folder / "corpus.txt"
        corpus.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        words = [*TOOL, "--input", corpus, "--tokenizer", tokenizer]
        commands = {_name(workers): [*words, "--output", folder / str(workers), "--workers", workers] for workers in counts}
        seconds = harness.take_turns({name: partial(_seconds, command) for name, command in commands.items()}, arguments.repeats)
        memory = {name: watch([sys.executable, *command], family=True).family_bytes for name, command in commands.items()}
        for workers in counts:
            for suffix in (".bin", ".idx"):
                if not filecmp.cmp(folder / f"{workers}{suffix}", folder / f"1{suffix}", shallow=False):
                    raise AssertionError(f"{workers} workers and one wrote another {suffix}")
    described = prose.describe(arguments, texts)
    found = {name: _summary(seconds[name], memory[name], described) for name in commands}
    one = found.pop(ONE)
    return {
        "text": described,
        "ours": harness.of_ways(found),
        "peers": {ONE: one},
        "ratios": {ONE: {f"seconds, {name}": one["seconds"] / more["seconds"] for name, more in found.items()}},
    }


def _name(workers: int) -> str:
    return ONE if workers == 1 else f"{workers} workers"


def _seconds(command: list[object]) -> float:
    return run(command, "preprocessing")[1]


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
    table = harness.new_table(
        f"{text['source']}: {text['documents']:,} documents, {text['bytes'] / 1e6:,.1f} MB\nall runs wrote the same bytes",
        result["device"],
        *("workers", "seconds", "range", "documents/s", "MB/s", "speed", "memory, MB"),
    )
    ways = [metric.removeprefix("seconds, ") for metric in result["ours"] if metric.startswith("seconds, ")]
    for way, one in {ONE: result["peers"][ONE], **{way: harness.way_of(result["ours"], way) for way in ways}}.items():
        table.add_row(
            "1" if way == ONE else way.removesuffix(" workers"),
            f"{one['seconds']:.2f}",
            harness.span(one["all_seconds"], ".2f"),
            f"{one['documents_per_second']:,.0f}",
            f"{one['bytes_per_second'] / 1e6:.1f}",
            f"{result['ratios'][ONE].get(f'seconds, {way}', 1.0):.2f}x",
            f"{one['peak_bytes'] / 1e6:,.0f}",
        )
    return table
