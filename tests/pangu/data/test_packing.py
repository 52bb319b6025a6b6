"""Packing against the stream written out token by token."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pangu.data import packing
from pangu.data.indexed import IndexedDataset, IndexedDatasetWriter
from pangu.data.packing import PackedDataset
from pangu.errors import InputError


def open_documents(prefix: Path, documents: list[list[int]]) -> IndexedDataset:
    with IndexedDatasetWriter(prefix, vocab_size=40000, separator_id=9, tokenizer_sha256="") as writer:
        for ids in documents:
            writer.add(np.array(ids, writer.dtype), np.array([len(ids)], np.int32))
    return IndexedDataset(prefix)


def random_documents(count: int, *, longest: int = 12) -> list[list[int]]:
    """Documents whose ids are all different, so that a sample says where it comes from; some have no tokens."""
    sizes = np.random.default_rng(count).integers(0, longest, count)
    ends = np.cumsum(sizes)
    return [list(range(10 + end - size, 10 + end)) for size, end in zip(sizes.tolist(), ends.tolist(), strict=True)]


def reference(documents: list[list[int]], seq_length: int, seed: int, num_samples: int) -> list[list[int]]:
    """The samples in reading order, from the stream itself and the two shuffles of each epoch."""
    per_epoch = sum(map(len, documents))
    stream: list[int] = []
    shuffles: list[np.random.RandomState] = []
    while len(stream) <= num_samples * seq_length + 2 * per_epoch + seq_length:
        random = np.random.RandomState(np.random.PCG64(np.random.SeedSequence([seed, len(shuffles)])))
        order = np.arange(len(documents))
        random.shuffle(order)
        stream += [token for number in order for token in documents[number]]
        shuffles.append(random)
    samples: list[list[int]] = []
    for epoch, random in enumerate(shuffles):
        first_tokens = range(0, (epoch + 1) * per_epoch, seq_length)
        begin_here = [position for position in first_tokens if position >= epoch * per_epoch]
        order = np.arange(len(begin_here))
        random.shuffle(order)
        samples += [stream[begin_here[number] : begin_here[number] + seq_length + 1] for number in order]
    return samples[:num_samples]


@pytest.mark.parametrize("stride", [1, 3, 128])
@pytest.mark.parametrize(("count", "seq_length"), [(40, 7), (40, 1), (300, 16), (3, 50), (5, 1000)])
def test_samples_are_those_of_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, seq_length: int, stride: int) -> None:
    """The last two have fewer tokens an epoch than a sample: it runs through several epochs."""
    monkeypatch.setattr(packing, "STRIDE", stride)
    documents = random_documents(count)
    dataset = PackedDataset(open_documents(tmp_path / "corpus", documents), range(count), seq_length=seq_length, seed=7, vocab_size=40000)
    num_samples = 3 * dataset.tokens_per_epoch // seq_length + 5
    found = [dataset[index] for index in range(num_samples)]
    assert all(sample.dtype == np.int64 and sample.shape == (seq_length + 1,) for sample in found)
    assert [sample.tolist() for sample in found] == reference(documents, seq_length, 7, num_samples)


def test_any_sample_without_those_before(tmp_path: Path) -> None:
    indexed = open_documents(tmp_path / "corpus", random_documents(50))
    options: dict[str, Any] = {"seq_length": 8, "seed": 3, "vocab_size": 40000}
    dataset = PackedDataset(indexed, range(50), **options)
    in_order = [dataset[index].tolist() for index in range(200)]
    for index in (199, 0, 120, 77, 31):
        assert PackedDataset(indexed, range(50), **options)[index].tolist() == in_order[index]
    assert len(PackedDataset(indexed, range(50), **options)[10**9]) == 9


def test_an_epoch_predicts_every_token_once(tmp_path: Path) -> None:
    """With s dividing T, the labels of the first epoch's samples and its first token are the corpus."""
    documents = [[10 + 4 * number, 11 + 4 * number, 12 + 4 * number, 9] for number in range(16)]
    dataset = PackedDataset(open_documents(tmp_path / "corpus", documents), range(16), seq_length=8, seed=0, vocab_size=100)
    inputs = Counter(token for index in range(8) for token in dataset[index][:-1].tolist())
    assert inputs == Counter(token for document in documents for token in document)


