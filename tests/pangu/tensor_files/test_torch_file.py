"""Files of torch.save: both forms are read as torch reads them, tensors lazily; what is damaged or hostile is refused in a line."""

from __future__ import annotations

import argparse
import os
import pickle
import random
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pangu.errors import InputError
from pangu.tensor_files import torch_file
from pangu.tensor_files.torch_file import Planned, StoredTensor, TorchFileWriter, is_torch_file, load
from pangu.tensor_files.torch_pickle import Opaque

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def tensors_of(value: Any) -> dict[str, StoredTensor]:
    """Every tensor by its path, without recursion."""
    found, pending, seen = {}, [("", value)], set()
    for name, item in pending:
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, StoredTensor):
            found[name] = item
        elif isinstance(item, dict):
            pending += [(f"{name}/{key}" if type(key) in (str, int) else name, inner) for key, inner in item.items()]
        elif isinstance(item, (list, tuple)):
            pending += [(f"{name}/{number}", inner) for number, inner in enumerate(item)]
    return found


def some_tensors() -> dict[str, Tensor]:
    torch.manual_seed(1)
    whole = torch.randn(10, 12)
    return {
        **{str(dtype): (torch.randn(3, 5) * 9).to(dtype) for dtype in DTYPES},
        "whole": whole,
        "rows": whole[3:7],
        "columns": whole[:, 2:5],
        "transposed": whole.T,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "odd": torch.randn(7).half()[1:],
    }


