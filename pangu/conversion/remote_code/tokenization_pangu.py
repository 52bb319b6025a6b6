"""PanGu-α's tokenizer for HuggingFace transformers 5: jieba segments, joined by spaces, through a SentencePiece unigram model.

    tokenizer = AutoTokenizer.from_pretrained(DIR, trust_remote_code=True)

Ids are those of the published tokenizer. It needs the packages `jieba` (0.42.1: ids depend on its dictionary) and `sentencepiece`.
"""

from __future__ import annotations

import logging
import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

# SentencePiece swallows spaces and newlines, so they travel as characters that text hardly uses (ids 4 and 3 in the published model).
SPACE_PIECE, NEWLINE_PIECE = "\u2582", "\u2583"
TO_MODEL = str.maketrans({" ": SPACE_PIECE, "\n": NEWLINE_PIECE})
VERIFIED_JIEBA = "0.42.1"


@lru_cache(maxsize=1)
def _segmenter() -> Any:
    """jieba with its own dictionary, apart from the process-wide one that programs add words to. Not kept on the tokenizer, which could
    not be pickled then."""
    import jieba

    if jieba.__version__ != VERIFIED_JIEBA:
        raise ImportError(f"jieba {jieba.__version__} found, {VERIFIED_JIEBA} expected: token ids depend on its dictionary. Install it.")
    jieba.setLogLevel(logging.WARNING)
    return jieba.Tokenizer()


class GPTPanguTokenizer(PreTrainedTokenizer):
    """Text to token ids and back, as published with PanGu-α.

    Nothing is added in front or behind, and no text can forge a special token: "<eot>" in a text is five ordinary ones, as it was in
    training. `split_special_tokens=False` turns `<eot>`, `<pad>` and the others, and tokens that you have added, into their ids where they
    stand in a text. Batches are padded on the left, which is what generation needs.

    What the model's normaliser folds stays folded: ，：？！ come back as ,:?!, a tab vanishes, a character that no piece covers comes back
    as "⁇".

    Args:
        vocab_file: the SentencePiece model.
        unk_token: what a character outside the vocabulary becomes.
        bos_token: `<eot>`, which begins a document because it ends the one before.
        eos_token: `<eot>`, the separator of documents.
        pad_token: fills up a batch.
        sep_token: a published piece without a use of its own.
        mask_token: likewise.
        split_special_tokens: see above.
        padding_side: see above.
        clean_up_tokenization_spaces: never: it is for English.
        kwargs: see `PreTrainedTokenizer`.

    Raises:
        ValueError: if there is no such file.
    """

    vocab_files_names = {"vocab_file": "vocab.model"}  # noqa: RUF012 (declared so by the base class)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str | None,
        unk_token: Any = "<unk>",
        bos_token: Any = "<eot>",
        eos_token: Any = "<eot>",
        pad_token: Any = "<pad>",
        sep_token: Any = "<sep>",
        mask_token: Any = "<mask>",
        split_special_tokens: bool = True,
        padding_side: str = "left",
        clean_up_tokenization_spaces: bool = False,
        **kwargs: Any,
    ) -> None:
        if vocab_file is None or not os.path.isfile(vocab_file):
            raise ValueError(f"vocab_file = {vocab_file}: no such file. Copy PanGu-α's vocab.model into the directory of the weights.")
        self.vocab_file = vocab_file
        self._model = Path(vocab_file).read_bytes()
        self._load()
        super().__init__(
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            sep_token=sep_token,
            mask_token=mask_token,
            split_special_tokens=split_special_tokens,
            padding_side=padding_side,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **kwargs,
        )

    def _load(self) -> None:
        # Before the base class's constructor, which asks for the vocabulary.
        self._pieces = sentencepiece.SentencePieceProcessor()
        self._pieces.LoadFromSerializedProto(self._model)
        self._ids = {self._pieces.id_to_piece(token_id): token_id for token_id in range(self._pieces.get_piece_size())}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_pieces", "_ids")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()

    @property
    def vocab_size(self) -> int:
        """Number of pieces; 40000 in the published model."""
        return self._pieces.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        """Every piece, and every token that was added, with its id."""
        return {**self._ids, **self._added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        line = " ".join(segment.translate(TO_MODEL) for segment in _segmenter().cut(text))
        return self._pieces.encode(line, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self._pieces.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < self.vocab_size:
            raise IndexError(f"token id {index}: the tokenizer has the ids 0 to {self.vocab_size - 1}.")
        return self._pieces.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of pieces: SentencePiece's decoding without its spaces, then the marks of space and newline."""
        text = ""
        ids: list[int] = []
        for token in tokens:
            if token in self._added_tokens_encoder and token not in self._ids:  # one of the user's own
                text, ids = text + self._decode_pieces(ids) + token, []
            else:
                ids.append(self._pieces.piece_to_id(token))
        return text + self._decode_pieces(ids)

    def _decode_pieces(self, ids: list[int]) -> str:
        return self._pieces.decode(ids).replace(" ", "").replace(SPACE_PIECE, " ").replace(NEWLINE_PIECE, "\n")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write the SentencePiece model to the directory; its path."""
        target = Path(save_directory) / ((filename_prefix + "-" if filename_prefix else "") + self.vocab_files_names["vocab_file"])
        if os.path.isfile(self.vocab_file) and not (target.exists() and target.samefile(self.vocab_file)):
            shutil.copyfile(self.vocab_file, target)
        elif not target.exists():
            target.write_bytes(self._model)
        return (str(target),)
