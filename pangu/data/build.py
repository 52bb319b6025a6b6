"""Builds the training and the validation data set from the prefixes in a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pangu.data.blending import BlendedDataset
from pangu.data.indexed import IndexedDataset
from pangu.data.packing import PackedDataset
from pangu.errors import InputError


def build_datasets(
    prefixes: Sequence[str | Path],
    weights: Sequence[float] | None,
    *,
    seq_length: int,
    seed: int,
    validation_fraction: float,
    vocab_size: int,
    separator_id: int,
    tokenizer_sha256: str | None,
) -> tuple[BlendedDataset, BlendedDataset | None]:
    """Open the prefixes, check that they suit the model, and return (training, validation).

    Validation is the tail of each prefix: the last `validation_fraction` of its documents, rounded, at least one; the rest is for training
    (Megatron-LM's `--split`). It is None for a fraction of 0, and it is blended with the same weights.

    Args:
        prefixes: paths without `.bin` and `.idx`.
        weights: relative share of the samples from each prefix, as in `BlendedDataset`; None: in proportion to the tokens.
        seq_length: input tokens per sample.
        seed: seed of the order of documents and samples.
        validation_fraction: fraction of the documents for validation, in [0, 1).
        vocab_size: the model's vocabulary size.
        separator_id: id that ends every document.
        tokenizer_sha256: SHA-256 of the tokenizer that the run uses, to be compared with the manifests; None if no tokenizer is configured.

    Raises:
        InputError: a damaged or empty data set, or one that another tokenizer made.
    """
    if not prefixes:
        raise InputError("data.train: no data set found, one prefix or more expected. Make one with tools/preprocess_data.py.")
    if not 0 <= validation_fraction < 1:
        raise InputError(f"data.validation_fraction = {validation_fraction}, 0 or more and below 1 expected. 0 means no validation.")
    training: list[PackedDataset] = []
    validation: list[PackedDataset] = []
    for prefix in prefixes:
        indexed = IndexedDataset(prefix)
        if not indexed.sizes.any():
            raise InputError(f"{indexed.idx_path}: no tokens in its {len(indexed):,} documents. Run tools/preprocess_data.py on some text.")
        _check_tokenizer(indexed, vocab_size, separator_id, tokenizer_sha256)
        held_out = max(1, round(len(indexed) * validation_fraction)) if validation_fraction else 0
        if held_out >= len(indexed):
            raise InputError(
                f"{indexed.idx_path}: {len(indexed):,} documents found, too few to hold out data.validation_fraction = "
                f"{validation_fraction} and train on the rest. Give it more documents, or set the fraction to 0."
            )
        split = len(indexed) - held_out
        training.append(PackedDataset(indexed, range(split), seq_length=seq_length, seed=seed, vocab_size=vocab_size))
        if held_out:
            validation.append(PackedDataset(indexed, range(split, len(indexed)), seq_length=seq_length, seed=seed, vocab_size=vocab_size))
    if weights is None:
        weights = [source.tokens_per_epoch for source in training]
    return BlendedDataset(training, weights), BlendedDataset(validation, weights) if validation else None


def _check_tokenizer(indexed: IndexedDataset, vocab_size: int, separator_id: int, tokenizer_sha256: str | None) -> None:
    manifest = indexed.manifest
    if manifest is None:
        _check_separator(indexed, separator_id)
        return
    again = "Use the tokenizer the data was made with, or run tools/preprocess_data.py again with this one."
    if tokenizer_sha256 is not None and manifest.tokenizer_sha256 != tokenizer_sha256:
        raise InputError(
            f"{indexed.manifest_path}: made with the tokenizer of sha256 {manifest.tokenizer_sha256[:12]}..., this run's has "
            f"{tokenizer_sha256[:12]}.... {again}"
        )
    if manifest.separator_id != separator_id:
        raise InputError(f"{indexed.manifest_path}: documents end with id {manifest.separator_id}, {separator_id} expected. {again}")
    # The model's vocabulary may be larger: it is padded to divide by the tensor-parallel size.
    if manifest.vocab_size > vocab_size:
        raise InputError(
            f"{indexed.manifest_path}: made with {manifest.vocab_size:,} ids, at most model.vocab_size = {vocab_size:,} expected. {again}"
        )


def _check_separator(indexed: IndexedDataset, separator_id: int) -> None:
    """Without a manifest, check on some documents that the last id is the separator: Megatron's tools append it only on request."""
    with_tokens = np.flatnonzero(indexed.sizes)
    some = with_tokens[:: max(1, len(with_tokens) // 1000)]
    last = [int(indexed.get(int(document), int(indexed.sizes[document]) - 1, 1)[0]) for document in some]
    if separator_id not in last:
        raise InputError(
            f"{indexed.bin_path}: none of {len(last):,} documents ends with the separator, id {separator_id}; the first ends with "
            f"{last[0]}. Write it again with the separator (Megatron-LM's --append-eod), and with this model's tokenizer."
        )