def save(path: Path, value: Any, form: str) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.fixture(params=["zip", "legacy"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_tensor_is_read_as_torch_reads_it(form: str, tmp_path: Path) -> None:
    tensors = some_tensors()
    path = save(tmp_path / "file.pt", {"model": OrderedDict(tensors), "list": [torch.ones(2)]}, form)
    found = tensors_of(load(path))
    assert found.keys() == {*(f"/model/{name}" for name in tensors), "/list/0"}
    for name, expected in tensors.items():
        stored = found[f"/model/{name}"]
        assert (stored.shape, stored.dtype) == (tuple(expected.shape), expected.dtype)
        assert torch.equal(stored.read(), expected), name


def test_parameters_and_tensors_with_attributes_are_tensors(form: str, tmp_path: Path) -> None:
    marked = torch.randn(4)
    marked.mark = argparse.Namespace(a=1)  # type: ignore[attr-defined]
    module = torch.nn.Linear(3, 2)
    path = save(tmp_path / "file.pt", {"parameter": torch.nn.Parameter(marked.clone()), "marked": marked, **module.state_dict()}, form)
    found = {name: stored.read() for name, stored in tensors_of(load(path)).items()}
    assert torch.equal(found["/parameter"], marked) and torch.equal(found["/marked"], marked)
    assert torch.equal(found["/weight"], module.weight)


def test_everything_else_is_inert(form: str, tmp_path: Path) -> None:
    """Whole objects of other classes, whose source the legacy form even carries along."""
    path = save(
        tmp_path / "file.pt", {"args": argparse.Namespace(layers=3, device=torch.device("cpu")), "module": torch.nn.Linear(2, 2)}, form
    )
    root = load(path)
    assert isinstance(root["args"], Opaque) and root["args"].state["layers"] == 3
    assert isinstance(root["args"].state["device"], Opaque) and isinstance(root["module"], Opaque)


class Hostile:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def test_nothing_in_a_file_runs(form: str, tmp_path: Path) -> None:
    path = save(tmp_path / "file.pt", {"model": Hostile(tmp_path / "ran"), "weight": torch.ones(2)}, form)
    root = load(path)
    assert torch.equal(root["weight"].read(), torch.ones(2)) and not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # so the test can fail


def test_a_tensor_is_read_when_it_is_asked_for(form: str, tmp_path: Path) -> None:
    path = save(tmp_path / "file.pt", {"large": torch.full((4_000_000,), 3.0), "small": torch.ones(3)}, form)
    limit = 2_000_000 if form == "zip" else torch_file.MAX_BYTES + 2_000_000
    tracemalloc.start()
    root = load(path)
    assert torch.equal(root["small"].read(), torch.ones(3))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < limit
    view = root["large"].read()
    assert view[3_999_999] == 3.0
    view[0] = 4.0
    assert root["large"].read()[0] == 3.0  # a view of one's own
    os.truncate(path, 100_000)
    with pytest.raises(InputError, match=r"file\.pt: cannot be read any more"):
        root["large"].read()


def test_a_legacy_file_may_be_larger_than_its_pickles_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.randn(3000), "b": torch.randn(5)}
    path = save(tmp_path / "file.pt", tensors, "legacy")
    monkeypatch.setattr(torch_file, "MAX_BYTES", 1000)
    root = load(path)
    assert all(torch.equal(root[name].read(), tensor) for name, tensor in tensors.items())


def test_is_torch_file(form: str, tmp_path: Path) -> None:
    assert is_torch_file(save(tmp_path / "a.pt", {}, form))
    (tmp_path / "b.pt").write_bytes(b"pangu")
    assert not is_torch_file(tmp_path / "b.pt") and not is_torch_file(tmp_path / "c.pt") and not is_torch_file(tmp_path)


# --- writing -----------------------------------------------------------------------------------------------------------------------------


def test_what_is_written_torch_reads_without_trust(tmp_path: Path) -> None:
    tensors = some_tensors()
    tree = {"iteration": 7, "model": {name: Planned(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}, "name": "盘古"}
    path = tmp_path / "written.pt"
    with TorchFileWriter(path, tree) as writer:
        for tensor in tensors.values():
            writer.write(tensor)
    for mapped in (False, True):
        root = torch.load(path, weights_only=True, mmap=mapped)
        assert (root["iteration"], root["name"]) == (7, "盘古")
        for name, expected in tensors.items():
            assert root["model"][name].dtype == expected.dtype and torch.equal(root["model"][name], expected), name
    ours = load(path)["model"]
    assert all(torch.equal(ours[name].read(), expected) for name, expected in tensors.items())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # checksums are right, for those who look at them
        assert {info.filename.split("/")[0] for info in archive.infolist()} == {"written"}
    assert all(stored.storage.begin % 64 == 0 for stored in ours.values())


def test_the_writer_converts_and_writes_large_members_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 64-bit form of members over 2 GiB, forced on small ones."""
    monkeypatch.setattr(torch_file, "WIDE", 100)
    values = torch.randn(50, 3)
    with TorchFileWriter(tmp_path / "file.pt", {"a": Planned((50, 3), torch.bfloat16), "b": Planned((2,), torch.float32)}) as writer:
        writer.write(values)
        writer.write(torch.ones(2))
    root, ours = torch.load(tmp_path / "file.pt", weights_only=True), load(tmp_path / "file.pt")
    assert torch.equal(root["a"], values.bfloat16()) and torch.equal(ours["a"].read(), values.bfloat16())
    assert torch.equal(ours["b"].read(), torch.ones(2)) and ours["a"].storage.begin % 64 == ours["b"].storage.begin % 64 == 0


def test_a_file_that_was_not_finished_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), TorchFileWriter(tmp_path / "file.pt", {"a": Planned((9, 9), torch.float32)}) as writer:
        writer.write(torch.ones(9, 9))
        raise OSError("disk full")
    assert "not written by torch.save" in refusal(tmp_path / "file.pt")


# --- what is refused ---------------------------------------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        for stored in tensors_of(load(path)).values():
            stored.read()
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def archive_of(path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


@pytest.fixture
def members(tmp_path: Path) -> dict[str, bytes]:
    """The members of a good file."""
    found = members_of(save(tmp_path / "good.pt", {"a": torch.arange(100.0), "b": torch.ones(3)}, "zip"))
    found.pop("good/.data/serialization_id", None)
    return found


def test_the_unspoilt_members_are_read(members: dict[str, bytes], tmp_path: Path) -> None:
    root = load(archive_of(tmp_path / "file.pt", list(members.items())))
    assert torch.equal(root["a"].read(), torch.arange(100.0))


def test_spoilt_archives_are_refused(members: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    spoilt = {
        "storage '0' is missing": [(name, data) for name, data in members.items() if not name.endswith("data/0")],
        "has 399 bytes, 100 elements": [(name, data[:-1] if name.endswith("data/0") else data) for name, data in members.items()],
        "has 401 bytes": [(name, data + b"x" if name.endswith("data/0") else data) for name, data in members.items()],
        "without data.pkl": [(name, data) for name, data in members.items() if not name.endswith("data.pkl")],
        "big-endian": [(name, b"big" if name.endswith("byteorder") else data) for name, data in members.items()],
        "is there twice": [*members.items(), ("other/data.pkl", b"")],
        "data/0' is missing": [(name.replace("data/0", "data/../../0"), data) for name, data in members.items()],
    }
    for told, entries in spoilt.items():
        message = refusal(archive_of(path, entries))
        assert told.replace("data/0'", "'0'") in message or "storage '0' is missing" in message, message
        path.unlink()
    assert "compressed or encrypted" in refusal(archive_of(path, list(members.items()), zipfile.ZIP_DEFLATED))


def test_an_archive_whose_directory_is_empty_is_refused(members: dict[str, bytes], tmp_path: Path) -> None:
    """Its bytes begin as an archive's; the end says that it has no entries."""
    path = archive_of(tmp_path / "full.pt", list(members.items()))
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\x05\x06")
    data[end + 8 : end + 16] = bytes(8)
    path.write_bytes(data)
    assert "without data.pkl" in refusal(path)


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = archive_of(tmp_path / "file.pt", [("a/data.pkl", b"\x80\x02" + b"N0" * 10_000_000 + b"N.")], zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 50_000
    tracemalloc.start()
    assert "compressed" in refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_members_that_overlap_are_refused(members: dict[str, bytes], tmp_path: Path) -> None:
    """Many members that share their bytes make much out of little."""
    path = archive_of(tmp_path / "file.pt", list(members.items()))
    data = bytearray(path.read_bytes())
    first = data.find(b"PK\x01\x02")
    second = data.find(b"PK\x01\x02", first + 4)
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    path.write_bytes(data)
    assert "overlap" in refusal(path)


def test_lies_in_the_directory_are_refused(members: dict[str, bytes], tmp_path: Path) -> None:
    path = archive_of(tmp_path / "file.pt", list(members.items()))
    good = path.read_bytes()
    entry, end = good.find(b"PK\x01\x02"), good.rfind(b"PK\x05\x06")
    for offset, form, value in [
        (end + 10, "<H", 0xFFFE),  # entries
        (end + 10, "<H", 0xFFFF),  # "see the 64-bit directory"
        (end + 12, "<I", 0xFFFFFFF0),  # bytes of the directory
        (end + 16, "<I", 0xFFFFFFF0),  # its place
        (entry + 42, "<I", 0xFFFFFFF0),  # a member's place
        (entry + 42, "<I", 7),
        (entry + 20, "<II", 0xFFFFFFF0),  # a member's size
        (entry + 8, "<H", 1),  # encrypted
    ]:
        data = bytearray(good)
        values = (value,) * (2 if form == "<II" else 1)
        struct.pack_into(form, data, offset, *values)
        path.write_bytes(data)
        refusal(path)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((0, (101,), (1,)), "larger than its storage"),
        ((1, (100,), (1,)), "larger than its storage"),
        ((0, (2,), (100,)), "larger than its storage"),
        ((0, (1 << 40,), (0,)), "larger than its storage"),  # a petabyte of one element
        ((0, (-1,), (1,)), "not a list of counts"),
        ((-1, (1,), (1,)), "not a list of counts"),
        ((0, (True,), (1,)), "not a list of counts"),
        ((0, ("1",), (1,)), "not a list of counts"),
        ((0, (1, 1), (1,)), "without a shape"),
        ((0, [1], (1,)), "without a shape"),
        ((0, (1,) * 17, (1,) * 17), "without a shape"),
        ((0, (1 << 300,), (1,)), "larger than its storage"),
        ((), "without a storage"),
    ],
)
def test_tensors_that_cannot_be_are_refused(arguments: tuple[Any, ...], told: str, tmp_path: Path) -> None:
    class Key:
        """Stands for a storage of 100 elements."""

    class Tensorlike:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Key(), *arguments) if arguments else ()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 100) if isinstance(value, Key) else None

    with open(tmp_path / "data.pkl", "wb") as file:
        Pickler(file, 2).dump({"a": Tensorlike()})
    path = archive_of(tmp_path / "file.pt", [("a/data.pkl", (tmp_path / "data.pkl").read_bytes()), ("a/data/0", bytes(400))])
    assert told in refusal(path)


