from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.golden import golden_weights
from helpers.tiny_tokenizer import tiny_model

from pangu.conversion import mindspore, npy
from pangu.conversion.weights import Overrides, WriteOptions
from pangu.errors import InputError

HEADS = Overrides(num_heads=4)
GAMMA, MAPPING = "backbone.layernorm.gamma.npy", "backbone.blocks.0.output.mapping.weight.npy"


@pytest.fixture
def directory(shared: Path, tmp_path: Path) -> Path:
    """The golden weights as numpy itself writes them."""
    path = tmp_path / "arrays"
    path.mkdir()
    for name, array in golden_weights(shared).items():
        np.save(path / f"{name}.npy", array)
    return path


def refused(path: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        npy.read(path, HEADS)
    assert "\n" not in str(caught.value)


def test_read_as_the_checkpoint(shared: Path, directory: Path) -> None:
    expected = mindspore.read(shared / "oracle/A/pangu_tiny.ckpt", HEADS)
    weights = npy.read(directory, HEADS)
    assert weights.config == expected.config
    for name, tensor in expected.tensors.items():
        assert torch.equal(weights.tensors[name].read(), tensor.read()), name


def test_written_as_numpy_writes(shared: Path, directory: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    npy.write(mindspore.read(shared / "oracle/A/pangu_tiny.ckpt", HEADS), output, WriteOptions())
    assert sorted(file.name for file in output.iterdir()) == sorted(file.name for file in directory.iterdir())
    for file in output.iterdir():
        assert file.read_bytes() == (directory / file.name).read_bytes(), file.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_round_trip(shared: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    source = mindspore.read(shared / "oracle/A/pangu_tiny_fp16.ckpt", HEADS)
    npy.write(source, tmp_path / "out", WriteOptions(dtype=dtype))
    again = npy.read(tmp_path / "out", HEADS)
    for name, tensor in source.tensors.items():
        assert torch.equal(again.tensors[name].read(), tensor.read().to(dtype)), name


def test_bfloat16_has_no_word(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--dtype fp32"):
        npy.write(mindspore.read(shared / "oracle/A/pangu_tiny.ckpt", HEADS), tmp_path / "out", WriteOptions(dtype=torch.bfloat16))


def test_the_tokenizer_goes_along(directory: Path, tmp_path: Path) -> None:
    (directory / "vocab.model").write_bytes(tiny_model())
    npy.write(npy.read(directory, HEADS), tmp_path / "out", WriteOptions())
    assert (tmp_path / "out/vocab.model").read_bytes() == tiny_model()


def test_fortran_order_and_optimizer_states(shared: Path, directory: Path) -> None:
    array = golden_weights(shared)[MAPPING.removesuffix(".npy")]
    np.save(directory / MAPPING, np.asfortranarray(array))
    np.save(directory / f"adam_m.{MAPPING}", array)
    weights = npy.read(directory, HEADS)
    assert np.array_equal(weights.tensors["transformer.h.0.mlp.c_fc.weight"].read().numpy(), array.T)
    assert weights.left_out == (f"adam_m.{MAPPING.removesuffix('.npy')}",)


def test_detection(directory: Path, tmp_path: Path) -> None:
    assert npy.detect(directory)
    assert not npy.detect(tmp_path)
    assert not npy.detect(directory / GAMMA)


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def claims(shape: str, order: str = "False") -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': {order}, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.encode().ljust(117) + b"\n" + bytes(256)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is not a .npy file"),
        (b"PK\x03\x04", "is not a .npy file"),
        (b"\x93NUMPY\x01\x00" + b"\xff\xff" + b"(" * 70000, "is not a .npy file"),
        (b"\x93NUMPY\x02\x00" + b"\xff\xff\xff\xff" + b" " * 1000, "is not a .npy file"),
        (b"\x93NUMPY\x07\x00" + bytes(100), "is not a .npy file"),
        (claims("(64,)")[:-1], "holds 255 bytes of data"),
        (claims("(64,)") + b"\0", "holds 257 bytes of data"),
        (claims(f"({2**40}, {2**40})"), "needs"),
        (claims("(-8, -8)"), "needs 256"),
        (claims("(4, 4, 4)", "True"), "no weight has"),
        (claims("(64, 1)"), "ln_f.weight has shape"),
        (claims("(0,)")[:-256], "no weight has"),
        (pickled(), "of type object"),
    ],
)
def test_a_damaged_file(directory: Path, content: bytes, match: str) -> None:
    (directory / GAMMA).write_bytes(content)
    refused(directory, match)


@pytest.mark.parametrize("dtype", ["i4", ">f4", "c8", "U3", [("a", "f4")]])
def test_another_type(directory: Path, dtype: str) -> None:
    np.save(directory / GAMMA, np.zeros(64, dtype))
    refused(directory, "expected little-endian")


def test_a_missing_file(directory: Path) -> None:
    (directory / GAMMA).unlink()
    refused(directory, "lacks transformer.ln_f.weight")
    (directory / MAPPING).unlink()
    refused(directory, "lacks backbone.blocks.0.output.mapping.weight")
    refused(directory / GAMMA, "not a directory")
