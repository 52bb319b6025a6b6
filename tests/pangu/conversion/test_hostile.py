"""Files that were made to do harm, and files that are merely odd: each is refused in one line, before it costs anything."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bounded import bounded, refusal
from helpers.mindspore_bytes import field, value
from helpers.whole_model import small_weights
from safetensors.torch import save_file

from pangu.conversion import formats, huggingface, npy
from pangu.conversion.convert import convert
from pangu.conversion.weights import Overrides, WriteOptions, complete
from pangu.errors import InputError
from pangu.tensor_files import mindspore_file, torch_file
from pangu.tensor_files.lazy_tensor import LazyTensor
from pangu.tensor_files.torch_pickle import Machine, PickleError
from pangu.training.checkpoint import MANIFEST

HEADS = Overrides(num_heads=2)


def small_model(**sizes: int) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in small_weights(**sizes).tensors.items()}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A good HuggingFace directory with an index, to be spoilt."""
    convert(small_weights(), "huggingface", tmp_path / "model", WriteOptions())
    return tmp_path / "model"


def write_safetensors(path: Path, entries: dict[str, tuple[list[int], bytes]]) -> None:
    """A file whose header says of the shapes what it likes."""
    header: dict[str, Any] = {}
    data = b""
    for name, (shape, content) in entries.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def describe(directory: Path, **changes: Any) -> None:
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | changes))


# --- lines -------------------------------------------------------------------------------------------------------------------------------


def test_a_refusal_is_one_line_whatever_it_quotes() -> None:
    assert str(InputError("a\nb\r\x1b[2J\u2028\ud800c")) == r"a\nb\r\x1b[2J\u2028\ud800c"
    assert str(InputError("盘古 模型.")) == "盘古 模型."
    long = str(InputError("begin " + "x" * 10**6 + " end."))
    assert len(long) < 4000 and long.startswith("begin x") and long.endswith("x end.")


def test_a_name_with_newlines_stays_in_its_line(directory: Path) -> None:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["a\nerror: all is well\n"] = "model-00001-of-00001.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert r"a\nerror: all is well\n" in refusal(directory, lambda: huggingface.read(directory, HEADS))


@pytest.mark.parametrize("name", ["a\0b.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors", "\n.safetensors"])
def test_an_index_with_a_name_that_no_file_has_is_refused(name: str, directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"transformer.wte.weight": name}}))
    assert ".safetensors" in refusal(directory, lambda: huggingface.read(directory, HEADS))


# --- what would cost memory or time ------------------------------------------------------------------------------------------------------


def test_a_name_of_a_layer_costs_no_layers(directory: Path) -> None:
    tensors = small_model() | {"transformer.h.9999.ln_1.weight": torch.ones(4)}
    (directory / "model.safetensors.index.json").unlink()
    save_file(tensors, directory / "model.safetensors")
    describe(directory, num_layers=10_000)
    assert "10000 layers" in refusal(directory, lambda: huggingface.read(directory, HEADS))


def test_thousands_of_tiny_layers_are_refused(tmp_path: Path) -> None:
    layer = {name: x for name, x in small_model(num_layers=1, hidden_size=2).items() if ".h.0." in name}
    tensors = {name: x for name, x in small_model(num_layers=1, hidden_size=2).items() if ".h.0." not in name}
    for index in range(2000):
        tensors |= {name.replace(".h.0.", f".h.{index}."): x for name, x in layer.items()}
    lazy = {name: LazyTensor(tuple(x.shape), x.dtype, lambda x=x: x) for name, x in tensors.items()}
    with bounded(0, 2**22), pytest.raises(InputError, match="2000 layers"):
        complete(tmp_path, lazy, HEADS, source="")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer.h.0.mlp.c_fc.weight", [2**62, 0]),
        ("transformer.h.0.mlp.c_fc.weight", [2**63, 0]),
        ("transformer.wpe.weight", [2**62, 0]),
        ("transformer.wte.weight", [0, 2**63 + 5]),
        ("transformer.h.1.attn.q_proj.weight", [0, 2**62]),
    ],
)
def test_an_empty_tensor_makes_no_model(name: str, shape: list[int], directory: Path) -> None:
    entries = {key: (list(x.shape), x.numpy().tobytes()) for key, x in small_model().items()} | {name: (shape, b"")}
    (directory / "model.safetensors.index.json").unlink()
    write_safetensors(directory / "model.safetensors", entries)
    describe(directory, num_layers=None, intermediate_size=None, vocab_size=None, max_position_embeddings=None, hidden_size=None)
    assert name in refusal(directory, lambda: huggingface.read(directory, HEADS))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_json_of_a_million_lists_is_not_parsed(name: str, directory: Path) -> None:
    (directory / name).write_text("[" + "[]," * 8_000_000 + "[]]")  # 24 MB of it would be 500 MB of lists
    assert name in refusal(directory, lambda: huggingface.read(directory, HEADS))


