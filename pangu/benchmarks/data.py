"""How fast training is given its micro-batches, and how soon after the start of a run the first.

Loading: the very iterator of the training loop (sampler, blend, packing, positions that restart at each document, the thread that reads
ahead) over random ids that lie in the page cache, for documents like articles and like short messages, and two micro-batch sizes. Nothing
computes meanwhile, as on a machine whose device does.

Index: a process of its own opens --documents documents, checks them, makes the order of an epoch and reads a sample. Its seconds are those
after its imports; its memory is the peak of the whole process, pages of mapped files included.

There is no peer: the numbers stand for themselves.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from pangu.benchmarks import harness
from pangu.benchmarks.machine import call, last_line, watch
from pangu.errors import InputError

if TYPE_CHECKING:
    from pangu.data.blending import BlendedDataset

VOCAB, SEPARATOR, PAD, SEED = 40000, 9, 6, 1
KINDS = {"articles": 500, "messages": 20}
"""Documents by their median length in tokens; lengths are log-normal."""
MICRO_BATCHES = (1, 8)
COUNTS = {
    "documents": (10_000_000, "of the index"),
    "tokens": (50_000_000, "of each data set to load"),
    "sequence": (1024, "tokens of a sample"),
    "repeats": (5, "of each measurement"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this task."""
    harness.add_counts(parser, COUNTS)
    harness.add_workdir(parser, "for the data sets")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write random data sets, load from them, and remove them.

    Raises:
        InputError: if an option is impossible or a data set cannot be written.
    """
    harness.check_counts(arguments, *COUNTS)
    with harness.working_folder(arguments) as folder:
        loading: dict[str, Any] = {}
        for kind, length in KINDS.items():
            prefix = folder / kind
            write(prefix, max(1, arguments.tokens // length), length)
            dataset = opened(str(prefix), arguments.sequence)
            for size in MICRO_BATCHES:
                speeds = [load(dataset, size, arguments.tokens // 10, turn) for turn in range(arguments.repeats + 1)][1:]
                loading[f"{kind}, micro-batch {size}"] = harness.median_and_all("tokens_per_second", speeds)
                harness.say(f"{kind}, micro-batch {size}: {statistics.median(speeds) / 1e6:.1f} M tokens/s")
        prefix = folder / "index"
        write(prefix, arguments.documents, KINDS["messages"])
        runs = [watch([sys.executable, *call("pangu.benchmarks.data.open_index", prefix)]) for _ in range(arguments.repeats)]
    if failed := [run for run in runs if run.exit_code]:
        raise InputError(f"the index could not be built: {last_line(failed[0].errors)}")
    seconds = [float(run.errors.split()[-1]) for run in runs]
    index = {**harness.median_and_all("seconds", seconds), "peak_bytes": max(run.peak_bytes for run in runs)}
    return {
        "model": {"sequence": arguments.sequence, "documents": arguments.documents, "loading": list(loading)},
        "ours": harness.of_ways({**loading, "index": index}),
        "peers": {},
        "ratios": {},
    }


def write(prefix: Path, documents: int, length: int) -> None:
    """A data set of random ids whose documents have the median length."""
    from pangu.data.indexed import IndexedDatasetWriter

    random = np.random.default_rng(SEED)
    with IndexedDatasetWriter(prefix, vocab_size=VOCAB, separator_id=SEPARATOR, tokenizer_sha256="0" * 64) as writer:
        for start in range(0, documents, 100_000):
            sizes = np.maximum(random.lognormal(np.log(length), 0.8, min(100_000, documents - start)), 2).astype(np.int32)
            ids = random.integers(10, VOCAB, int(sizes.sum()), np.uint16)
            ids[np.cumsum(sizes) - 1] = SEPARATOR
            writer.add(ids, sizes)


def opened(prefix: str, sequence: int) -> BlendedDataset:
    """The training part of a data set, as a run opens it."""
    from pangu.data.build import build_datasets

    training, _ = build_datasets(
        [prefix],
        None,
        seq_length=sequence,
        seed=SEED,
        validation_fraction=0.01,
        vocab_size=VOCAB,
        separator_id=SEPARATOR,
        tokenizer_sha256=None,
    )
    return training


def open_index(prefix: str) -> None:
    """Open a data set, read a sample, and print the seconds after the imports on standard error."""
    from pangu.data import build  # noqa: F401

    began = time.perf_counter()
    opened(prefix, 1024)[0]
    harness.say(str(time.perf_counter() - began))


def load(dataset: BlendedDataset, micro_batch: int, tokens: int, turn: int) -> float:
    """Tokens a second of a stretch of micro-batches, another one each turn."""
    from pangu.data.batches import micro_batches
    from pangu.data.sampler import Sampler

    sequence = dataset.sources[0].seq_length
    count = max(1, tokens // (micro_batch * sequence))
    sampler = Sampler(8 * micro_batch, micro_batch)
    batches = micro_batches(dataset, sampler, turn * count * micro_batch, separator_id=SEPARATOR, pad_id=PAD, eod_reset=True)
    next(batches)  # the order of the epoch is made for it
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds = time.perf_counter() - began
    batches.close()
    return count * micro_batch * sequence / seconds


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    model, ours = result["model"], result["ours"]
    megabytes = ours["peak_bytes, index"] / 1e6
    table = harness.new_table(
        f"index of {model['documents']:,} documents: {ours['seconds, index']:.2f} s, {megabytes:,.0f} MB at most",
        f"{result['device']}; samples of {model['sequence']}",
        *("loading", "M tokens/s", "range"),
    )
    for name in model["loading"]:
        table.add_row(
            name, f"{ours[f'tokens_per_second, {name}'] / 1e6:.1f}", harness.span(ours[f"all_tokens_per_second, {name}"], ".1f", 1e6)
        )
    return table
