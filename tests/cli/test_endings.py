"""However a program ends, it says so in one line or not at all: every program, with streams that are closed, full, cut off or not UTF-8.

A program runs in a fork of the test, with file descriptors and streams as a new interpreter would have them: its imports are paid once.
"""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pangu.__main__ import VERBS, main

INTERRUPTED, BROKEN_PIPE = 130, 141
SECONDS = 100
CLOSED = -1


class Ended(NamedTuple):
    code: int
    stdout: str
    stderr: str


def stream(descriptor: int, mode: str, encoding: str) -> Any:
    """What a new interpreter makes of a file descriptor: None of one that is closed."""
    try:
        os.fstat(descriptor)
    except OSError:
        return None
    binary = open(descriptor, mode + "b", closefd=False)  # noqa: SIM115 (the stream holds it)
    return io.TextIOWrapper(binary, encoding=encoding, errors="backslashreplace" if descriptor == 2 else "strict")  # type: ignore[arg-type]


def run(
    *words: object,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    encoding: str = "utf-8",
    before: Callable[[], Any] = lambda: None,
) -> Ended:
    """Run `pangu WORDS`. A stream is a file descriptor, `CLOSED`, or None: it is kept, and standard input is empty."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull, "rb") as empty:
        child = os.fork()
        if child == 0:
            code = 120
            try:
                signal.alarm(SECONDS)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for number, given, usual in ((0, stdin, empty), (1, stdout, out), (2, stderr, err)):
                    os.dup2(usual.fileno() if given in (None, CLOSED) else given, number)  # type: ignore[arg-type]
                for number, given in enumerate((stdin, stdout, stderr)):
                    if given == CLOSED:
                        os.close(number)
                sys.stdin, sys.stdout, sys.stderr = (stream(number, mode, encoding) for number, mode in ((0, "r"), (1, "w"), (2, "w")))
                sys.argv = ["pangu", *map(str, words)]
                before()
                try:
                    main()
                    code = 0
                except SystemExit as leaving:
                    code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
                except BaseException:
                    code = 1
                    traceback.print_exc()
                for each in (sys.stdout, sys.stderr):  # as the interpreter does at its end; it cannot then, it exits with 120
                    each.flush()
            except BaseException:
                code = 120
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        return Ended(code, out.read().decode(encoding), err.read().decode(encoding))


@pytest.fixture(scope="module", autouse=True)
def programs() -> None:
    """Import what the programs import, once."""
    for module, _ in VERBS.values():
        importlib.import_module(module)
    for verb in VERBS:
        run(verb, "--help")


def assert_ends(ended: Ended, code: int, lines: int) -> None:
    assert ended.code == code, ended
    assert "Traceback" not in ended.stderr and ended.stderr.count("\n") == lines, ended.stderr


def helped(verb: str) -> list[str]:
    return [verb] if verb == "--help" else [verb, "--help"]


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "demo"])  # which needs no arguments
def test_without_arguments_a_program_says_what_it_needs(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run(verb)
    assert ended.code == 2 and "Traceback" not in ended.stderr
    assert "error: " in ended.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["--help", *VERBS])
def test_a_reader_that_goes_away_is_no_error(verb: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert_ends(run(*helped(verb), stdout=writer), BROKEN_PIPE, 0)
    finally:
        os.close(writer)


@pytest.mark.parametrize("verb", ["--help", *VERBS])
def test_a_full_disk_behind_standard_output_is_one_line(verb: str) -> None:
    with open("/dev/full", "w") as full:
        ended = run(*helped(verb), stdout=full.fileno())
    assert_ends(ended, 2, 1)
    assert "standard output cannot be written" in ended.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_closed_streams_are_no_error(verb: str) -> None:
    for closed in (["stdin"], ["stdout"], ["stderr"], ["stdin", "stdout"], ["stdin", "stdout", "stderr"]):
        ended = run(verb, "--help", **dict.fromkeys(closed, CLOSED))
        assert_ends(ended, 0, 0)
        assert ("usage" in ended.stdout) == ("stdout" not in closed)


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    """Or else what is printed would go into it."""
    (tmp_path / "corpus.txt").write_text("text\n")
    ended = run(
        "tokenizer", "--input", tmp_path / "corpus.txt", "--vocab-size", 9, "--output", tmp_path / "out", stdout=CLOSED, stderr=CLOSED
    )
    assert ended.code in (0, 2)
    assert (tmp_path / "corpus.txt").read_text() == "text\n"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_text_that_the_terminal_cannot_show_is_escaped(encoding: str, tmp_path: Path) -> None:
    ended = run("generate", "--help", encoding=encoding)
    assert ended.code == 0 and "\\u56db" in ended.stdout
    ended = run("inspect", tmp_path / "\u56db", encoding=encoding)
    assert_ends(ended, 2, 1)
    assert "\\u56db: not found" in ended.stderr


@pytest.mark.parametrize("verb", ["--help", *VERBS])
def test_an_interruption_is_one_line(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it comes; pressed twice."""
    monkeypatch.chdir(tmp_path)

    def interrupt(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    def prepare() -> None:
        import argparse

        argparse.ArgumentParser.parse_args = interrupt  # type: ignore[method-assign]
        argparse.ArgumentParser.parse_intermixed_args = interrupt  # type: ignore[method-assign]
        argparse.ArgumentParser.parse_known_intermixed_args = interrupt  # type: ignore[method-assign]
        if verb == "--help":
            sys.modules["builtins"].print = interrupt  # type: ignore[attr-defined]

    ended = run(verb, before=prepare)
    if verb == "--help":
        assert ended.code == INTERRUPTED and "Traceback" not in ended.stderr
    else:
        assert_ends(ended, INTERRUPTED, 1)
    assert list(tmp_path.iterdir()) == []


FILE_ARGUMENTS = {
    "train --config": ["train", "--config", "PIPE"],
    "train, DeepSpeed's JSON": ["train", "--config", "quickstart", "deepspeed=PIPE"],
    "train, data": ["train", "--config", "quickstart", "data.train=PREFIX"],
    "generate --model": ["generate", "--model", "PIPE", "--prompt", "a"],
    "generate --prompt-file": ["generate", "--model", "/nowhere", "--prompt-file", "PIPE"],
    "evaluate --model": ["evaluate", "--model", "PIPE", "--task", "c3", "--data", "/nowhere", "--output", "OUT"],
    "convert --input": ["convert", "--to", "npy", "--input", "PIPE", "--output", "OUT"],
    "inspect": ["inspect", "PIPE"],
    "preprocess --input": ["preprocess", "--input", "PIPE.txt", "--tokenizer", "/nowhere", "--output", "OUT"],
    "preprocess --tokenizer": ["preprocess", "--input", "TEXT", "--tokenizer", "PIPE", "--output", "OUT"],
    "tokenizer --input": ["tokenizer", "--input", "PIPE", "--vocab-size", "300", "--output", "OUT"],
    "plan --model": ["plan", "--model", "PIPE.yaml", "--global-batch-size", "8", "--cluster", "a100_80"],
    "plan --cluster": ["plan", "--model", "2.6B", "--global-batch-size", "8", "--cluster", "PIPE.yaml"],
    "plan --profile": ["plan", "--model", "2.6B", "--global-batch-size", "8", "--cluster", "a100_80", "--profile", "PIPE"],
    "validate --runs": ["plan", "validate", "--runs", "PIPE"],
    "plot": ["plot", "RUN"],
}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Pipes that nobody writes to, under every name that a program may look for."""
    (tmp_path / "run").mkdir()
    for name in ("pipe", "pipe.txt", "pipe.yaml", "prefix.bin", "prefix.idx", "prefix.json", "run/metrics.jsonl"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "text.txt").write_text("text\n")
    yield tmp_path


@pytest.mark.parametrize("name", FILE_ARGUMENTS)
def test_a_pipe_in_place_of_a_file_is_refused_at_once(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    names = {"PIPE": "pipe", "PIPE.txt": "pipe.txt", "PIPE.yaml": "pipe.yaml", "OUT": "out", "TEXT": "text.txt", "RUN": "run"}
    words = [str(place / names[word]) if word in names else word for word in FILE_ARGUMENTS[name]]
    words = [word.replace("=PREFIX", f"={place / 'prefix'}").replace("=PIPE", f"={place / 'pipe'}") for word in words]
    before = sorted(entry.name for entry in place.rglob("*"))
    began = time.monotonic()
    ended = run(*words)
    assert time.monotonic() - began < SECONDS / 2
    assert ended.code == 2 and "Traceback" not in ended.stderr, ended
    assert ended.stderr.splitlines()[-1].startswith("error: ")
    assert sorted(entry.name for entry in place.rglob("*")) == before