def test_a_manifest_of_a_million_lists_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("[" + "[]," * 8_000_000 + "[]]")
    assert MANIFEST in refusal(tmp_path, lambda: formats.open_weights(tmp_path, HEADS))


@pytest.mark.parametrize("depth", [900, 990, 100_000])
def test_deep_json_is_refused(depth: int, directory: Path) -> None:
    values = json.loads((directory / "config.json").read_text())
    text = json.dumps(values | {"hidden_size": 77777}).replace("77777", "[" * depth + "]" * depth)
    (directory / "config.json").write_text(text)
    assert "config.json" in refusal(directory, lambda: huggingface.read(directory, HEADS))


def test_a_class_with_a_name_of_a_megabyte_is_not_written_out_again_and_again() -> None:
    name = b"X" + struct.pack("<I", 2**20) + b"m" * 2**20 + b"q\0"
    data = b"\x80\x04" + name + b"h\0h\0\x93" * 500 + b"."  # 2,500 more bytes would be 500 MB of names
    with bounded(len(data), 2**22), pytest.raises(PickleError, match="not a name"):
        Machine(data, persistent=lambda identity: identity, calls={}).run()


@pytest.mark.parametrize("shape", ["(" + "9" * 4000 + ", " + "9" * 4000 + ")", "(9" + ",9" * 4500 + ")"])
def test_an_array_of_more_elements_than_can_be_printed_is_refused(shape: str, tmp_path: Path) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header + bytes(64))
    assert "a.npy" in refusal(tmp_path, lambda: [npy.open_array(tmp_path / "a.npy")])


@pytest.mark.parametrize("shape", ["(True,)", "(1, True)"])
def test_a_shape_of_booleans_is_refused(shape: str, tmp_path: Path) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header + bytes(4))
    assert "a.npy" in refusal(tmp_path, lambda: [npy.open_array(tmp_path / "a.npy")])


@pytest.mark.parametrize("extra", [struct.pack("<HH", 1, 20) + bytes(13), struct.pack("<HH", 1, 9) + bytes(3)])
def test_a_zip_entry_whose_extra_field_is_cut_is_refused(extra: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("a/data.pkl")
        info.extra = struct.pack("<HH", 0x4242, len(extra) - 4) + bytes(len(extra) - 4)
        archive.writestr(info, b"\x80\x02N.")
    data = path.read_bytes()
    assert torch_file.load(path) is None
    at = data.rfind(b"a/data.pkl") + len("a/data.pkl")
    path.write_bytes(data[:at] + extra + data[at + len(extra) :])
    with bounded(len(data)):
        try:
            torch_file.load(path)  # nothing of the field is needed here: to read the file is as good as to refuse it
        except InputError as error:
            assert str(error).isprintable()


@pytest.mark.parametrize("shape", [(0, 2**61, 2**61), (0, 2**63), (2**300, 0)])
def test_an_empty_tensor_of_an_impossible_shape_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    def number(number: int) -> bytes:
        return b"\x8a\x28" + number.to_bytes(40, "little", signed=True)

    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\x04tQ"
    numbers = b"(" + b"".join(map(number, shape)) + b"t"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + numbers + numbers + b"\x89}tR"
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + call + b".")
        archive.writestr("a/data/0", bytes(16))
    assert "a.pt" in refusal(tmp_path, lambda: [torch_file.load(tmp_path / "a.pt")])


