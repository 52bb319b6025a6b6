"""Chinese text to measure with, and a tokenizer for it: given ones, or some that are made here without a download.

The text made here is words of jieba's dictionary, drawn by their frequencies and put into sentences, paragraphs and documents. It has the
words of prose, but follows no grammar: the same words rarely meet twice. What remembers earlier text gains less from it than from prose.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import accumulate
from pathlib import Path

from pangu.errors import InputError
from pangu.text.documents import documents, input_size, read_blocks
from pangu.text.tokenizer import PanguTokenizer

STOPS = "，，，，。。。、；：？！"
OTHERS = ("2020年3月", "3.5%", "GDP", "iPhone 12", "COVID-19", "1998", "Windows", "www.example.com")
VOCABULARY = 8000
TRAINING_BYTES = 1_000_000


def add_arguments(parser: argparse.ArgumentParser, *, megabytes: int) -> None:
    """The options of text and tokenizer."""
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help=f"default: one of {VOCABULARY:,} pieces, trained on drawn text")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help=".txt or .jsonl; default: drawn from jieba's dictionary")
    parser.add_argument("--megabytes", type=int, default=megabytes, metavar="N", help="of text, at most (default: %(default)s)")


def texts(arguments: argparse.Namespace) -> list[str]:
    """The documents to measure with, `--megabytes` of them or what the files have.

    Raises:
        InputError: if the option is impossible, or a file cannot be read or has no document.
    """
    if arguments.megabytes < 1:
        raise InputError(f"--megabytes {arguments.megabytes}: expected 1 or more.")
    limit = arguments.megabytes * 1_000_000
    found = list(_at_most(_given(arguments.text) if arguments.text else drawn(seed=1), limit))
    if not found:
        raise InputError(f"--text {' '.join(map(str, arguments.text))}: no documents found, text expected.")
    return found


def describe(arguments: argparse.Namespace, found: Sequence[str]) -> dict[str, int | str]:
    """What was measured with, for the result."""
    return {
        "source": " ".join(map(str, arguments.text)) if arguments.text else "words drawn from jieba's dictionary",
        "documents": len(found),
        "characters": sum(map(len, found)),
        "bytes": sum(len(text.encode()) for text in found),
    }


def tokenizer(arguments: argparse.Namespace, folder: Path) -> PanguTokenizer:
    """The tokenizer of `--tokenizer`, or one that is trained in `folder`."""
    if arguments.tokenizer:
        return PanguTokenizer(arguments.tokenizer)
    from pangu.text.tokenizer_training import train_tokenizer

    sample = folder / "sample.txt"
    sample.write_text("\n\n".join(_at_most(drawn(seed=2), TRAINING_BYTES)), encoding="utf-8")
    return train_tokenizer([sample], VOCABULARY, folder)


def drawn(seed: int) -> Iterator[str]:
    """Documents without end; the same seed gives the same ones."""
    rows = [line.split(" ") for line in files("jieba").joinpath("dict.txt").read_text(encoding="utf-8").splitlines()]
    words = [row[0] for row in rows]
    cumulated = list(accumulate(int(row[1]) for row in rows))
    draw = random.Random(seed)
    while True:
        paragraphs = []
        for _ in range(draw.randint(1, 6)):
            sentences = []
            for _ in range(draw.randint(2, 12)):
                chosen = draw.choices(words, cum_weights=cumulated, k=draw.randint(4, 20))
                if draw.random() < 0.1:
                    chosen[-1] = draw.choice(OTHERS)
                sentences.append("".join(chosen) + draw.choice(STOPS))
            paragraphs.append("".join(sentences))
        yield "\n".join(paragraphs)


def _given(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        input_size(path)
        for block in read_blocks(path):
            yield from documents(block, "text")


def _at_most(found: Iterator[str], limit: int) -> Iterator[str]:
    taken = 0
    for text in found:
        if taken >= limit:
            return
        taken += len(text.encode())
        yield text
