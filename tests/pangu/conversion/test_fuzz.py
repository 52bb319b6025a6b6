"""Every reader of foreign files against bytes that no writer wrote: it reads or refuses in one line, in bounded time and memory.

`PANGU_FUZZ_EXAMPLES=5000 pytest tests/pangu/conversion/test_fuzz.py` looks further, with new inputs on every run.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.bounded import TooSlow, bounded, read_all
from helpers.mindspore_bytes import field, strategy, varint
from helpers.whole_model import small_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ext.context import ParallelContext
from pangu.config import ModelConfig
from pangu.conversion import formats, mindspore_shards
from pangu.conversion.convert import convert
from pangu.conversion.weights import Overrides, WriteOptions
from pangu.model.model import PanguModel
from pangu.tensor_files import mindspore_file, torch_file
from pangu.tensor_files.lazy_tensor import LazyTensor
from pangu.tensor_files.torch_pickle import _OPERATIONS, Machine, PickleError
from pangu.training.checkpoint import MANIFEST

EXAMPLES = int(os.environ.get("PANGU_FUZZ_EXAMPLES", "0"))
CONFIG = ModelConfig(num_layers=2, hidden_size=4, num_heads=2, vocab_size=12, max_positions=3)
HEADS = Overrides(num_heads=2)
MODEL_SLACK = 4 * 2**20
"""Of a reader that builds the model that the files describe."""


def fuzz(share: float = 1.0) -> Callable[[Any], Any]:
    """The same few examples in every run, or many new ones. `share`: of the number of examples."""
    return settings(
        max_examples=int((EXAMPLES or 100) * share),
        derandomize=not EXAMPLES,
        database=None,
        deadline=5000,
        suppress_health_check=list(HealthCheck),
    )


# --- what is spoilt ----------------------------------------------------------------------------------------------------------------------


def shards(folder: Path) -> None:
    """Two ranks that hold alike a model without its embeddings, and these beside them."""
    folder.mkdir()
    convert(small_weights(), "mindspore", folder / "whole", WriteOptions())
    convert(small_weights(), "npy", folder / "arrays", WriteOptions())
    for name in ("word_embedding", "position_embedding", "top_query_embedding"):
        os.rename(folder / f"arrays/backbone.{name}.embedding_table.npy", folder / f"{name}.npy")
    names = mindspore_file.scan(folder / "whole")
    layouts = {name: ((2,), (-1,) * len(stored.shape), 0, -1) for name, stored in names.items() if "embedding" not in name}
    (folder / "the_strategy.ckpt").write_bytes(strategy(layouts))
    for rank in range(2):
        os.link(folder / "whole", folder / f"filerted_{rank}.ckpt")
    for file in (folder / "arrays").iterdir():
        file.unlink()
    (folder / "arrays").rmdir()
    (folder / "whole").unlink()
    data = (folder / "filerted_1.ckpt").read_bytes()
    (folder / "filerted_1.ckpt").unlink()  # no longer the other's
    (folder / "filerted_1.ckpt").write_bytes(data)


def training_checkpoint(folder: Path) -> None:
    """What a run without a pipeline leaves, made without the run."""
    folder.mkdir()
    name = "mp_rank_00_model_states.pt"
    model = PanguModel(CONFIG, ParallelContext(device=torch.device("cpu")))
    torch.save({"module": dict(model.named_parameters()), "step": 3}, folder / name)
    identity = {f"model.{key}": value for key, value in CONFIG.model_dump().items() if key != "preset"}
    identity |= {"parallel.tensor": 1, "parallel.pipeline": 1, "data-parallel size": 1, "parallel.zero_stage": 1, "train.precision": "fp32"}
    manifest = {"identity": identity, "files": {name: {"bytes": (folder / name).stat().st_size}}, "progress": {"step": 3}}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good input of every format."""
    folder = tmp_path_factory.mktemp("corpus")
    weights = small_weights()
    for name in ("huggingface", "npy", "mindspore"):
        convert(weights, name, folder / (f"{name}.ckpt" if name == "mindspore" else name), WriteOptions())
    convert(weights, "megatron", folder / "megatron", WriteOptions(tensor_parallel=2))
    shards(folder / "shards")
    training_checkpoint(folder / "checkpoint")
    legacy = folder / "legacy"
    legacy.mkdir()
    (legacy / "config.json").write_text((folder / "huggingface/config.json").read_text())
    tensors = {name: tensor.read() for name, tensor in weights.tensors.items()}
    torch.save(tensors, legacy / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    zipped = folder / "zipped"
    zipped.mkdir()
    (zipped / "config.json").write_text((folder / "huggingface/config.json").read_text())
    torch.save(tensors, zipped / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of this process alone."""
    return tmp_path_factory.mktemp("scratch") / "input.ckpt"


# --- how ---------------------------------------------------------------------------------------------------------------------------------

HUGE = [varint(2**31), varint(2**32 - 1), varint(2**62), varint(2**64 - 1), b"\xff" * 11, struct.pack("<I", 2**32 - 1)]
HUGE += [struct.pack("<I", 2**31), struct.pack("<Q", 2**32), struct.pack("<Q", 2**63), struct.pack("<q", -1), bytes(8)]
NUMBERS = st.one_of(st.sampled_from([0, 1, 2, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, -1, -(2**63)]), st.integers(-5, 300))


@dataclass
class Edit:
    """One change of some bytes. Places are fractions, so that an edit fits every file."""

    kind: str
    begin: float
    length: int
    data: bytes

    def apply(self, old: bytes) -> bytes:
        """The changed bytes."""
        at = int(self.begin * len(old))
        end = min(len(old), at + self.length)
        if self.kind == "truncate":
            return old[:at]
        if self.kind == "delete":
            return old[:at] + old[end:]
        if self.kind == "duplicate":
            return old[:end] + old[at:end] + old[end:]
        if self.kind == "insert":
            return old[:at] + self.data + old[at:]
        if self.kind == "move":
            return old[:at] + old[end:] + old[at:end]
        return old[:at] + self.data + old[at + len(self.data) :]  # overwrite


PLACES = st.one_of(st.floats(0, 1, exclude_max=True), st.floats(0, 0.05), st.floats(0.9, 1, exclude_max=True))
DATA = st.one_of(st.sampled_from(HUGE), st.binary(min_size=1, max_size=12), st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x01", b"\n"]))
KINDS = ["overwrite", "overwrite", "overwrite", "truncate", "delete", "duplicate", "insert", "move"]
EDITS = st.lists(st.builds(Edit, st.sampled_from(KINDS), PLACES, st.integers(1, 80), DATA), min_size=1, max_size=4)

ODD = [None, True, -1, 0, 1, 2**31, 2**62, 2**64, 10**30, 0.5, float("nan"), float("inf"), -0.0, "", "\n", "\ud800", "\0.safetensors"]
ODD += [
    "x" * 300,
    "../up",
    [],
    {},
    [[]],
    {"": 1},
    [2**62, 0],
    [0, 2**63],
    [-1],
    [1] * 17,
    "model-00001-of-00001.safetensors",
    "I64",
    "BF16",
]


@st.composite
def spoilt_json(draw: st.DrawFn, text: str) -> str:
    """A JSON document with some of its values, keys or entries changed."""
    root = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        places: list[tuple[Any, Any]] = []
        pending = [root]
        while pending:
            node = pending.pop()
            for key in list(node) if isinstance(node, dict) else range(len(node)):
                places.append((node, key))
                if isinstance(node[key], (dict, list)):
                    pending.append(node[key])
        if not places:
            break
        node, key = draw(st.sampled_from(places))
        odd = copy.deepcopy(draw(st.sampled_from(ODD)))
        what = draw(st.sampled_from(["value", "key", "drop", "copy", "deep"]))
        if what == "value" or not isinstance(node, dict):
            node[key] = odd
        elif what == "drop":
            del node[key]
        elif what == "key":
            node[draw(st.sampled_from(["", "\n", "\ud800", "x" * 300, "transformer.h.9999.ln_1.weight", "\0"]))] = node.pop(key)
        elif what == "copy":
            node[f"{key}\n"] = node[key]
        else:
            for _ in range(draw(st.sampled_from([5, 400]))):
                odd = [odd]
            node[key] = odd
    return json.dumps(root)


class Spoilt:
    """A file whose bytes are others inside the `with`."""

    def __init__(self, file: Path, data: bytes) -> None:
        self.file, self.data = file, data

    def __enter__(self) -> None:
        self.original = self.file.read_bytes()
        self.file.write_bytes(self.data)

    def __exit__(self, *_: Any) -> None:
        self.file.write_bytes(self.original)


def tensors_of(root: Any) -> list[torch_file.StoredTensor]:
    """All tensors in plain containers, found without recursion."""
    found, pending, seen = [], [root], set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch_file.StoredTensor):
            found.append(value)
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, (list, tuple)):
            pending += value
    return found


# --- the measure itself ------------------------------------------------------------------------------------------------------------------


class Claim:
    """Stands for a reader that believes what a file of a kilobyte says."""

    def __init__(self, allocate: Callable[[], Any]) -> None:
        self.read = allocate


@pytest.mark.parametrize(
    ("allocate", "caught"),
    [
        (lambda: torch.empty(2**32, dtype=torch.uint8), RuntimeError),
        (lambda: np.empty(2**30), MemoryError),
        (lambda: bytes(2**28), MemoryError),
        (lambda: bytes(2**22), AssertionError),  # more than twice the file, though there is room for it
        (lambda: torch.empty(200 * 2**20, dtype=torch.uint8), RuntimeError),
        (lambda: 1 // 0, ZeroDivisionError),
    ],
)
def test_a_reader_that_believes_what_it_reads_is_caught(allocate: Callable[[], Any], caught: type[Exception], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1024))
    with pytest.raises(caught):
        read_all(tmp_path / "file", lambda: [Claim(allocate)])


def test_a_reader_that_hangs_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpers.bounded.SECONDS", 0.1)

    def forever() -> None:
        while True:
            pass

    with pytest.raises(TooSlow):
        read_all(tmp_path, lambda: [Claim(forever)])


@pytest.mark.parametrize("what", ["mindspore.ckpt", "huggingface", "npy", "megatron", "shards", "checkpoint", "legacy", "zipped"])
def test_what_is_not_spoilt_is_read(what: str, corpus: Path) -> None:
    assert read_all(corpus / what, lambda: formats.open_weights(corpus / what, HEADS), slack=MODEL_SLACK).config == CONFIG


# --- files with bytes changed ------------------------------------------------------------------------------------------------------------

FILES = [
    "mindspore.ckpt",
    "huggingface/model-00001-of-00001.safetensors",
    "huggingface/model.safetensors.index.json",
    "huggingface/config.json",
    "npy/backbone.word_embedding.embedding_table.npy",
    "megatron/release/mp_rank_01/model_optim_rng.pt",
    "megatron/latest_checkpointed_iteration.txt",
    "shards/the_strategy.ckpt",
    "shards/filerted_1.ckpt",
    "shards/word_embedding.npy",
    "checkpoint/mp_rank_00_model_states.pt",
    f"checkpoint/{MANIFEST}",
    "legacy/pytorch_model.bin",
    "zipped/pytorch_model.bin",
]


@pytest.mark.parametrize("name", FILES)
def test_spoilt_bytes(name: str, corpus: Path) -> None:
    source = corpus / name.partition("/")[0]
    original = (corpus / name).read_bytes()

    @fuzz(0.6)
    @given(EDITS)
    def check(edits: list[Edit]) -> None:
        data = original
        for edit in edits:
            data = edit.apply(data)
        manifest = corpus / "checkpoint" / MANIFEST
        with Spoilt(corpus / name, data):
            if name.endswith("states.pt"):  # or the size in the manifest would be all that is tested
                whole = json.loads(manifest.read_text())
                whole["files"]["mp_rank_00_model_states.pt"]["bytes"] = len(data)
                with Spoilt(manifest, json.dumps(whole).encode()):
                    read_all(source, lambda: formats.open_weights(source, HEADS), slack=MODEL_SLACK)
            else:
                read_all(source, lambda: formats.open_weights(source, HEADS), slack=MODEL_SLACK)

    check()


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json")])
def test_spoilt_json(name: str, corpus: Path) -> None:
    source = corpus / name.partition("/")[0]

    @fuzz()
    @given(spoilt_json((corpus / name).read_text()))
    def check(text: str) -> None:
        with Spoilt(corpus / name, text.encode("utf-8", "surrogatepass")):
            read_all(source, lambda: formats.open_weights(source, HEADS), slack=MODEL_SLACK)

    check()


def test_spoilt_safetensors_headers(corpus: Path) -> None:
    file = corpus / "huggingface/model-00001-of-00001.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])

    @fuzz()
    @given(spoilt_json(data[8 : 8 + length].decode()))
    def check(text: str) -> None:
        header = text.encode("utf-8", "surrogatepass")
        with Spoilt(file, struct.pack("<Q", len(header)) + header + data[8 + length :]):
            read_all(file.parent, lambda: formats.open_weights(file.parent, HEADS), slack=MODEL_SLACK)

    check()


@pytest.mark.parametrize("name", ["A/pangu_tiny_sliced.ckpt", "A/pangu_tiny_train_step5.ckpt", "pangu_alpha_2.6B_ckpt_strategy.ckpt", "B"])
def test_spoilt_originals(name: str, shared: Path, scratch: Path) -> None:
    path = shared / "oracle" / name
    file = path / "ckpt/mp1_fp32_native/iter_0001000/mp_rank_00/model_optim_rng.pt" if name == "B" else path
    original = file.read_bytes()

    def read() -> Any:
        if "strategy" not in name:
            return formats.open_weights(scratch, Overrides(num_heads=4), format_name="megatron" if name == "B" else "mindspore")
        for layout in mindspore_shards.read_strategy(scratch).values():
            if math.prod(layout.dev_matrix) <= 512:  # as many files are there, or nothing is merged
                layout.slices()
        return []

    @fuzz(0.08)
    @given(EDITS)
    def check(edits: list[Edit]) -> None:
        data = original
        for edit in edits:
            data = edit.apply(data)
        scratch.write_bytes(data)
        try:
            read_all(scratch, read, slack=16 * 2**20)
        except ValueError as error:  # of slices(), which its caller turns into a refusal
            assert "do not share a slice" in str(error)

    check()


# --- bytes from nowhere ------------------------------------------------------------------------------------------------------------------

HEADS_OF_FILES = [b"", b"\n", b"PK\x03\x04", torch_file._LEGACY_MAGIC, b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00", b"{", b"\x80\x02"]


@fuzz()
@given(st.sampled_from(HEADS_OF_FILES), st.binary(max_size=300))
def test_arbitrary_bytes(scratch: Path, head: bytes, data: bytes) -> None:
    scratch.write_bytes(head + data)
    read_all(scratch, lambda: mindspore_file.scan(scratch) and [])
    read_all(scratch, lambda: mindspore_shards.read_strategy(scratch) and [])
    read_all(scratch, lambda: tensors_of(torch_file.load(scratch)))
    read_all(scratch, lambda: [mindspore_shards.open_array(scratch)])


@st.composite
def messages(draw: st.DrawFn, depth: int = 3) -> bytes:
    """Protobuf that is nearly what MindSpore writes: the right fields with wrong contents, wrong lengths, wrong wire types."""
    out = b""
    for _ in range(draw(st.integers(0, 4))):
        number = draw(st.sampled_from([1, 1, 2, 2, 3, 3, 0, 6, 7, 2**29]))
        kind = draw(st.sampled_from(["message", "message", "number", "text", "bytes", "fixed", "odd"]))
        if kind == "number":
            out += varint(number << 3) + varint(draw(NUMBERS))
        elif kind == "fixed":
            out += varint(number << 3 | draw(st.sampled_from([1, 5]))) + draw(st.binary(max_size=8))
        elif kind == "odd":
            out += draw(DATA)
        else:
            content = draw(messages(depth - 1)) if kind == "message" and depth else draw(st.binary(max_size=20))
            if kind == "text":
                content = draw(st.sampled_from(["Float32", "float16", "str", "global_step", "Int32", "a\nb", "q" * 5000])).encode()
            claimed = len(content) if draw(st.integers(0, 9)) else draw(NUMBERS)
            out += varint(number << 3 | 2) + varint(claimed) + content
    return out


@fuzz(2)
@given(messages())
def test_protobuf_that_is_wrong(scratch: Path, data: bytes) -> None:
    scratch.write_bytes(data)

    def tensors() -> list[LazyTensor]:
        return [stored.lazy(scratch, name) for name, stored in mindspore_file.scan(scratch).items() if stored.dtype == torch.float32]

    read_all(scratch, tensors)
    read_all(scratch, lambda: formats.open_weights(scratch, HEADS, format_name="mindspore"))
    read_all(scratch, lambda: mindspore_shards.read_strategy(scratch) and [])


@fuzz()
@given(st.sampled_from(["Float32", "Float16", "Int8", "bool"]), st.lists(NUMBERS, max_size=5), st.binary(max_size=16), st.booleans())
def test_tensors_of_any_shape(scratch: Path, type_name: str, dims: list[int], content: bytes, packed: bool) -> None:
    shape = field(1, b"".join(varint(dim) for dim in dims)) if packed else b"".join(field(1, dim) for dim in dims)
    scratch.write_bytes(field(1, field(1, b"a") + field(2, shape + field(2, type_name.encode()) + field(3, content))))
    read_all(scratch, lambda: [stored.lazy(scratch, name) for name, stored in mindspore_file.scan(scratch).items()])


@fuzz()
@given(
    st.one_of(st.sampled_from(["<f4", "<f2", "<f8", "|O", ">f4", "<f4\n", "V8"]), st.text(max_size=6)),
    st.sampled_from(["True", "False", "1", "None", "'x'"]),
    st.one_of(
        st.lists(NUMBERS, max_size=4).map(lambda dims: repr(tuple(dims))), st.sampled_from(["(True,)", "(1.0,)", "5", "()", "((1,),)"])
    ),
    st.binary(max_size=64),
)
def test_npy_headers(scratch: Path, descr: str, fortran: str, shape: str, data: bytes) -> None:
    header = f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}}}\n".encode("utf-8", "surrogatepass")
    scratch.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data)
    read_all(scratch, lambda: [mindspore_shards.open_array(scratch)])


# --- pickles -----------------------------------------------------------------------------------------------------------------------------

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
