"""Tokenizing in one process, next to the published tokenizer.

The peer is PanGu-α's own code: `jieba.cut`, a space and a newline marked, and `SentencePieceProcessor.encode`. Both read the same documents
with the same model. The text is dealt into as many parts as there are turns; in a turn both tokenize one part, in alternate order. So
neither ever sees a text twice, and what this project remembers of earlier parts is what it remembers in use. Loading is not counted. The
numbers are medians over the turns, the ranges their least and greatest. All ids are compared, document by document.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from pangu.benchmarks import harness, prose
from pangu.errors import InputError

PEER = "published"

Encode = Callable[[str], list[int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this task."""
    prose.add_arguments(parser, megabytes=12)
    harness.add_counts(parser, {"repeats": (5, "turns, each with text of its own")})


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokenize in turns.

    Raises:
        InputError: if an option is impossible, or text or tokenizer cannot be read.
    """
    harness.check_counts(arguments, "repeats")
    texts = prose.texts(arguments)
    if len(texts) < arguments.repeats:
        raise InputError(f"--repeats {arguments.repeats}: the text has {len(texts)} documents, and each turn needs some of its own.")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = prose.tokenizer(arguments, Path(folder))
        runs = {"ours": tokenizer.encode, PEER: published(tokenizer.path)}
    for encode in runs.values():
        encode("词")  # loads the dictionary
    parts = [texts[turn :: arguments.repeats] for turn in range(arguments.repeats)]
    found: dict[str, list[Any]] = {name: [] for name in runs}
    sides = {name: _side(encode, parts, found[name]) for name, encode in runs.items()}
    speeds = harness.take_turns(sides, arguments.repeats, unit="characters/s")
    metric = "characters_per_second"
    return {
        "text": prose.describe(arguments, texts),
        "vocab_size": tokenizer.vocab_size,
        "tokens": sum(map(len, found["ours"])),
        "documents_with_other_ids": sum(not np.array_equal(own, other) for own, other in zip(found["ours"], found[PEER], strict=True)),
        "ours": harness.median_and_all(metric, speeds["ours"]),
        "peers": {PEER: harness.median_and_all(metric, speeds[PEER])},
        **harness.paired({PEER: {metric: harness.quotients(speeds["ours"], speeds[PEER])}}),
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


def _side(encode: Encode, parts: list[list[str]], found: list[Any]) -> Callable[[], float]:
    """Tokenizes the next part each time and adds its ids, a document at a time; in characters a second."""
    coming = iter(parts)

    def tokenize() -> float:
        part = next(coming)
        began = time.perf_counter()
        ids = [encode(text) for text in part]
        seconds = time.perf_counter() - began
        found.extend(np.array(one, np.int32) for one in ids)
        return sum(map(len, part)) / seconds

    return tokenize


def table(result: dict[str, Any]) -> Table:
    """The result for people: a row for each tokenizer."""
    text, different = result["text"], result["documents_with_other_ids"]
    return harness.speed_table(
        result,
        f"{text['source']}: {text['documents']:,} documents, {text['characters']:,} characters, {result['tokens']:,} tokens of "
        f"{result['vocab_size']:,}\nids equal the published tokenizer's: "
        + (f"NO, not in {different:,} documents" if different else "yes"),
        f"{result['device']}; one process",
        *("characters_per_second", "M chars/s", ".2f", 1e6),
    )