def test_seeds_and_epochs_differ(tmp_path: Path) -> None:
    indexed = open_documents(tmp_path / "corpus", random_documents(100))
    orders = {
        tuple(PackedDataset(indexed, range(100), seq_length=8, seed=seed, vocab_size=40000)._epoch(epoch).documents.tolist())
        for seed in (0, 1, 2)
        for epoch in (0, 1, 2)
    }
    assert len(orders) == 9


GOLDEN_ORDER = ([1, 4, 0, 5, 2, 8, 9, 7, 6, 3], [7, 4, 0, 3, 2, 5, 6, 1])


def test_the_order_never_changes(tmp_path: Path) -> None:
    """These numbers are in the runs people resume: if this fails, their data order changes silently."""
    indexed = open_documents(tmp_path / "corpus", random_documents(10))
    epoch = PackedDataset(indexed, range(10), seq_length=8, seed=1234, vocab_size=40000)._epoch(1)
    assert (epoch.documents.tolist(), epoch.samples.tolist()) == GOLDEN_ORDER


def test_only_the_given_documents(tmp_path: Path) -> None:
    documents = random_documents(30)
    dataset = PackedDataset(open_documents(tmp_path / "corpus", documents), range(20, 30), seq_length=8, seed=0, vocab_size=40000)
    allowed = {token for document in documents[20:] for token in document}
    assert {token for index in range(40) for token in dataset[index].tolist()} == allowed


@pytest.mark.parametrize("wrong", [50, 39999])
def test_id_beyond_the_vocabulary(tmp_path: Path, wrong: int) -> None:
    indexed = open_documents(tmp_path / "corpus", [[1, 2, 9], [1, wrong, 9]])
    message = rf"corpus\.bin: document 1 contains id {wrong:,}, ids below model\.vocab_size = 50 expected"
    with pytest.raises(InputError, match=message):
        PackedDataset(indexed, range(2), seq_length=8, seed=0, vocab_size=50)[0]


def test_negative_id(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "corpus", vocab_size=70000, separator_id=9, tokenizer_sha256="") as writer:
        writer.add(np.array([1, -3, 9], np.int32), np.array([3], np.int32))
    with pytest.raises(InputError, match="document 0 contains id -3"):
        PackedDataset(IndexedDataset(tmp_path / "corpus"), range(1), seq_length=2, seed=0, vocab_size=50)[0]


def test_documents_without_tokens(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokens in documents 0 to 2"):
        PackedDataset(open_documents(tmp_path / "corpus", [[], []]), range(2), seq_length=8, seed=0, vocab_size=50)


def test_documents_without_tokens_between_others_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pangu.data.packing.STRIDE", 2)
    documents = [[token] if token % 5 == 0 else [] for token in range(10, 40)]
    dataset = PackedDataset(open_documents(tmp_path / "corpus", documents), range(30), seq_length=3, seed=2, vocab_size=50)
    expected = sorted(token for document in documents for token in document)
    assert sorted(np.concatenate([dataset[index][:3] for index in range(2)]).tolist()) == expected


def test_index_of_five_million_documents_takes_no_loop(tmp_path: Path) -> None:
    """A loop that calls NumPy once a document takes a microsecond each; this takes about a tenth of that."""
    documents = 5_000_000
    with IndexedDatasetWriter(tmp_path / "corpus", vocab_size=40000, separator_id=9, tokenizer_sha256="") as writer:
        writer.add(np.ones(documents, writer.dtype), np.ones(documents, np.int32))
    indexed = IndexedDataset(tmp_path / "corpus")
    began = time.process_time()
    PackedDataset(indexed, range(documents), seq_length=1024, seed=0, vocab_size=40000)[0]
    assert time.process_time() - began < documents * 1e-6
