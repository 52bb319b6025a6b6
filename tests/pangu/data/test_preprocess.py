"""Text to data set within one process tree: contents, order, and failures on the way."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pangu.data import indexed as indexed_module
from pangu.data import preprocess as preprocess_module
from pangu.data.indexed import IndexedDataset
from pangu.data.preprocess import preprocess
from pangu.errors import InputError
from pangu.text.documents import read_blocks
from pangu.text.tokenizer import PanguTokenizer
from pangu.text.tokenizer_training import train_tokenizer

TEXTS = [f"第{number}篇：今天是一个好天气。\nThe weather is fine {number} times." for number in range(600)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n\n".join(TEXTS))
    return path


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> PanguTokenizer:
    return train_tokenizer([corpus], 80, corpus.parent)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess_module, "read_blocks", lambda path: read_blocks(path, 512))


def outputs(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx", "json")]


def test_documents_are_ids_and_a_separator(tmp_path: Path, corpus: Path, tokenizer: PanguTokenizer) -> None:
    summary = preprocess([corpus], tokenizer, tmp_path / "out", workers=1)
    dataset = IndexedDataset(tmp_path / "out")
    assert [ids.tolist() for ids in dataset] == [[*tokenizer.encode(text), tokenizer.eot_id] for text in TEXTS]
    assert (summary.documents, summary.tokens, summary.empty) == (600, int(dataset.sizes.sum()), 0)
    manifest = dataset.manifest
    assert manifest is not None
    assert (manifest.tokenizer_sha256, manifest.vocab_size, manifest.separator_id) == (tokenizer.sha256, 80, tokenizer.eot_id)


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path, corpus: Path, tokenizer: PanguTokenizer) -> None:
    lines = tmp_path / "more.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in (*TEXTS[::-1], "", " \n")))
    for workers in (1, 2, 3):
        summary = preprocess([lines, corpus, lines], tokenizer, tmp_path / str(workers), workers=workers)
        assert (summary.documents, summary.empty) == (1800, 4)
    assert outputs(tmp_path / "1") == outputs(tmp_path / "2") == outputs(tmp_path / "3")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_bad_line_is_named(tmp_path: Path, tokenizer: PanguTokenizer, workers: int) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "好"}\n' * 500 + "{\n" + '{"text": "好"}\n' * 500 + "{\n")
    with pytest.raises(InputError, match=r"corpus\.jsonl:501: not JSON"):
        preprocess([path], tokenizer, tmp_path / "out", workers=workers)
    assert os.listdir(tmp_path) == ["corpus.jsonl"]


@pytest.mark.parametrize("content", ["", "\n\n \n\n\n"])
def test_no_documents(tmp_path: Path, tokenizer: PanguTokenizer, content: str) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text(content)
    with pytest.raises(InputError, match=r"corpus\.txt: no documents found"):
        preprocess([path], tokenizer, tmp_path / "out", workers=1)
    assert os.listdir(tmp_path) == ["corpus.txt"]


def test_a_missing_file_is_found_before_the_work(tmp_path: Path, corpus: Path, tokenizer: PanguTokenizer) -> None:
    with pytest.raises(InputError, match=r"missing\.txt: cannot be read"):
        preprocess([corpus, tmp_path / "missing.txt"], tokenizer, tmp_path / "out", workers=1)
    assert os.listdir(tmp_path) == []


def test_output_that_is_a_directory(tmp_path: Path, corpus: Path, tokenizer: PanguTokenizer) -> None:
    with pytest.raises(InputError, match="is a directory, the first part of a file name expected"):
        preprocess([corpus], tokenizer, tmp_path, workers=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk_on_the_way(
    tmp_path: Path, corpus: Path, tokenizer: PanguTokenizer, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk with room for 4,000 bytes, under the writer's buffer: the writes fail, and so does closing the file."""
    real_open = open

    class Full:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.file = real_open(*args, **options)
            self.room = 4000

        def write(self, data: bytes) -> int:
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

        def close(self) -> None:
            self.file.close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    monkeypatch.setattr(indexed_module, "create_file", lambda path: Full(path, "xb"))
    with pytest.raises(InputError, match=r"out\.bin: writing stopped after [\d,]+ bytes: No space left on device"):
        preprocess([corpus], tokenizer, tmp_path / "out", workers=workers)
    assert os.listdir(tmp_path) == []


def test_a_killed_worker_is_explained(tmp_path: Path, corpus: Path, tokenizer: PanguTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess_module._Tokenize, "__call__", lambda self, block: os.kill(os.getpid(), 9))
    with pytest.raises(InputError, match="a worker was killed, probably for lack of memory"):
        preprocess([corpus], tokenizer, tmp_path / "out", workers=2)
    assert os.listdir(tmp_path) == []
