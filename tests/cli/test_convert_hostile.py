"""`tools/convert_checkpoint.py` with inputs made to do harm: exit code 2, one line, nothing executed, nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bounded import bounded, size_of
from helpers.mindspore_bytes import field, value, varint
from helpers.whole_model import small_weights

from pangu.conversion.convert import convert
from pangu.conversion.weights import WriteOptions
from pangu.tensor_files import mindspore_file
from tools.convert_checkpoint import main

CLAIM = 2**32
NAME = "backbone.word_embedding.embedding_table"


def refused(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the tool refuses a file."""
    output = path.parent / "new/output"
    before = sorted(path.parent.rglob("*"))
    monkeypatch.setattr(
        sys, "argv", ["convert_checkpoint.py", "--to", "npy", "--input", str(path), "--output", str(output), "--heads", "4"]
    )
    with bounded(size_of(path), 8 * 2**20), pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out + err
    assert sorted(path.parent.rglob("*")) == before
    return err


class Shell:
    """What a pickle of this does to whoever loads it with Python's own machine."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def archive(path: Path, data: bytes, **storages: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", data)
        for key, content in storages.items():
            file.writestr(f"a/data/{key}", content)
    return path


def truncated(folder: Path) -> Path:
    (folder / "a.ckpt").write_bytes(value(NAME, bytes(4000), [40, 25], "Float32")[:-1])
    return folder / "a.ckpt"


def flipped_length(folder: Path) -> Path:
    data = bytearray(value(NAME, bytes(4000), [40, 25], "Float32"))
    data[2] ^= 0x40
    (folder / "a.ckpt").write_bytes(data)
    return folder / "a.ckpt"


def duplicate_tags(folder: Path) -> Path:
    one, other = (value(tag, bytes(16), [4], "Float32") for tag in ("a", "b"))
    (folder / "a.ckpt").write_bytes(one + other + one)
    return folder / "a.ckpt"


def encrypted(folder: Path) -> Path:
    (folder / "a.ckpt").write_bytes(mindspore_file.ENCRYPTED[0] + bytes(range(200)))
    return folder / "a.ckpt"


def protobuf_claim(folder: Path) -> Path:
    inner = field(1, NAME.encode()) + varint(2 << 3 | 2) + varint(CLAIM)
    (folder / "a.ckpt").write_bytes(varint(1 << 3 | 2) + varint(CLAIM) + inner + bytes(1000))
    return folder / "a.ckpt"


def protobuf_shape_claim(folder: Path) -> Path:
    (folder / "a.ckpt").write_bytes(value(NAME, bytes(1000), [2**15, 2**15], "Float32"))
    return folder / "a.ckpt"


def zip_claim(folder: Path) -> Path:
    path = archive(folder / "a.pt", b"\x80\x02N.", **{"0": bytes(900)})
    data = bytearray(path.read_bytes())
    struct.pack_into("<II", data, data.rfind(b"PK\x01\x02") + 20, CLAIM - 2, CLAIM - 2)
    path.write_bytes(data)
    return path


def pickle_claim(folder: Path) -> Path:
    return archive(folder / "a.pt", b"\x80\x04\x8e" + struct.pack("<Q", CLAIM) + bytes(1000))


def legacy_claim(folder: Path) -> Path:
    torch.save({"model": torch.ones(100)}, folder / "a.pt", _use_new_zipfile_serialization=False)
    data = bytearray((folder / "a.pt").read_bytes())
    struct.pack_into("<q", data, len(data) - 408, CLAIM)
    (folder / "a.pt").write_bytes(data)
    return folder / "a.pt"


def shell(folder: Path) -> Path:
    return archive(folder / "a.pt", pickle.dumps({"model": {"language_model": Shell(folder / "pwned")}}, 2))


def legacy_shell(folder: Path) -> Path:
    torch.save({"model": {"language_model": Shell(folder / "pwned")}}, folder / "a.pt", _use_new_zipfile_serialization=False)
    return folder / "a.pt"


def model(folder: Path, content: bytes, name: str = "model.safetensors") -> Path:
    (folder / "model").mkdir()
    config = {"model_type": "gpt_pangu", "activation_function": "gelu_new"}
    (folder / "model/config.json").write_text(json.dumps(config))
    (folder / "model" / name).write_bytes(content)
    return folder / "model"


def safetensors_header_claim(folder: Path) -> Path:
    return model(folder, struct.pack("<Q", CLAIM) + b'{"a":' + bytes(1000))


def safetensors_tensor_claim(folder: Path) -> Path:
    header = json.dumps({"transformer.wte.weight": {"dtype": "F32", "shape": [2**15, 2**15], "data_offsets": [0, CLAIM]}}).encode()
    return model(folder, struct.pack("<Q", len(header)) + header + bytes(1000))


def bin_shell(folder: Path) -> Path:
    archive(folder / "payload", pickle.dumps(Shell(folder / "pwned"), 2))
    content = (folder / "payload").read_bytes()
    (folder / "payload").unlink()
    return model(folder, content, "pytorch_model.bin")


def arrays(folder: Path) -> None:
    convert(small_weights(), "npy", folder / "arrays", WriteOptions())


def npy_claim(folder: Path) -> Path:
    arrays(folder)
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**15}, {2**15})}}\n".encode()
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(1000)
    (folder / f"arrays/{NAME}.npy").write_bytes(data)
    return folder / "arrays"


def npy_of_objects(folder: Path) -> Path:
    arrays(folder)
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': ()}\n"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + pickle.dumps(Shell(folder / "pwned"))
    (folder / f"arrays/{NAME}.npy").write_bytes(data)
    return folder / "arrays"


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated": (truncated, "past byte"),
    "a flipped byte in a length": (flipped_length, "byte"),
    "duplicate tags": (duplicate_tags, "a second time"),
    "encrypted": (encrypted, "is encrypted"),
    "4 GB in protobuf": (protobuf_claim, "past byte"),
    "4 GB by a shape in protobuf": (protobuf_shape_claim, "needs 4,294,967,296"),
    "4 GB zip member": (zip_claim, "overlap or are cut off"),
    "4 GB BINBYTES8": (pickle_claim, "4,294,967,296 bytes expected"),
    "4 G elements in a legacy file": (legacy_claim, "4,294,967,296 elements"),
    "4 GB safetensors header": (safetensors_header_claim, "safetensors"),
    "4 GB safetensors tensor": (safetensors_tensor_claim, "safetensors"),
    "4 GB by a shape in npy": (npy_claim, "needs 4,294,967,296"),
    "a pickle that runs a shell": (shell, "no model"),
    "the same in a legacy file": (legacy_shell, "no model"),
    "the same in pytorch_model.bin": (bin_shell, "not a flat table"),
    "the same in npy": (npy_of_objects, "type object"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_inputs(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    make, told = HOSTILE[what]
    assert told in refused(make(tmp_path), monkeypatch, capsys)
    assert not (tmp_path / "pwned").exists()


def test_the_payload_works_where_it_is_let(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Shell(tmp_path / "pwned")))
    assert (tmp_path / "pwned").exists()


def test_names_that_are_left_out_do_not_reach_the_terminal_raw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = small_weights(hidden_size=8)
    convert(weights, "megatron", tmp_path / "in", WriteOptions())
    file = tmp_path / "in/release/mp_rank_00/model_optim_rng.pt"
    torch.save(torch.load(file, weights_only=True) | {"x\n\x1b[2J\ud800": 1}, file)
    monkeypatch.setattr(
        sys, "argv", ["convert_checkpoint.py", "--to", "npy", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    )
    main()
    out = capsys.readouterr().out
    assert r"x\n\x1b[2J\ud800" in out and "\x1b" not in out


@pytest.mark.parametrize("where", ["file/out", "n" * 300, "file/a/b", "..", "/"])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_outputs_that_cannot_be_are_refused(
    where: str, force: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(small_weights(hidden_size=8), "npy", tmp_path / "in", WriteOptions())
    (tmp_path / "file").write_text("no directory")
    before = sorted(tmp_path.rglob("*"))
    words = ["--to", "npy", "--input", str(tmp_path / "in"), "--output", str(tmp_path / where), "--heads", "2", *force]
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
