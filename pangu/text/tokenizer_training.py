"""Trains a tokenizer like PanGu-α's on other text: with the published pieces 0 to 9 and normaliser, and a new vocabulary.

The model is trained on what `PanguTokenizer.encode` passes to SentencePiece, line by line, so that training and use segment text alike.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from pangu.errors import InputError
from pangu.files import open_file
from pangu.text.segmentation import Segmenter
from pangu.text.tokenizer import (
    EOD,
    EOT,
    MASK,
    NEWLINE_PIECE,
    PAD,
    SEP,
    SPACE_PIECE,
    PanguTokenizer,
    make_directory,
    model_input,
    write_model,
)

# SentencePiece numbers <unk> <s> </s> from 0 and these after them: ids 3 to 9, as in the published model.
USER_DEFINED_PIECES = (NEWLINE_PIECE, SPACE_PIECE, SEP, PAD, MASK, EOD, EOT)
SPECIAL_IDS = 3 + len(USER_DEFINED_PIECES)

# The sums of the EM steps depend on how the sentences are dealt to threads. A constant, so that every machine trains the same model.
THREADS = 4

LOWEST_COVERAGE = 0.98  # SentencePiece accepts no less
LONGEST_LINE = 1 << 30  # bytes. SentencePiece's default of 4192 drops longer lines without a word


def train_tokenizer(
    inputs: Sequence[str | Path], vocab_size: int, output: str | Path, *, character_coverage: float = 1.0
) -> PanguTokenizer:
    """Train a SentencePiece unigram model with PanGu-α's special pieces and write it to `output`/vocab.model.

    The same inputs give the same bytes. SentencePiece keeps all lines in memory: from a corpus of many GB, give it a sample.

    Args:
        inputs: UTF-8 text files, read line by line.
        vocab_size: total number of pieces, including the ten special ones. 40,000 in the published model.
        output: a directory; it is created if it does not exist, and a vocab.model in it is replaced.
        character_coverage: fraction of the text, 0.98 to 1, whose characters get a piece; the rarest characters become <unk>. 1.0 covers
            all; 0.9995 is usual where rare characters would fill the vocabulary.

    Raises:
        InputError: if a file is missing or not UTF-8, all are empty, or `vocab_size` does not suit the text.
    """
    if not LOWEST_COVERAGE <= character_coverage <= 1.0:
        raise InputError(f"character coverage {character_coverage}: expected {LOWEST_COVERAGE} to 1, such as 0.9995.")
    if vocab_size <= SPECIAL_IDS:
        raise InputError(f"vocabulary size {vocab_size}: the special pieces alone are {SPECIAL_IDS}. Choose some thousands.")
    for path in inputs:
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file. Give the text files to train the tokenizer on.")
    make_directory(output)  # refused now rather than after an hour of training
    lines = _Lines(inputs)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            normalization_rule_name="nmt_nfkc",
            user_defined_symbols=list(USER_DEFINED_PIECES),
            max_sentence_length=LONGEST_LINE,
            train_extremely_large_corpus=True,
            num_threads=THREADS,
            minloglevel=2,
        )
    except (RuntimeError, InputError) as error:
        if lines.refusal:
            raise lines.refusal from None
        raise _explained(error, lines, vocab_size, character_coverage) from error
    return PanguTokenizer(write_model(model.getvalue(), output))


class _Lines:
    """The training lines, their number and the first error: SentencePiece turns an exception in its iterator into a RuntimeError."""

    def __init__(self, inputs: Sequence[str | Path]) -> None:
        self.inputs = inputs
        self.count = 0
        self.refusal: InputError | None = None

    def __iter__(self) -> Iterator[str]:
        segmenter = Segmenter()
        for path in self.inputs:
            try:
                # newline="" keeps "\r\n", which the tokenizer sees in use as well.
                with io.TextIOWrapper(open_file(Path(path)), encoding="utf-8", newline="") as file:
                    for line in file:
                        if not line.isspace():
                            self.count += 1
                            yield model_input(segmenter, line)
            except UnicodeDecodeError as error:
                self._refuse(
                    f"{path}: byte 0x{error.object[error.start]:02x} is not UTF-8 ({error.reason}). "
                    "Convert the file to UTF-8, for instance with iconv."
                )
            except OSError as error:
                self._refuse(f"{path}: cannot be read ({error.strerror}). Check the file and its permissions.")

    def _refuse(self, message: str) -> None:
        self.refusal = InputError(message)
        raise self.refusal


def _explained(error: Exception, lines: _Lines, vocab_size: int, character_coverage: float) -> Exception:
    """The InputError for a SentencePiece error that the user can fix, or `error` itself."""
    files = ", ".join(str(path) for path in lines.inputs)
    if lines.count == 0:
        return InputError(f"{files}: no text to train a tokenizer on. Give files with at least one line that is not blank.")
    if found := re.search(r"value <= (\d+)", str(error)):
        return InputError(
            f"vocabulary size {vocab_size:,}: the text ({lines.count:,} lines) yields at most {int(found[1]):,} pieces. "
            f"Choose {int(found[1])} or fewer, or give more text."
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        return InputError(
            f"vocabulary size {vocab_size:,}: the characters of the text and the special pieces alone need {int(found[1]):,} at character "
            f"coverage {character_coverage}. Choose a larger vocabulary, or a lower coverage such as 0.9995."
        )
    return error
