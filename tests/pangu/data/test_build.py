"""What is accepted as training data, and how it is split."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pangu.data.build import build_datasets
from pangu.data.indexed import IndexedDatasetWriter
from pangu.errors import InputError

OPTIONS: dict[str, Any] = {
    "seq_length": 8,
    "seed": 1,
    "validation_fraction": 0.0,
    "vocab_size": 1000,
    "separator_id": 9,
    "tokenizer_sha256": "ab" * 32,
}


def write(prefix: Path, documents: int, *, first_id: int = 10, separator_id: int = 9) -> Path:
    """Documents of two tokens: an id of their own, and the separator."""
    with IndexedDatasetWriter(prefix, vocab_size=900, separator_id=separator_id, tokenizer_sha256="ab" * 32) as writer:
        ids = np.full((documents, 2), separator_id, writer.dtype)
        ids[:, 0] = np.arange(first_id, first_id + documents)
        writer.add(ids.reshape(-1), np.full(documents, 2, np.int32))
    return prefix


def ids_in(dataset: Any, samples: int = 200) -> set[int]:
    return {token for index in range(samples) for token in dataset[index].tolist()} - {9}


def test_validation_is_the_tail_of_each_prefix(tmp_path: Path) -> None:
    prefixes = [write(tmp_path / "a", 100, first_id=100), write(tmp_path / "b", 10, first_id=500)]
    training, validation = build_datasets(prefixes, [1, 1], **{**OPTIONS, "validation_fraction": 0.05})
    assert validation is not None
    assert ids_in(training) == {*range(100, 195), *range(500, 509)}
    assert ids_in(validation) == {*range(195, 200), 509}


def test_no_validation(tmp_path: Path) -> None:
    training, validation = build_datasets([str(write(tmp_path / "a", 10))], [3.0], **OPTIONS)
    assert validation is None and ids_in(training) == set(range(10, 20))


def test_without_weights_sources_count_by_their_tokens(tmp_path: Path) -> None:
    prefixes = [write(tmp_path / "a", 300), write(tmp_path / "b", 100)]
    training, _ = build_datasets(prefixes, None, **OPTIONS)
    assert sum(training.locate(index)[0] for index in range(10_000)) == 2_500


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_sha256": "cd" * 32}, r"a\.json: made with the tokenizer of sha256 abababababab\.\.\., this run's has cdcdcdcdcdcd"),
        ({"separator_id": 8}, r"a\.json: documents end with id 9, 8 expected"),
        ({"vocab_size": 899}, r"a\.json: made with 900 ids, at most model\.vocab_size = 899 expected"),
        ({"validation_fraction": 1.0}, r"data\.validation_fraction = 1\.0"),
        ({"validation_fraction": 0.99}, r"a\.idx: 10 documents found, too few to hold out"),
    ],
)
def test_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    prefix = write(tmp_path / "a", 10)
    with pytest.raises(InputError, match=message):
        build_datasets([prefix], [1], **{**OPTIONS, **change})


def test_no_tokenizer_at_hand(tmp_path: Path) -> None:
    build_datasets([write(tmp_path / "a", 10)], [1], **{**OPTIONS, "tokenizer_sha256": None})


def test_empty_corpus(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.idx: no tokens in its 0 documents"):
        build_datasets([write(tmp_path / "a", 0)], [1], **OPTIONS)


def test_no_prefixes() -> None:
    with pytest.raises(InputError, match=r"data\.train: no data set found"):
        build_datasets([], [], **OPTIONS)


def test_files_of_others_must_have_the_separator(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", 10, separator_id=8)
    (tmp_path / "a.json").unlink()
    with pytest.raises(InputError, match=r"a\.bin: none of 10 documents ends with the separator, id 9; the first ends with 8"):
        build_datasets([prefix], [1], **OPTIONS)
    build_datasets([prefix], [1], **{**OPTIONS, "separator_id": 8})


def test_ids_beyond_the_vocabulary_in_files_of_others(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(struct.pack("<4H", 7, 9, 1000, 9))
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3)
    (tmp_path / "a.idx").write_bytes(header + struct.pack("<ii5q", 2, 2, 0, 4, 0, 1, 2))
    training, _ = build_datasets([tmp_path / "a"], [1], **OPTIONS)
    with pytest.raises(InputError, match=r"a\.bin: document 1 contains id 1,000"):
        training[0]
