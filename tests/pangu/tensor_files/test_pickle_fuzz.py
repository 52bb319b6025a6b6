"""Pickles that torch did not write: read or refused in one line, in bounded time and memory, and nothing in them is executed.

`PANGU_FUZZ_EXAMPLES=5000 pytest tests/pangu/tensor_files/test_pickle_fuzz.py` looks further, with new inputs on every run.
"""

from __future__ import annotations

import argparse
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
from helpers.bounded import bounded, read_all
from helpers.fuzzing import EDITS, NUMBERS, Edit, fuzz, tensors_of
from hypothesis import given
from hypothesis import strategies as st

from pangu.tensor_files import torch_file
from pangu.tensor_files.torch_pickle import _OPERATIONS, Machine, PickleError


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of this process alone."""
    return tmp_path_factory.mktemp("scratch") / "input.ckpt"


GLOBALS = ["collections OrderedDict", "torch FloatStorage", "torch._utils _rebuild_tensor_v2", "torch Size", "os system", "a b"]
GLOBALS += ["torch._utils _rebuild_parameter", "torch._tensor _rebuild_from_type_v2", "collections defaultdict", "torch HalfStorage"]


@st.composite
def opcodes(draw: st.DrawFn) -> bytes:
    """One instruction of a pickle, with an argument that may not be what it asks for."""
    code = draw(st.sampled_from([*_OPERATIONS] * 8 + [0x2E, 0x32, 0x49, 0x69, 0x82, 0x97]))
    size = draw(st.one_of(st.integers(0, 6), st.integers(0, 255)))
    short, long = bytes([size]), draw(st.one_of(st.integers(0, 6), NUMBERS)) % 2**64
    body = draw(st.one_of(st.sampled_from([b"storage", b"0", b"cpu", b"module"]), st.binary(max_size=8)))
    if code in b"c":
        return b"c" + draw(st.sampled_from(GLOBALS)).encode().replace(b" ", b"\n") + b"\n"
    if code in (0x8C, 0x8A) or code in b"UC":
        return bytes([code, len(body) if draw(st.integers(0, 9)) else size]) + body
    if code in b"XTBjrJ" or code == 0x8B:
        exact = code in b"XTB" and draw(st.integers(0, 9))
        return bytes([code]) + struct.pack("<I", len(body) if exact else long % 2**32) + (body if exact else b"")
    if code in (0x8D, 0x8E, 0x96, 0x95):
        exact = code != 0x95 and draw(st.integers(0, 9))
        return bytes([code]) + struct.pack("<Q", len(body) if exact else long) + (body if exact else b"")
    if code in b"G":
        return b"G" + draw(st.binary(min_size=8, max_size=8))
    if code in b"KhqM":
        return bytes([code]) + short + (b"\0" if code in b"M" else b"")
    return bytes([code, draw(st.integers(0, 6))] if code == 0x80 else [code])


STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\x04t"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"QK\0K\x04\x85K\x01\x85\x89}tR"
PROGRAMS = st.lists(st.one_of(opcodes(), st.sampled_from([STORAGE + b"Q", TENSOR, b"]", b"(", b"K\x01", b")", b"}"])), max_size=60)


@fuzz(2)
@given(PROGRAMS)
def test_pickles_of_any_instructions(scratch: Path, program: list[bytes]) -> None:
    data = b"\x80\x02" + b"".join(program) + b"."
    scratch.write_bytes(data)
    calls = torch_file._calls(scratch)
    read_all(scratch, lambda: Machine(data, persistent=lambda identity: identity, calls=calls).run() and [], refusals=PickleError)
    with zipfile.ZipFile(scratch, "w") as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/data/0", bytes(16))
    read_all(scratch, lambda: tensors_of(torch_file.load(scratch)))
    scratch.write_bytes(
        torch_file._LEGACY_MAGIC + b"\x80\x02M\xe9\x03.\x80\x02}X\r\0\0\0little_endian\x88s." + data + b"\x80\x02]X\x01\0\0\x000a."
    )
    read_all(scratch, lambda: tensors_of(torch_file.load(scratch)))


@fuzz()
@given(st.lists(NUMBERS, max_size=4), st.lists(NUMBERS, max_size=4), NUMBERS)
def test_tensors_over_a_storage(scratch: Path, shape: list[int], strides: list[int], offset: int) -> None:
    def number(value: int) -> bytes:
        raw = value.to_bytes(9, "little", signed=True)
        return b"\x8a\x09" + raw

    def numbers(values: list[int]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    call = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + STORAGE
        + b"Q"
        + number(offset)
        + numbers(shape)
        + numbers(strides[: len(shape)])
        + b"\x89}tR"
    )
    with zipfile.ZipFile(scratch, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + call + b".")
        archive.writestr("a/data/0", bytes(16))
    read_all(scratch, lambda: tensors_of(torch_file.load(scratch)))


@fuzz()
@given(EDITS)
def test_pickles_of_training_runs(scratch: Path, edits: list[Edit]) -> None:
    data = pickle.dumps({"args": argparse.Namespace(a=[1, 2.5, None], b={"c": (True, "d")}), "iteration": 5}, 2)
    for edit in edits:
        data = edit.apply(data)
    scratch.write_bytes(data)
    with bounded(len(data)):
        try:
            Machine(data, persistent=lambda identity: identity, calls=torch_file._calls(scratch)).run()
        except PickleError as error:
            assert str(error).isprintable()
