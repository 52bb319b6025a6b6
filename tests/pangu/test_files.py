"""Foreign files are opened and our own written in one way: no pipe blocks, no link is followed, nothing is half there."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pangu import files
from pangu.errors import InputError


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """Somebody's file, to which links are planted."""
    (tmp_path / "precious").write_text("precious")
    return tmp_path / "precious"


@pytest.mark.parametrize("read", [files.open_file, lambda path: files.read_bytes(path, 10), files.read_text, files.load_json])
def test_pipes_devices_and_directories_are_refused_at_once(read: Callable[[Path], Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    began = time.monotonic()
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, tmp_path / "absent"):
        with pytest.raises(OSError):
            read(path)
    assert time.monotonic() - began < 1


def test_what_is_read_is_bounded(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert files.read_bytes(file, 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        files.read_bytes(file, 4)
    os.truncate(file, 2**40)  # a hole
    for read in (files.read_text, files.load_json):
        with pytest.raises(ValueError, match="more than"):
            read(file)


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert files.read_text(tmp_path / "file") == '{"a": 1}' and files.load_json(tmp_path / "file") == {"a": 1}


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5_000, "NaN", "-Infinity", '{"a": Infinity}', "{", "", "\x00"])
def test_json_that_no_file_of_ours_has(text: str) -> None:
    with pytest.raises(ValueError):
        files.parse_json(text)


def test_new_files_are_created_and_never_opened_through_a_link(precious: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(precious)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("link", "dangling", "precious"):
        with pytest.raises(FileExistsError):
            files.create_file(tmp_path / name)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(OSError) as error:
        files.append_to(tmp_path / "link")
    assert error.value.errno == errno.ELOOP
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError):
        files.append_to(tmp_path / "pipe")
    with files.append_to(tmp_path / "lines") as file:
        file.write("a\n")
    with files.append_to(tmp_path / "lines") as file:
        file.write("b\n")
    assert (tmp_path / "lines").read_text() == "a\nb\n" and precious.read_text() == "precious"


def test_writing_replaces_a_link_and_not_its_target(precious: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").symlink_to(precious)
    (tmp_path / "config.yaml.tmp").symlink_to(precious)
    files.write_durably(tmp_path / "config.yaml", "new")
    assert (tmp_path / "config.yaml").read_text() == "new" and not (tmp_path / "config.yaml").is_symlink()
    assert precious.read_text() == "precious"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["config.yaml", "config.yaml.tmp", "precious"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("old")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        files.write_durably(tmp_path / "file", "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"


def test_files_have_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        files.write_durably(tmp_path / "a", "x")
        files.append_to(tmp_path / "b").close()
        files.create_file(tmp_path / "c").close()
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "abc"] == [0o600] * 3


# --- locks -------------------------------------------------------------------------------------------------------------------------------


def test_a_lock_does_not_touch_what_a_link_points_to(precious: Path, tmp_path: Path) -> None:
    (tmp_path / "out.lock").symlink_to(precious)
    with pytest.raises(InputError, match=r"out\.lock: is a link.*Remove it"), files.lock(tmp_path / "out"):
        pass
    os.remove(tmp_path / "out.lock")
    os.mkfifo(tmp_path / "out.lock")
    with pytest.raises(InputError, match="not a regular file"), files.lock(tmp_path / "out"):
        pass
    os.remove(tmp_path / "out.lock")
    os.link(precious, tmp_path / "out.lock")  # a hard link is a stale lock: it goes, the file stays
    with files.lock(tmp_path / "out"):
        assert (tmp_path / "out.lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}\n"
    assert precious.read_text() == "precious" and not (tmp_path / "out.lock").exists()


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    held = files.lock(tmp_path / "out")
    with held, pytest.raises(InputError, match=rf"process {os.getpid()} on .* is writing it"), files.lock(tmp_path / "out"):
        pass
    with files.lock(tmp_path / "out"):
        pass


def count_up(path: str, results: Any) -> None:
    taken = 0
    for _ in range(1000):
        try:
            with files.lock(Path(path)):
                file = Path(path + ".inside")
                file.touch(exist_ok=False)  # or else two are in
                file.unlink()
                taken += 1
        except InputError:
            pass
    results.put(taken)


def test_processes_that_race_for_a_lock_are_never_in_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=count_up, args=(str(tmp_path / "out"), results)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0] and sum(results.get() for _ in processes) > 0


# --- work in progress --------------------------------------------------------------------------------------------------------------------


def test_only_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    theirs = ["out.partial", "out.partial-1", "out.0123456.partial", "out.0123456g.partial", "out2.01234567.partial"]
    for name in (*theirs, "out.01234567.partial"):
        (tmp_path / name).mkdir()
    files.remove_leftovers(tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(theirs)


def test_publishing_spares_what_is_called_replaced(tmp_path: Path) -> None:
    for name in ("out", "out.replaced", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "of").write_text(name)
    files.publish(tmp_path / "new", tmp_path / "out")
    assert {entry.name: (entry / "of").read_text() for entry in tmp_path.iterdir()} == {"out": "new", "out.replaced": "out.replaced"}


def test_the_newest_of_what_was_moved_away_is_brought_back(tmp_path: Path) -> None:
    for age, name in enumerate(("out.00000000.replaced", "out.11111111.replaced")):
        (tmp_path / name).write_text(json.dumps(age))
        os.utime(tmp_path / name, (age, age))
    files.recover(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "1"
