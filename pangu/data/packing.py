"""Cuts a stream of documents into samples of equal length, as Megatron-LM's `GPTDataset` does (arXiv 1909.08053).

In each epoch, the documents are concatenated in a new random order, which gives one endless stream. Sample k is the `seq_length + 1`
tokens from position `k * seq_length` on: its last token is the next sample's first, so that every token is predicted once. No token is
dropped or padded; a sample may span documents, and the end of an epoch.

Samples that begin in the same epoch are read in random order. With T tokens per epoch and sequences of s, sample k begins in epoch
`k * s // T`, so the order of any epoch can be computed without those before it, and a run can resume at any position at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pangu.data.indexed import IndexedDataset
from pangu.errors import InputError

# The stream position of one document in so many is kept; the others' follow from their sizes when one is looked up. With every one kept, an
# epoch of 100 million documents would take 800 MB more.
STRIDE = 128


class _Epoch(NamedTuple):
    documents: NDArray[np.int32]
    """[N] documents in the order of this epoch."""
    starts: NDArray[np.int64]
    """[N / STRIDE] position in the epoch, in tokens, of every STRIDE-th of them."""
    samples: NDArray[np.uint32]
    """The samples that begin in this epoch, counted from its first, in the order they are read."""


class PackedDataset:
    """Samples of `seq_length + 1` tokens from a range of documents; `dataset[i]` is defined for every i >= 0.

    Random orders come from `SeedSequence([seed, epoch])` and PCG64, by `RandomState.shuffle`: NumPy never changes that class's streams
    (NEP 19), while `Generator`'s may change with its version, and a run resumed after an upgrade would see another order.

    A range with fewer tokens than one sample is allowed: the sample then repeats it.

    Memory: 4 bytes per document and 4 bytes per sample, for each of the two epochs in use.

    Args:
        indexed: the documents, each ending with the separator.
        documents: range of the documents to use.
        seq_length: s, input tokens per sample.
        seed: seed of the random orders, 0 or more.
        vocab_size: the model's vocabulary size; every id must be below it.

    Raises:
        InputError: if the documents have no tokens; on access, if an id is not in the vocabulary.
    """

    def __init__(self, indexed: IndexedDataset, documents: range, *, seq_length: int, seed: int, vocab_size: int) -> None:
        self.indexed = indexed
        self.documents = documents
        self.seq_length = seq_length
        self.seed = seed
        self.vocab_size = vocab_size
        self.sizes = indexed.sizes[documents.start : documents.stop]
        self.tokens_per_epoch = int(self.sizes.sum(dtype=np.int64))
        if self.tokens_per_epoch == 0:
            raise InputError(f"{indexed.bin_path}: no tokens in documents {documents.start:,} to {documents.stop:,}. Give it more text.")
        # Two, for the samples that begin in one epoch and end in the next.
        self._epoch = lru_cache(maxsize=2)(self._build_epoch)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Sample number `index` in reading order: int64[seq_length + 1]."""
        epoch = index * self.seq_length // self.tokens_per_epoch
        first = self._first_sample(epoch)
        sample = first + int(self._epoch(epoch).samples[index - first])
        position = sample * self.seq_length - epoch * self.tokens_per_epoch
        ids = np.empty(self.seq_length + 1, np.int64)
        filled = 0
        for documents, offsets, lengths in self._pieces(epoch, position, len(ids)):
            found = self.indexed.gather(documents, offsets, lengths)
            ids[filled : filled + len(found)] = found
            filled += len(found)
            # As unsigned numbers, negative ids are too large as well.
            if ids[filled - len(found) : filled].view(np.uint64).max() >= self.vocab_size:
                self._refuse(documents, lengths, found)
        return ids

    def _first_sample(self, epoch: int) -> int:
        """Index of the first sample that begins in this epoch: at the first multiple of seq_length at or after the epoch's start."""
        return -(-epoch * self.tokens_per_epoch // self.seq_length)

    def _build_epoch(self, epoch: int) -> _Epoch:
        random = np.random.RandomState(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
        documents = np.arange(len(self.sizes), dtype=np.int32)
        random.shuffle(documents)
        tokens = np.add.reduceat(self.sizes[documents], np.arange(0, len(documents), STRIDE), dtype=np.int64)
        starts = np.cumsum(tokens) - tokens
        samples = np.arange(self._first_sample(epoch + 1) - self._first_sample(epoch), dtype=np.uint32)
        random.shuffle(samples)
        return _Epoch(documents, starts, samples)

    def _pieces(self, epoch: int, position: int, length: int) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
        """Yield documents, offsets and lengths of the pieces that make up `length` tokens from `position` of this epoch on, in groups."""
        while True:
            order = self._epoch(epoch)
            # side="right" steps over documents without tokens, which begin where the next one does.
            stride = int(order.starts.searchsorted(position, side="right")) - 1
            while position < self.tokens_per_epoch:
                documents = order.documents[stride * STRIDE : (stride + 1) * STRIDE]
                sizes = self.sizes[documents]
                ends = sizes.cumsum(dtype=np.int64) + order.starts[stride]
                stop = min(position + length, int(ends[-1]))
                if stop > position:  # or else all documents of this stride are without tokens
                    touched = slice(int(ends.searchsorted(position, side="right")), int(ends.searchsorted(stop)) + 1)
                    begins = ends[touched] - sizes[touched]
                    first, last = np.maximum(begins, position), np.minimum(ends[touched], stop)
                    yield documents[touched] + self.documents.start, first - begins, last - first
                length -= stop - position
                position = stop
                if not length:
                    return
                stride += 1
            epoch, position = epoch + 1, 0

    def _refuse(self, documents: NDArray[Any], lengths: NDArray[Any], ids: NDArray[Any]) -> None:
        at = int(((ids < 0) | (ids >= self.vocab_size)).argmax())
        document = int(documents[np.cumsum(lengths).searchsorted(at, side="right")])
        raise InputError(
            f"{self.indexed.bin_path}: document {document:,} contains id {ids[at]:,}, ids below model.vocab_size = {self.vocab_size:,} "
            "expected. It was made with another tokenizer or is damaged: run tools/preprocess_data.py with this model's tokenizer."
        )
