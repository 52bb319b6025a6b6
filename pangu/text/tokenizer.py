"""PanGu-α's tokenizer: jieba segments, joined by spaces, through a SentencePiece unigram model (arXiv 2104.12369, section 3).

    tokenizer = PanguTokenizer("tokenizer/")        # a directory with vocab.model, or the file itself
    tokenizer.encode("四川的省会是?")                 # [3826, 11, 21652, 16, 28]
    tokenizer.decode([3826, 11, 21652, 16, 28])     # "四川的省会是?"

Ids are those of the published tokenizer, which is `jieba.cut` 0.42.1 and the published `vocab.model` of 40,000 pieces. Decoding does
not restore what the model's NFKC normaliser changes: ，：？！ become ,:?!, a tab vanishes, "\\r\\n" becomes "\\n", and a character that
no piece covers becomes "⁇".
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable
from operator import index
from pathlib import Path
from typing import Any

import sentencepiece

from pangu.errors import InputError
from pangu.files import create_file, read_bytes, write_durably
from pangu.text.segmentation import Segmenter

MODEL_FILE = "vocab.model"
MAX_MODEL_BYTES = 2**26  # the published one has less than a MiB

# SentencePiece drops spaces and newlines, so they are replaced by characters that text hardly uses (ids 4 and 3 in the published model).
SPACE_PIECE, NEWLINE_PIECE = "\u2582", "\u2583"
TO_MODEL = str.maketrans({" ": SPACE_PIECE, "\n": NEWLINE_PIECE})

UNK, BOS, EOS, SEP, PAD, MASK, EOD, EOT = "<unk>", "<s>", "</s>", "<sep>", "<pad>", "<mask>", "<eod>", "<eot>"
SPECIAL_PIECES = (UNK, BOS, EOS, SEP, PAD, MASK, EOD, EOT)


class TokenIdError(InputError, IndexError):
    """A token id that the vocabulary does not have."""


class PanguTokenizer:
    """Text to token ids and back, as published with PanGu-α.

    Instances can be pickled and used in forked workers; jieba's dictionary is loaded at the first `encode`.

    Args:
        path: the SentencePiece model, or a directory that holds it as `vocab.model`.

    Raises:
        InputError: if there is no such file, it is not a SentencePiece model, or it lacks one of PanGu-α's special pieces.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self._model = _read_model(Path(path))
        self._load()

    def _load(self) -> None:
        self.sha256 = hashlib.sha256(self._model).hexdigest()
        self._pieces = _parsed(self._model, self.path)
        self.vocab_size = self._pieces.get_piece_size()
        unknown = self._pieces.unk_id()
        missing = [
            piece for piece in (SPACE_PIECE, NEWLINE_PIECE, *SPECIAL_PIECES) if self._pieces.piece_to_id(piece) == unknown and piece != UNK
        ]
        if missing or self._pieces.id_to_piece(unknown) != UNK:
            raise InputError(
                f"{self.path}: a SentencePiece model without the piece {(missing or [UNK])[0]}; PanGu-α's has {' '.join(SPECIAL_PIECES)} "
                f"{SPACE_PIECE} {NEWLINE_PIECE}. Train one with tools/train_tokenizer.py."
            )
        self._segmenter = Segmenter()

    def __getstate__(self) -> tuple[Path, bytes]:
        return self.path, self._model

    def __setstate__(self, state: tuple[Path, bytes]) -> None:
        self.path, self._model = state
        self._load()

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"PanguTokenizer({str(self.path)!r}, vocab_size={self.vocab_size}, sha256={self.sha256[:12]})"

    @property
    def unk_id(self) -> int:
        """Id of `<unk>`, which stands for a character outside the vocabulary; 0 in the published model."""
        return self._pieces.piece_to_id(UNK)

    @property
    def sep_id(self) -> int:
        """Id of `<sep>`; 5 in the published model."""
        return self._pieces.piece_to_id(SEP)

    @property
    def pad_id(self) -> int:
        """Id of `<pad>`, the padding token; 6 in the published model."""
        return self._pieces.piece_to_id(PAD)

    @property
    def mask_id(self) -> int:
        """Id of `<mask>`; 7 in the published model."""
        return self._pieces.piece_to_id(MASK)

    @property
    def eod_id(self) -> int:
        """Id of `<eod>`; 8 in the published model. The documents of the training data are separated by `eot_id`, not by this id."""
        return self._pieces.piece_to_id(EOD)

    @property
    def eot_id(self) -> int:
        """Id of `<eot>`, the separator of documents and the end of a generated text; 9 in the published model."""
        return self._pieces.piece_to_id(EOT)

    def encode(self, text: str, *, allow_special: bool | Collection[str] = False) -> list[int]:
        """The token ids of `text`, each in [0, vocab_size). No special token is added at either end.

        Args:
            text: any text; "" gives [].
            allow_special: which of `SPECIAL_PIECES` are replaced by their id where they occur in `text`: none with False (so that a
                document cannot forge a separator), all with True, or those named. The text between them is encoded piece by piece.

        Raises:
            InputError: if `allow_special` names a piece that is not special, or `text` holds a lone surrogate, which UTF-8 cannot encode.
        """
        allowed = _allowed_pieces(allow_special)
        if not allowed:
            return self._encode_plain(text)
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, allowed)) + ")", text):
            if part in allowed:
                ids.append(self._pieces.piece_to_id(part))
            else:
                ids.extend(self._encode_plain(part))
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        line = model_input(self._segmenter, text)
        try:
            return self._pieces.encode(line)
        except (RuntimeError, TypeError, UnicodeError):  # which of them depends on SentencePiece's release
            lone = next((at for at, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None)
            if lone is None:
                raise
            raise InputError(
                f"text: U+{ord(text[lone]):04X} at character {lone} is half of a surrogate pair, not a character. Read the text as UTF-8 "
                "with errors='replace'."
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, as the published tokenizer decodes it: SentencePiece's decoding without its spaces, then ▂ to space and ▃
        to newline.

        The pieces `<sep>` to `<eot>` are written out, `<s>` and `</s>` become nothing, `<unk>` becomes "⁇".

        Args:
            ids: whole numbers in [0, vocab_size): a list, a numpy array or a tensor of one dimension.

        Raises:
            TokenIdError: if an id is not in [0, vocab_size). It is also an `IndexError`.
        """
        checked = [self._check(index(token_id), position) for position, token_id in enumerate(ids)]
        return self._pieces.decode(checked).replace(" ", "").replace(SPACE_PIECE, " ").replace(NEWLINE_PIECE, "\n")

    def id_to_piece(self, token_id: int) -> str:
        """The piece of one id, with SentencePiece's "▁" where a segment begins. Raises TokenIdError outside [0, vocab_size)."""
        return self._pieces.id_to_piece(self._check(token_id, 0))

    def _check(self, token_id: int, position: int) -> int:
        if not 0 <= token_id < self.vocab_size:
            raise TokenIdError(
                f"token id {token_id} at position {position}: {self.path} has the ids 0 to {self.vocab_size - 1}. Use the tokenizer that "
                "the ids were made with; a model padded to more ids must mask the rest."
            )
        return token_id

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Copy the model to `directory`/vocab.model atomically and return that path. Raises InputError if it cannot be written."""
        return write_model(self._model, directory)


def _allowed_pieces(allow_special: bool | Collection[str]) -> tuple[str, ...]:
    if isinstance(allow_special, bool):
        return SPECIAL_PIECES if allow_special else ()
    # A string is a collection of its characters, which nobody means.
    allowed = (allow_special,) if isinstance(allow_special, str) else tuple(allow_special)
    for piece in allowed:
        if piece not in SPECIAL_PIECES:
            raise InputError(f"allow_special: {piece!r} is not a special piece. Choose from {' '.join(SPECIAL_PIECES)}.")
    return allowed


def model_input(segmenter: Segmenter, text: str) -> str:
    """SentencePiece's input for `text`, in training and in encoding: jieba's segments, with space and newline marked, joined by " "."""
    if "\r\n" in text:  # one segment
        return " ".join([segment.translate(TO_MODEL) for segment in segmenter.cut(text)])
    # Otherwise a space, a newline and their marks are segments of one character alike, and marking all at once is faster.
    return " ".join(segmenter.cut(text.replace(" ", SPACE_PIECE).replace("\n", NEWLINE_PIECE)))


def write_model(model: bytes, directory: str | os.PathLike[str]) -> Path:
    """Write a SentencePiece model to `directory`/vocab.model atomically: to a temporary file first, which is then renamed.

    Raises:
        InputError: if the directory cannot be created or written.
    """
    target = make_directory(directory) / MODEL_FILE
    try:
        write_durably(target, model)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror}). Choose another directory, or free some space.") from None
    return target


def copy_model(source: Path, directory: Path) -> None:
    """Copy a SentencePiece model to `directory`/vocab.model. Anything else is refused: `source` may be a link to a file that is not meant.

    Args:
        source: the file, or the directory that holds it as `vocab.model`.
        directory: exists, and holds no `vocab.model` yet.

    Raises:
        InputError: if the source cannot be read or is not a SentencePiece model.
        OSError: if the copy cannot be written.
    """
    path, model = _read_model(Path(source))
    _parsed(model, path)
    with create_file(directory / MODEL_FILE) as file:
        file.write(model)


def _read_model(path: Path) -> tuple[Path, bytes]:
    """The file of a SentencePiece model, and its bytes."""
    path = path / MODEL_FILE if path.is_dir() else path
    try:
        return path, read_bytes(path, MAX_MODEL_BYTES)
    except OSError as error:
        raise InputError(
            f"{path}: cannot read the tokenizer model ({error.strerror}). Give a directory with {MODEL_FILE}, or the file."
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: {error}, which no tokenizer model has. Give a directory with {MODEL_FILE}, or the file.") from None


def _parsed(model: bytes, path: Path) -> Any:
    """The SentencePiece processor of a model."""
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(model)
    except RuntimeError:
        raise InputError(
            f"{path}: {len(model):,} bytes that are not a SentencePiece model. Copy {MODEL_FILE} again, or train one with "
            "tools/train_tokenizer.py."
        ) from None
    return pieces


def make_directory(directory: str | os.PathLike[str]) -> Path:
    """Create a directory and its parents if they do not exist, and return its path. Raises InputError if that fails."""
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path}: not a directory that can be created ({error.strerror}). Choose another place for the tokenizer."
        ) from None
    return path
