"""The Megatron format byte by byte, and every way in which a file can be wrong."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pangu.data import indexed as indexed_module
from pangu.data.indexed import IndexedDataset, IndexedDatasetWriter, token_dtype
from pangu.errors import InputError

DOCUMENTS = [[5, 1, 9], [9], [39999, 2, 3, 4, 9], [7, 9]]
MANIFEST = {"vocab_size": 40000, "separator_id": 9, "tokenizer_sha256": "ab" * 32}


def write(prefix: Path, documents: list[list[int]] = DOCUMENTS, **manifest: Any) -> Path:
    with IndexedDatasetWriter(prefix, **{**MANIFEST, **manifest}) as writer:
        for ids in documents:
            writer.add(np.array(ids, writer.dtype), np.array([len(ids)], np.int32))
    return prefix


def expected_index(documents: list[list[int]], code: int, itemsize: int) -> bytes:
    """The format written down a second time, value by value."""
    data = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code) + struct.pack("<QQ", len(documents), len(documents) + 1)
    for ids in documents:
        data += struct.pack("<i", len(ids))
    position = 0
    for ids in documents:
        data += struct.pack("<q", position)
        position += len(ids) * itemsize
    for number in range(len(documents) + 1):
        data += struct.pack("<q", number)
    return data


@pytest.mark.parametrize(("vocab_size", "code", "letter"), [(40000, 8, "H"), (65499, 8, "H"), (65500, 4, "i"), (128320, 4, "i")])
def test_written_bytes_are_megatrons(tmp_path: Path, vocab_size: int, code: int, letter: str) -> None:
    prefix = write(tmp_path / "new" / "corpus.v1", vocab_size=vocab_size)
    ids = [token for document in DOCUMENTS for token in document]
    assert Path(f"{prefix}.bin").read_bytes() == struct.pack(f"<{len(ids)}{letter}", *ids)
    assert Path(f"{prefix}.idx").read_bytes() == expected_index(DOCUMENTS, code, struct.calcsize(letter))
    assert sorted(os.listdir(prefix.parent)) == ["corpus.v1.bin", "corpus.v1.idx", "corpus.v1.json"]
    dtype = "uint16" if letter == "H" else "int32"
    counts = {"version": 1, "dtype": dtype, "documents": 4, "tokens": 11}
    assert json.loads(Path(f"{prefix}.json").read_text()) == {**MANIFEST, "vocab_size": vocab_size, **counts}


def test_index_in_chunks_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed_module, "CHUNK", 3)
    assert Path(f"{write(tmp_path / 'corpus')}.idx").read_bytes() == expected_index(DOCUMENTS, 8, 2)
    assert [list(ids) for ids in IndexedDataset(tmp_path / "corpus")] == DOCUMENTS


@pytest.mark.parametrize(("code", "letter"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")])
def test_reads_files_of_others(tmp_path: Path, code: int, letter: str) -> None:
    """No manifest, every integer dtype, documents without tokens, one useless doc_idx entry as in PanGu-α's own files."""
    documents = [[], [1, 2, 9], [], [100, 9], []]
    index = expected_index(documents, code, struct.calcsize(letter))
    index = index[:26] + struct.pack("<Q", 1) + index[34 : 34 + 12 * len(documents)] + struct.pack("<q", 0)
    (tmp_path / "theirs.idx").write_bytes(index)
    (tmp_path / "theirs.bin").write_bytes(struct.pack(f"<5{letter}", 1, 2, 9, 100, 9))
    dataset = IndexedDataset(tmp_path / "theirs")
    assert dataset.manifest is None
    assert [list(ids) for ids in dataset] == documents
    assert dataset.sizes.dtype == np.int32 and list(dataset.sizes) == [0, 3, 0, 2, 0]
    assert dataset.pointers.dtype == np.int64 and len(dataset) == 5


def test_get_reads_a_part(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "corpus"))
    assert list(dataset.get(2, 1, 3)) == [2, 3, 4]
    assert not dataset[2].flags.writeable
    assert dataset.manifest is not None and dataset.manifest.tokens == 11


def test_data_set_without_documents(tmp_path: Path) -> None:
    assert len(IndexedDataset(write(tmp_path / "corpus", []))) == 0


def test_every_truncation_of_the_index_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "corpus")
    whole = (tmp_path / "corpus.idx").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "corpus.idx").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"corpus\.idx: .*run tools/preprocess_data\.py again") as refusal:
            IndexedDataset(prefix)
        assert "\n" not in str(refusal.value)


def test_truncated_index_says_where_it_ends(tmp_path: Path) -> None:
    prefix = write(tmp_path / "corpus", [[9]] * 12_000)
    os.truncate(f"{prefix}.idx", 34 + 4 * 12_000 + 8 * 7_311 + 5)
    with pytest.raises(InputError) as refusal:
        IndexedDataset(prefix)
    assert str(refusal.value) == (
        f"{prefix}.idx: 12,000 documents (240,042 bytes) expected from its header, the file ends after 7,311 (106,527 bytes). "
        "It was cut off: run tools/preprocess_data.py again."
    )