@pytest.mark.parametrize(
    ("key", "told"),
    [("hidden_size", 2**62), ("vocab_size", 2**62), ("max_positions", 2**62), ("ffn_hidden_size", 2**62), ("attention", "npu_fusion")],
)
def test_a_manifest_of_an_impossible_model_is_refused(key: str, told: Any, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"num_layers": 2, "hidden_size": 4, "num_heads": 2, "vocab_size": 12, "max_positions": 3}
    identity = {f"model.{name}": size for name, size in (sizes | {key: told}).items()}
    identity |= {"parallel.tensor": 1, "parallel.pipeline": 1, "data-parallel size": 1, "parallel.zero_stage": 1, "train.precision": "fp32"}
    torch.save({"module": {"a": torch.ones(1), "b": torch.ones(1)}}, tmp_path / "mp_rank_00_model_states.pt")
    files = {"mp_rank_00_model_states.pt": {"bytes": (tmp_path / "mp_rank_00_model_states.pt").stat().st_size, "sha256": "0" * 64}}
    (tmp_path / MANIFEST).write_text(json.dumps({"identity": identity, "files": files, "progress": {}}))
    refusal(tmp_path, lambda: formats.open_weights(tmp_path, HEADS))
    identity["parallel.pipeline"] = 2
    files |= {f"layer_{index:02d}-model_00-model_states.pt": {"bytes": 5, "sha256": "0" * 64} for index in range(9)}
    (tmp_path / MANIFEST).write_text(json.dumps({"identity": identity, "files": files, "progress": {}}))
    refusal(tmp_path, lambda: formats.open_weights(tmp_path, HEADS))


# --- what is no file ---------------------------------------------------------------------------------------------------------------------

READERS: dict[str, Callable[[Path], Any]] = {
    "mindspore": lambda path: mindspore_file.scan(path) and [],
    "torch": lambda path: torch_file.load(path) and [],
    "npy": lambda path: [npy.open_array(path)],
}


@pytest.mark.parametrize("what", ["fifo", "/dev/zero", "directory", "loop"])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_not_opened(reader: str, what: str, tmp_path: Path) -> None:
    make_odd(tmp_path / "odd", what)
    assert "odd" in refusal(tmp_path, lambda: READERS[reader](tmp_path / "odd"))


@pytest.mark.parametrize("what", ["fifo", "/dev/zero", "directory", "loop"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"])
def test_a_directory_with_what_is_no_file_is_refused(name: str, what: str, directory: Path) -> None:
    (directory / name).unlink()
    make_odd(directory / name, what)
    assert name.partition("-")[0].partition(".")[0] in refusal(directory, lambda: formats.open_weights(directory, HEADS))


def make_odd(path: Path, what: str) -> None:
    if what == "fifo":
        os.mkfifo(path)  # opening it would wait for ever
    elif what == "directory":
        path.mkdir()
    else:
        path.symlink_to(path if what == "loop" else what)


def test_a_path_that_no_file_system_has_is_refused() -> None:
    with pytest.raises(InputError):
        formats.open_weights(Path("x" * 5000))


def test_what_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", forbidden)
    for name in formats.FORMATS:
        with pytest.raises(InputError):
            formats.open_weights(tmp_path, format_name=name)
    with pytest.raises(InputError, match="Permission denied"):
        formats.open_weights(tmp_path)


def test_scalars_and_packed_nonsense_in_protobuf(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(field(1, field(1, b"a") + field(2, field(1, b"\xff" * 9 + b"\x01") + field(2, b"Float32") + field(3, bytes(4)))))
    assert "dimensions" in refusal(path, lambda: mindspore_file.scan(path) and [])
    path.write_bytes(value("a", bytes(4), [1] * 17, "Float32"))
    assert "dimensions" in refusal(path, lambda: mindspore_file.scan(path) and [])