@pytest.mark.parametrize(
    "identity",
    [
        ("storage", torch.FloatStorage, "0", "cpu", 1 << 62),
        ("storage", torch.FloatStorage, "0", "cpu", 1 << 700),
        ("storage", torch.FloatStorage, "0", "cpu", -100),
        ("storage", torch.FloatStorage, "0", "cpu", 99),
        ("storage", torch.FloatStorage, "\n" * 500, "cpu", 99),
        ("storage", torch.FloatStorage, 0, "cpu", 100),
        ("storage", argparse.Namespace, "0", "cpu", 100),
        ("storage", "FloatStorage", "0", "cpu", 100),
        ("storage",),
        ("module", 1, 2, 3, 4),
        (),
        "storage",
    ],
)
def test_storages_that_cannot_be_are_refused(identity: Any, tmp_path: Path) -> None:
    class Key:
        """Stands for a storage."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return identity if isinstance(value, Key) else None

    with open(tmp_path / "data.pkl", "wb") as file:
        Pickler(file, 2).dump({"a": Key()})
    path = archive_of(tmp_path / "file.pt", [("a/data.pkl", (tmp_path / "data.pkl").read_bytes()), ("a/data/0", bytes(400))])
    assert len(refusal(path)) < 400


def test_other_files_are_refused(tmp_path: Path) -> None:
    for data in (b"", b"\n", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), torch_file._LEGACY_MAGIC, b"\x89HDF\r\n\x1a\n" + bytes(100)):
        (tmp_path / "file.pt").write_bytes(data)
        refusal(tmp_path / "file.pt")
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path / "nowhere.pt")
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path)


def test_a_file_cut_anywhere_is_refused(form: str, tmp_path: Path) -> None:
    path = save(tmp_path / "file.pt", {"a": torch.randn(300), "args": argparse.Namespace(b=2)}, form)
    size = path.stat().st_size
    for length in range(size - 1, 0, -max(1, size // 41)):
        os.truncate(path, length)
        refusal(path)


def test_mutated_files_are_read_or_refused_within_twice_their_size(form: str, tmp_path: Path) -> None:
    path = save(tmp_path / "file.pt", {"model": some_tensors(), "args": argparse.Namespace(rng=list(range(50)))}, form)
    original = path.read_bytes()
    hot = [n for n in range(len(original)) if original[n]]  # mutations of empty space show nothing
    source = random.Random(11)
    refused = 0
    tracemalloc.start()
    for _ in range(250):
        data = bytearray(original)
        for _ in range(source.randint(1, 3)):
            data[source.choice(hot)] = source.choice([0, 1, 0x7F, 0xFF, source.randrange(256)])
        path.write_bytes(data)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            for stored in tensors_of(load(path)).values():
                stored.read()
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
        assert tracemalloc.get_traced_memory()[1] - before < 2 * len(original) + 2**20
    tracemalloc.stop()
    assert refused > 50
