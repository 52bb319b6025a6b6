"""Tokenizing in one process, next to the published tokenizer.

The peer is PanGu-α's own code: `jieba.cut`, a space and a newline marked, and `SentencePieceProcessor.encode`. Both read the same documents
with the same model. The text is dealt into as many parts as there are turns; in a turn both tokenize one part, in alternate order. So
neither ever sees a text twice, and what this project remembers of earlier parts is what it remembers in use. Loading is not counted. The
numbers are medians over the turns, the ranges their least and greatest. All ids are compared, document by document.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from pangu.benchmarks import prose
from pangu.benchmarks.results import median_and_all, paired
from pangu.errors import InputError

PEER = "published"

Encode = Callable[[str], list[int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this task."""
    prose.add_arguments(parser, megabytes=12)
    parser.add_argument("--repeats", type=int, default=5, metavar="K", help="turns, each with text of its own (default: %(default)s)")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokenize in turns.

    Raises:
        InputError: if an option is impossible, or text or tokenizer cannot be read.
    """
    if arguments.repeats < 1:
        raise InputError(f"--repeats {arguments.repeats}: expected 1 or more.")
    texts = prose.texts(arguments)
    if len(texts) < arguments.repeats:
        raise InputError(f"--repeats {arguments.repeats}: the text has {len(texts)} documents, and each turn needs some of its own.")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = prose.tokenizer(arguments, Path(folder))
        runs = {"ours": tokenizer.encode, PEER: published(tokenizer.path)}
    for encode in runs.values():
        encode("词")  # loads the dictionary
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    tokens, different = 0, 0
    for turn in range(arguments.repeats):
        part = texts[turn :: arguments.repeats]
        ids: dict[str, list[list[int]]] = {}
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            ids[name], seconds = _timed(runs[name], part)
            speeds[name].append(sum(map(len, part)) / seconds)
            print(f"turn {turn + 1} of {arguments.repeats}: {name} {speeds[name][-1]:,.0f} characters/s", file=sys.stderr, flush=True)
        tokens += sum(map(len, ids["ours"]))
        different += sum(own != other for own, other in zip(ids["ours"], ids[PEER], strict=True))
    ratios = [own / peer for own, peer in zip(speeds["ours"], speeds[PEER], strict=True)]
    return {
        "text": prose.describe(arguments, texts),
        "vocab_size": tokenizer.vocab_size,
        "tokens": tokens,
        "documents_with_other_ids": different,
        "ours": median_and_all("characters_per_second", speeds["ours"]),
        "peers": {PEER: median_and_all("characters_per_second", speeds[PEER])},
        **paired({PEER: {"characters_per_second": ratios}}),
    }


def published(model: Path) -> Encode:
    """The published tokenizer's `encode`."""
    import sentencepiece

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba 0.42.1 warns at import
        import jieba
    jieba.setLogLevel(logging.WARNING)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    marks = str.maketrans(" \n", "\u2582\u2583")
    return lambda text: pieces.encode(" ".join([segment.translate(marks) for segment in jieba.cut(text, cut_all=False)]))


def _timed(encode: Encode, texts: list[str]) -> tuple[list[list[int]], float]:
    began = time.perf_counter()
    ids = [encode(text) for text in texts]
    return ids, time.perf_counter() - began


def table(result: dict[str, Any]) -> Table:
    """The result for people: a row for each tokenizer."""
    text, different = result["text"], result["documents_with_other_ids"]
    table = Table(
        title=f"{text['source']}: {text['documents']:,} documents, {text['characters']:,} characters, {result['tokens']:,} tokens of "
        f"{result['vocab_size']:,}\nids equal the published tokenizer's: "
        + (f"NO, not in {different:,} documents" if different else "yes"),
        caption=f"{result['device']}; one process",
    )
    for heading in ("", "M chars/s", "range", "speed-up", "range"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, one in {"ours": result["ours"], **result["peers"]}.items():
        every, own = one["all_characters_per_second"], result["all_ratios"][PEER]["characters_per_second"] if name == "ours" else []
        table.add_row(
            name,
            f"{one['characters_per_second'] / 1e6:.2f}",
            f"{min(every) / 1e6:.2f} .. {max(every) / 1e6:.2f}",
            f"{statistics.median(own):.2f}x" if own else "",
            f"{min(own):.2f} .. {max(own):.2f}" if own else "",
        )
    return table
