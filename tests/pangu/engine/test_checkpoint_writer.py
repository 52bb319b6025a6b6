"""Files of a checkpoint: what they hold is the state at the moment of the call, and a failure waits until it is asked for."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pangu.engine.checkpoint_writer import FileWriter, on_host
from pangu.engine.manifest import FileEntry, file_problem

INNER = SimpleNamespace(zipfile_serialization=True, name="DeepSpeed's own")


def state() -> dict[str, Any]:
    shared = torch.arange(6.0)
    return {"whole": shared, "part": shared[2:4], "weight": nn.Parameter(torch.ones(2)), "step": 3, "list": [torch.zeros(1)]}


@pytest.mark.parametrize("background", [False, True])
def test_files_are_described_as_they_are(background: bool, tmp_path: Path) -> None:
    writer = FileWriter(INNER, background=background)
    assert writer.name == "DeepSpeed's own"  # whatever else DeepSpeed asks for
    values = state()
    writer.save(values, tmp_path / "a.pt")
    writer.save({"step": 4}, str(tmp_path / "b.pt"))
    writer.close()
    described = writer.finish()
    assert writer.is_done() and sorted(described) == ["a.pt", "b.pt"]
    assert all(file_problem(tmp_path / name, FileEntry(**entry)) is None for name, entry in described.items())
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    assert torch.equal(found["whole"], torch.arange(6.0)) and found["step"] == 3
    assert found["part"].untyped_storage()._cdata == found["whole"].untyped_storage()._cdata  # one memory, stored once


def test_both_ways_write_the_same_bytes(tmp_path: Path) -> None:
    for name, background in (("now", False), ("later", True)):
        (tmp_path / name).mkdir()
        writer = FileWriter(INNER, background=background)
        writer.save(state(), tmp_path / name / "a.pt")
        writer.close()
        writer.finish()
    assert (tmp_path / "now/a.pt").read_bytes() == (tmp_path / "later/a.pt").read_bytes()


def test_training_goes_on_while_the_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, write = threading.Event(), FileWriter._write

    def wait(writer: FileWriter, *job: Any) -> None:
        assert begin.wait(10)
        write(writer, *job)

    monkeypatch.setattr(FileWriter, "_write", wait)
    writer = FileWriter(INNER, background=True)
    weights = torch.zeros(3)
    writer.save({"weights": weights}, tmp_path / "a.pt")
    writer.close()
    weights.fill_(7.0)
    assert not writer.is_done()
    begin.set()
    writer.finish()
    assert torch.equal(torch.load(tmp_path / "a.pt", weights_only=True)["weights"], torch.zeros(3))


@pytest.mark.parametrize("background", [False, True])
def test_a_failure_is_kept_for_finish_and_nothing_more_is_written(background: bool, tmp_path: Path) -> None:
    writer = FileWriter(INNER, background=background)
    writer.save({}, tmp_path / "no such folder/a.pt")
    writer.save({}, tmp_path / "b.pt")
    writer.close()
    with pytest.raises(OSError, match="No such file or directory"):
        writer.finish()
    assert not (tmp_path / "b.pt").exists()


def test_what_is_in_host_memory_is_copied_only_if_it_may_change() -> None:
    values = state()
    assert on_host(values, {}, always_copy=False)["whole"] is values["whole"]
    copied = on_host(values, {}, always_copy=True)
    values["whole"].fill_(9.0)
    assert torch.equal(copied["part"], torch.tensor([2.0, 3.0]))
    assert isinstance(copied["weight"], nn.Parameter) and copied["weight"] is not values["weight"]
