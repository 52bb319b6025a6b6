"""Conversions that a full disk or a kill breaks off, and two to the same output: there is a whole output or none, and no rubbish."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.whole_model import equal, small_weights

from pangu import files
from pangu.conversion.convert import convert
from pangu.conversion.formats import FORMATS, open_weights
from pangu.conversion.weights import Overrides, WriteOptions
from pangu.errors import InputError
from tools.convert_checkpoint import main

ROOT = Path(__file__).parents[2]
WRITABLE = [name for name, known in FORMATS.items() if known.write]
HEADS = Overrides(num_heads=2)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of 2.6 MB on a disk with room."""
    path = tmp_path_factory.mktemp("large") / "weights"
    convert(small_weights(hidden_size=128, vocab_size=2000), "huggingface", path, WriteOptions())
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system is mounted for this test, which takes root")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> str:
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    return err


# --- no room -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", WRITABLE)
def test_a_full_disk(to: str, large: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--to", to, "--input", large, "--heads", "2", "--tensor-parallel", "2")
    assert "Free some space" in refused(capsys, monkeypatch, *words, "--output", small_disk / "sub/out")
    assert not any(small_disk.iterdir())
    convert(small_weights(), to, small_disk / "out", WriteOptions())
    before = snapshot(small_disk)
    assert "Free some space" in refused(capsys, monkeypatch, *words, "--output", small_disk / "out", "--force")
    assert snapshot(small_disk) == before
    assert equal(open_weights(small_disk / "out", HEADS), small_weights())


@pytest.mark.parametrize("to", WRITABLE)
def test_a_limit_on_the_size_of_files(
    to: str, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(small_weights(), to, tmp_path / "out", WriteOptions())
    before = snapshot(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        told = refused(capsys, monkeypatch, "--to", to, "--input", large, "--heads", "2", "--output", tmp_path / "out", "--force")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in told and "ulimit" in told
    assert snapshot(tmp_path) == before


# --- killed ------------------------------------------------------------------------------------------------------------------------------


def run_forked(action: Callable[[], Any]) -> int:
    """The exit status of a child that does it: 0, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        status = 1
        try:
            action()
            status = 0
        except InputError:
            status = 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """From now on the process kills itself before its `at`-th change of names, `at` counting from 0."""
    left = [at]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **keywords: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return call(*args, **keywords)

        return wrapped

    for name in ("rename", "replace", "unlink", "rmdir", "fsync"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


def make(path: Path, content: str, kind: str) -> None:
    if kind == "file":
        path.write_text(content)
        return
    path.mkdir()
    for name in "ab":
        (path / name).write_text(content)


def whole(path: Path) -> str | None:
    """The content, if it is all there."""
    if path.is_file():
        return path.read_text()
    found = [file.read_text() for file in path.iterdir()] if path.is_dir() else []
    return found[0] if len(found) == 2 and found[0] == found[1] else None


@pytest.mark.parametrize(("old", "new"), [("file", "file"), ("directory", "directory"), ("file", "directory"), ("directory", "file")])
def test_a_kill_at_any_step_of_publishing_loses_nothing(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    seen = set()
    while 0 not in ended:
        folder = tmp_path / str(len(ended))
        folder.mkdir()
        final, partial = folder / "out", folder / "out.partial"
        make(final, "old", old)
        make(partial, "new", new)

        def publish(final: Path = final, partial: Path = partial, step: int = len(ended)) -> None:
            kill_at(monkeypatch, step)
            files.publish(partial, final)

        ended.append(run_forked(publish))
        state = (whole(final), next(map(whole, folder.glob("out.*.replaced")), None))
        seen.add(state)
        assert state[0] in ("old", "new") or state == (None, "old"), f"after {len(ended) - 1} steps: {state}"
        if old == new == "file":
            assert state[0] is not None  # at every moment
        files.recover(final)
        assert whole(final) in ("old", "new")
        files.remove(partial)
        make(partial, "next", new)
        files.publish(partial, final)
        assert whole(final) == "next" and [entry.name for entry in folder.iterdir()] == ["out"]
    assert len(ended) > 3 and set(ended) == {-signal.SIGKILL, 0}
    assert ((None, "old") in seen) == (old != "file" or new != "file")  # the moment was met


@pytest.mark.parametrize("to", WRITABLE)
def test_the_next_conversion_follows_a_killed_one(to: str, tmp_path: Path) -> None:
    weights, read = small_weights(), []

    def die(_: int) -> None:
        read.append(1)
        if len(read) == 20:
            os.kill(os.getpid(), signal.SIGKILL)

    assert run_forked(lambda: convert(weights, to, tmp_path / "out", WriteOptions(), advance=die)) == -signal.SIGKILL
    assert sorted(re.sub(r"\.[0-9a-f]{8}\.", ".", path.name) for path in tmp_path.iterdir()) == ["out.lock", "out.partial"]
    convert(weights, to, tmp_path / "out", WriteOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert equal(open_weights(tmp_path / "out", HEADS), weights)


def test_the_tool_follows_its_killed_self(large: Path, tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import os, signal
        from pangu.conversion import convert
        convert.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        from tools.convert_checkpoint import main
        main()
    """)
    words = ["--to", "mindspore", "--input", str(large), "--output", str(tmp_path / "out.ckpt"), "--heads", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    killed = subprocess.run([sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out.ckpt").exists() and len(list(tmp_path.glob("out.ckpt.*.partial"))) == 1
    again = subprocess.run([sys.executable, str(ROOT / "tools/convert_checkpoint.py"), *words], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.ckpt"]
    assert equal(open_weights(tmp_path / "out.ckpt", HEADS), open_weights(large))


@pytest.mark.parametrize("force", [False, True])
def test_what_a_killed_replacement_has_moved_away_is_brought_back(force: bool, tmp_path: Path) -> None:
    convert(small_weights(seed=1), "npy", tmp_path / "out.01234567.replaced", WriteOptions())
    if force:
        convert(small_weights(seed=2), "npy", tmp_path / "out", WriteOptions(), force=True)
    else:
        with pytest.raises(InputError, match="exists already"):
            convert(small_weights(seed=2), "npy", tmp_path / "out", WriteOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert equal(open_weights(tmp_path / "out", HEADS), small_weights(seed=2 if force else 1))


# --- two at once -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", WRITABLE)
def test_of_two_conversions_to_one_output_the_second_is_refused(to: str, tmp_path: Path) -> None:
    weights = small_weights()
    began, go_on = os.pipe(), os.pipe()
    read: list[int] = []

    def pause(_: int) -> None:
        read.append(1)
        if len(read) == 5:
            os.write(began[1], b"x")
            os.read(go_on[0], 1)

    child = os.fork()
    if child == 0:
        signal.alarm(60)
        status = 1
        try:
            convert(weights, to, tmp_path / "out", WriteOptions(), advance=pause)
            status = 0
        finally:
            os._exit(status)
    os.read(began[0], 1)
    try:
        for force in (False, True):
            with pytest.raises(InputError, match=r"process \d+ on \S+ is writing it"):
                convert(small_weights(seed=9), to, tmp_path / "out", WriteOptions(), force=force)
    finally:
        os.write(go_on[1], b"x")
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert equal(open_weights(tmp_path / "out", HEADS), weights)


def test_many_at_once_leave_one_whole_output(tmp_path: Path) -> None:
    children = []
    models = [small_weights(seed=seed) for seed in range(4)]
    for model in models:
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            status = 0
            try:
                for _ in range(15):
                    try:
                        convert(model, "npy", tmp_path / "out", WriteOptions(), force=True)
                        status |= 4
                    except InputError as error:
                        status |= 0 if "is writing it" in str(error) else 2
            except BaseException:
                status |= 1
            os._exit(status)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(statuses) <= {0, 4} and 4 in statuses
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    found = open_weights(tmp_path / "out", HEADS)
    assert any(equal(found, model) for model in models)


def test_a_source_that_disappears_is_not_called_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    convert(small_weights(), "huggingface", tmp_path / "in", WriteOptions())
    weights = open_weights(tmp_path / "in")
    shutil.rmtree(tmp_path / "in")
    with pytest.raises(InputError) as caught:
        convert(weights, "npy", tmp_path / "out", WriteOptions())
    assert "cannot be written" not in str(caught.value) and not any(tmp_path.iterdir())


# --- what --force does not remove --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", WRITABLE)
def test_an_output_that_holds_the_input_or_strangers_is_refused_even_with_force(to: str, tmp_path: Path) -> None:
    source = tmp_path / "big/sub/weights"
    convert(small_weights(), "npy", source, WriteOptions())
    weights = open_weights(source, HEADS)
    for output in (tmp_path / "big", source):
        with pytest.raises(InputError, match="holds the input"):
            convert(weights, to, output, WriteOptions(), force=True)
    output = tmp_path / "out"
    convert(weights, to, output, WriteOptions())
    convert(weights, to, output, WriteOptions(), force=True)  # a converter's own
    if output.is_dir():
        (output / "notes.txt").write_text("mine")
        told = r"notes\.txt: was not written by a conversion"
    else:
        output.write_text("mine")
        told = "out: was not written by a conversion"
    with pytest.raises(InputError, match=told):
        convert(weights, to, output, WriteOptions(), force=True)
    link = tmp_path / "link"
    link.symlink_to(source)
    with pytest.raises(InputError, match=r"holds the input|was not written"):
        convert(small_weights(), to, link, WriteOptions(), force=True)
    assert equal(open_weights(source, HEADS), small_weights())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["big", "link", "out"]


def test_a_directory_of_work_in_progress_that_is_somebody_elses_stays(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/notes.txt").write_text("mine")
    convert(small_weights(), "npy", tmp_path / "out", WriteOptions())
    assert (tmp_path / "out.partial/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("to", [name for name in WRITABLE if name != "mindspore"])
def test_only_a_tokenizer_is_copied_as_the_tokenizer(to: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("root:x:0:0")
    (tmp_path / "vocab.model").symlink_to(tmp_path / "secret")
    weights = replace(small_weights(), tokenizer=tmp_path / "vocab.model")
    with pytest.raises(InputError, match=r"vocab\.model: 10 bytes that are not a SentencePiece model"):
        convert(weights, to, tmp_path / "out", WriteOptions())
    assert not (tmp_path / "out").exists()
