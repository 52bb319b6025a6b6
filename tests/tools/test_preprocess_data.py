"""The program as people start it: its words, its exit codes, and what a signal leaves behind."""

from __future__ import annotations

import gzip
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pangu.data.indexed import IndexedDataset
from pangu.text.tokenizer_training import train_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
TEXT = "\n\n".join(f"第{number}篇：今天是一个好天气。" for number in range(500))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """corpus.txt.gz and a tokenizer."""
    directory = tmp_path_factory.mktemp("inputs")
    (directory / "corpus.txt").write_text(TEXT)
    train_tokenizer([directory / "corpus.txt"], 50, directory / "tokenizer")
    with gzip.open(directory / "corpus.txt.gz", "wb") as file:
        file.write(TEXT.encode())
    return directory


def command(directory: Path, output: Path, *more: str) -> list[str]:
    options = ["--tokenizer", str(directory / "tokenizer"), "--output", str(output)]
    return [sys.executable, str(TOOL), "--input", str(directory / "corpus.txt.gz"), *options, *more]


def test_summary(directory: Path, tmp_path: Path) -> None:
    run = subprocess.run(command(directory, tmp_path / "out"), capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    tokens = int(IndexedDataset(tmp_path / "out").sizes.sum())
    assert run.stdout.startswith(f"500 documents (0 empty ones left out), {tokens:,} tokens in ")
    assert run.stdout.endswith(f": {tmp_path}/out.bin, {tmp_path}/out.idx, {tmp_path}/out.json\n")


def test_refused_input_is_one_line_and_exit_code_2(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes("你好".encode("gb18030"))
    run = subprocess.run(
        command(directory, tmp_path / "out", "--input", str(tmp_path / "bad.txt")), capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 2
    assert run.stderr == (
        f"error: {tmp_path}/bad.txt: byte 0xc4 at offset 0 of the text is not UTF-8. Convert the file, for instance with "
        "iconv -f GB18030 -t UTF-8.\n"
    )
    assert os.listdir(tmp_path) == ["bad.txt"]


def test_a_file_size_limit_leaves_nothing(directory: Path, tmp_path: Path) -> None:
    """The kernel refuses the bytes, not a stand-in."""
    run = subprocess.run(
        command(directory, tmp_path / "out"),
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert run.returncode == 2
    assert "out.bin: writing stopped after" in run.stderr and "File too large" in run.stderr and run.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals(directory: Path, tmp_path: Path, number: signal.Signals) -> None:
    """In the midst of the work. Whoever kills the program outright finds no data set either, and no workers left."""
    long = tmp_path / "long.txt"
    long.write_text((TEXT + "\n\n") * 1000)
    line = command(directory, tmp_path / "out", "--workers", "2", "--input", str(long))
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: len(children(process.pid)) == 2 or process.poll() is not None)
        workers = children(process.pid)
        assert len(workers) == 2
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        wait_for(lambda: not any(map(running, workers)))
    finally:
        process.kill()
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        left = [re.sub(r"\.[0-9a-f]{8}\.partial$", ".partial", name) for name in os.listdir(tmp_path)]
        assert sorted(left) == ["long.txt", "out.bin.lock", "out.bin.partial"]
    else:
        assert process.returncode == 130
        assert stderr == "interrupted: nothing was written.\n"
        assert os.listdir(tmp_path) == ["long.txt"]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