def test_every_truncation_of_the_ids_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "corpus")
    (tmp_path / "corpus.json").unlink()
    whole = (tmp_path / "corpus.bin").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "corpus.bin").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"corpus\.bin: .* bytes found, more expected by its index"):
            IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("offset", "patch", "message"),
    [
        (0, b"X", "begins with b'XMIDIDX"),
        (0, b"TNTIDX\x00\x00", "old 'lazy' or 'cached' format"),
        (9, struct.pack("<Q", 2), "format version 2 found, 1 expected"),
        (17, b"\x00", "dtype code 0 found"),
        (17, b"\x06", "dtype code 6 found"),
        (17, b"\x09", "dtype code 9 found"),
        (18, struct.pack("<Q", 2**60), "1,152,921,504,606,846,976 documents .* expected from its header"),
        (18, struct.pack("<Q", 3), "It is damaged or holds more than text"),
        (26, struct.pack("<Q", 2**62), "expected from its header"),
        (34, struct.pack("<i", -1), "-1 tokens from byte 0, found"),
        (34, struct.pack("<i", 2**31 - 1), "2,147,483,647 tokens from byte 0"),
        (50, struct.pack("<q", -2), "byte -2, found"),
        (58, struct.pack("<q", 7), "byte 7, found"),
        (66, struct.pack("<q", 6), "and not below 8 expected"),
        (74, struct.pack("<q", 16), "and not below 18 expected"),
        (74, struct.pack("<q", 2**63 - 1), "more expected by its index"),
        (74, struct.pack("<q", 20), "22 bytes found, more expected by its index"),
    ],
)
@pytest.mark.parametrize("chunk", [1 << 20, 3])
def test_damaged_index_is_refused(
    tmp_path: Path, offset: int, patch: bytes, message: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = write(tmp_path / "corpus")
    monkeypatch.setattr(indexed_module, "CHUNK", chunk)
    data = bytearray((tmp_path / "corpus.idx").read_bytes())
    data[offset : offset + len(patch)] = patch
    (tmp_path / "corpus.idx").write_bytes(data)
    with pytest.raises(InputError, match=message) as refusal:
        IndexedDataset(prefix)
    assert "\n" not in str(refusal.value) and "corpus." in str(refusal.value)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_missing_file_is_refused(tmp_path: Path, suffix: str) -> None:
    prefix = write(tmp_path / "corpus")
    (tmp_path / f"corpus.{suffix}").unlink()
    with pytest.raises(InputError, match=rf"corpus\.{suffix}: No such file or directory\. A data set is"):
        IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": 5}, r"documents 5 expected from the manifest, .* have 4\. The three files are not of one run"),
        ({"tokens": 12}, "tokens 12 expected"),
        ({"dtype": "int32"}, "dtype int32 expected"),
        ({"version": 2}, "version: Input should be 1"),
        ({"separator_id": None}, "separator_id: Input should be"),
        ({"unknown": 1}, "unknown: Extra inputs"),
    ],
)
def test_manifest_must_agree(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    prefix = write(tmp_path / "corpus")
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=rf"corpus\.json: {message}"):
        IndexedDataset(prefix)


def test_manifest_that_is_no_json(tmp_path: Path) -> None:
    prefix = write(tmp_path / "corpus")
    (tmp_path / "corpus.json").write_text("{")
    with pytest.raises(InputError, match=r"corpus\.json: the file: Invalid JSON"):
        IndexedDataset(prefix)


def test_ids_of_another_run_are_refused(tmp_path: Path) -> None:
    """More ids than the index accounts for: no pointer is wrong, but the manifest knows."""
    prefix = write(tmp_path / "corpus")
    with (tmp_path / "corpus.bin").open("ab") as file:
        file.write(b"\x09\x00")
    with pytest.raises(InputError, match=r"\.bin bytes 22 expected .* have 24"):
        IndexedDataset(prefix)


def test_an_exception_leaves_the_earlier_data_set(tmp_path: Path) -> None:
    prefix = write(tmp_path / "corpus")
    with pytest.raises(KeyboardInterrupt), IndexedDatasetWriter(prefix, **MANIFEST) as writer:
        writer.add(np.array([1, 9], writer.dtype), np.array([2], np.int32))
        raise KeyboardInterrupt
    assert sorted(os.listdir(tmp_path)) == ["corpus.bin", "corpus.idx", "corpus.json"]
    assert [list(ids) for ids in IndexedDataset(prefix)] == DOCUMENTS


def test_full_disk_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    message = r"corpus\.bin: writing stopped after 22 bytes: No space left on device\. Nothing was left behind; free space"
    with pytest.raises(InputError, match=message):
        write(tmp_path / "corpus")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("renames_before_the_kill", [0, 1, 2])
def test_a_kill_between_the_renames_shows_no_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames_before_the_kill: int
) -> None:
    """The last rename is the index's; without it nothing opens, not even with an earlier data set's files around."""
    prefix = write(tmp_path / "corpus")
    rename, done = os.replace, []

    def killed(source: Path, target: Path) -> None:
        if len(done) == renames_before_the_kill:
            raise KeyboardInterrupt
        done.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(prefix, [[1, 9]])
    with pytest.raises(InputError, match=r"corpus\.idx: No such file"):
        IndexedDataset(prefix)


def test_two_writers_of_one_prefix(tmp_path: Path) -> None:
    prefix = tmp_path / "corpus"
    with IndexedDatasetWriter(prefix, **MANIFEST) as writer:
        writer.add(np.array([1, 9], writer.dtype), np.array([2], np.int32))
        with pytest.raises(InputError, match=rf"corpus\.bin: process {os.getpid()} on .* is writing it"):
            IndexedDatasetWriter(prefix, **MANIFEST)
    assert [list(ids) for ids in IndexedDataset(prefix)] == [[1, 9]]


def test_what_a_killed_run_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "corpus.bin.0123abcd.partial").write_bytes(b"left over")
    (tmp_path / "corpus.bin.lock").write_bytes(b"process 1 on nowhere")
    assert [list(ids) for ids in IndexedDataset(write(tmp_path / "corpus"))] == DOCUMENTS
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["corpus.bin", "corpus.idx", "corpus.json"]


def test_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="make the directory writable or choose another --output"):
        write(tmp_path / "file" / "corpus")


def test_token_dtype() -> None:
    assert [token_dtype(size).name for size in (40000, 65499, 65500)] == ["uint16", "uint16", "int32"]
