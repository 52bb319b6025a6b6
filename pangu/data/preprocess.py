"""Turns text files into a token data set, with several processes, in memory that does not grow with the input.

Every document becomes its ids and one separator (`<eot>`), as in PanGu-α's training data.

The main process only cuts the input into blocks of whole documents and writes the results in the input's order: the output has the same
bytes for any number of workers. The workers decode, parse and tokenize.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from pangu.data.indexed import IndexedDatasetWriter, token_dtype
from pangu.data.lookahead import ordered_map
from pangu.errors import InputError
from pangu.text.documents import Block, documents, input_size, read_blocks

if TYPE_CHECKING:
    from pangu.text.tokenizer import PanguTokenizer

BLOCKS_AHEAD_PER_WORKER = 4


class TokenizedBlock(NamedTuple):
    """The documents of a block as ids, separators included."""

    tokens: NDArray[np.integer[Any]]
    sizes: NDArray[np.int32]
    empty: int
    """Number of documents without text, which are left out."""
    path: Path
    bytes_read: int


@dataclass(frozen=True)
class Summary:
    """Counts of a run of `preprocess`."""

    documents: int
    empty: int
    tokens: int
    seconds: float
    files: tuple[Path, ...]


def preprocess(
    inputs: Sequence[Path],
    tokenizer: PanguTokenizer,
    output: str | Path,
    *,
    workers: int,
    json_key: str = "text",
) -> Summary:
    """Tokenize the input files, in their order, into `output`.bin, .idx and .json.

    Args:
        inputs: `.txt` or `.jsonl` files, or these with `.gz` or `.zst`.
        tokenizer: the tokenizer; the data set's manifest records its SHA-256.
        output: the data set's prefix.
        workers: number of processes that tokenize; with 1, this process does.
        json_key: key of the text in a line of `.jsonl`.

    Raises:
        InputError: a file cannot be read as its format, there are no documents, or the disk is full. No output is left then.
        KeyboardInterrupt: on SIGINT and SIGTERM. No output is left then either.
    """
    began = time.monotonic()
    sizes = {path: input_size(path) for path in inputs}
    if Path(output).is_dir():
        raise InputError(f"--output {output} is a directory, the first part of a file name expected, such as {Path(output) / 'corpus'}.")
    tokenize = _Tokenize(tokenizer, json_key)
    blocks = (block for path in inputs for block in read_blocks(path))
    empty = 0
    with (
        _deferred_interrupts() as interrupt,
        IndexedDatasetWriter(
            output, vocab_size=tokenizer.vocab_size, separator_id=tokenizer.eot_id, tokenizer_sha256=tokenizer.sha256
        ) as writer,
        _progress(sum(sizes.values())) as report,
        _workers(tokenize, workers) as tokenized,
    ):
        finished, current = 0, inputs[0]
        for result in tokenized(blocks):
            interrupt()
            writer.add(result.tokens, result.sizes)
            empty += result.empty
            if result.path != current:
                finished, current = finished + sizes[current], result.path
            report(finished + result.bytes_read, writer.documents, writer.tokens)
        if not writer.documents:
            raise InputError(f"{', '.join(map(str, inputs))}: no documents found, text expected. {empty:,} empty ones were passed over.")
    return Summary(writer.documents, empty, writer.tokens, time.monotonic() - began, writer.paths)


class _Tokenize:
    """Block -> TokenizedBlock, with one tokenizer."""

    def __init__(self, tokenizer: PanguTokenizer, json_key: str) -> None:
        self.encode = tokenizer.encode
        self.separator_id = tokenizer.eot_id
        self.json_key = json_key
        self.dtype = token_dtype(tokenizer.vocab_size)

    def __call__(self, block: Block) -> TokenizedBlock:
        tokens: list[int] = []
        sizes: list[int] = []
        empty = 0
        for text in documents(block, self.json_key):
            ids = self.encode(text) if text.strip() else []
            if not ids:
                empty += 1
                continue
            tokens += ids
            tokens.append(self.separator_id)
            sizes.append(len(ids) + 1)
        return TokenizedBlock(np.array(tokens, self.dtype), np.array(sizes, np.int32), empty, block.path, block.bytes_read)


@contextmanager
def _deferred_interrupts() -> Iterator[Callable[[], None]]:
    """Defer SIGINT and SIGTERM until the yielded function is called: it raises KeyboardInterrupt if one has arrived.

    An exception at an arbitrary moment could otherwise occur after an executor has forked its workers but before it has recorded them, or
    between two renames of the writer.
    """
    received: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    earlier = [signal.signal(number, lambda number, frame: received.append(number)) for number in signals]

    def interrupt() -> None:
        if received:
            raise KeyboardInterrupt

    try:
        yield interrupt
    finally:
        for number, handler in zip(signals, earlier, strict=True):
            signal.signal(number, handler)


@contextmanager
def _workers(tokenize: _Tokenize, workers: int) -> Iterator[Callable[[Iterable[Block]], Iterator[TokenizedBlock]]]:
    """A `map` that tokenizes blocks in processes, in order; leaving it ends them."""
    if workers == 1:
        yield lambda blocks: map(tokenize, blocks)
        return
    # Forked, so that the workers share what this process has loaded; the first text makes it load jieba's dictionary.
    tokenize.encode("词")
    context = multiprocessing.get_context("fork")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(tokenize,))
    try:
        yield lambda blocks: ordered_map(executor, _tokenize_in_worker, blocks, workers * BLOCKS_AHEAD_PER_WORKER)
    except BrokenProcessPool:
        raise InputError(f"a worker was killed, probably for lack of memory. Run again with fewer --workers than {workers}.") from None
    finally:
        executor.shutdown(cancel_futures=True)


# Of a worker process: set by _start_worker, because an executor can hand its functions nothing but their argument.
_tokenize: _Tokenize


def _start_worker(tokenize: _Tokenize) -> None:
    global _tokenize
    _tokenize = tokenize
    # Ctrl-C reaches the whole group of processes; the main one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Make this worker exit when its parent is killed; it would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _tokenize_in_worker(block: Block) -> TokenizedBlock:
    return _tokenize(block)


@contextmanager
def _progress(total_bytes: int) -> Iterator[Callable[[int, int, int], None]]:
    """A function of (bytes read, documents, tokens) that displays them: as a bar on a terminal, else as a line every 10 seconds."""
    console = Console(stderr=True)
    # Without its own thread: the workers are forked later, and a fork takes no threads along but the locks they hold.
    columns = (BarColumn(), DownloadColumn(), TextColumn("{task.fields[counts]}"), TimeRemainingColumn())
    bar = Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal)
    task = bar.add_task("", total=total_bytes, counts="")
    interval = 0.1 if console.is_terminal else 10.0
    shown = began = time.monotonic()

    def report(done_bytes: int, documents: int, tokens: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < interval:
            return
        shown = now
        counts = f"{documents:,} documents, {tokens:,} tokens, {tokens / (now - began + 1e-9):,.0f} tokens/s"
        if console.is_terminal:
            bar.update(task, completed=done_bytes, counts=counts, refresh=True)
        else:
            print(f"{done_bytes / 1e6:,.1f} of {total_bytes / 1e6:,.1f} MB: {counts}", file=sys.stderr, flush=True)

    with bar:
        yield report
        bar.update(task, completed=total_bytes)
