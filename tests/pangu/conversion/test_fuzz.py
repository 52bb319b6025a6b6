"""Every reader of foreign files against bytes that no writer wrote: it reads or refuses in one line, in bounded time and memory.

`PANGU_FUZZ_EXAMPLES=5000 pytest tests/pangu/conversion/test_fuzz.py` looks further, with new inputs on every run.
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bounded import read_all
from helpers.fuzzing import DATA, EDITS, NUMBERS, Edit, Spoilt, fuzz, spoilt_json, tensors_of
from helpers.mindspore_bytes import field, strategy, varint
from helpers.whole_model import small_weights
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.context import ParallelContext
from pangu.config import ModelConfig
from pangu.conversion import formats, mindspore_shards
from pangu.conversion.convert import convert
from pangu.conversion.weights import Overrides, WriteOptions
from pangu.model.model import PanguModel
from pangu.tensor_files import mindspore_file, torch_file
from pangu.tensor_files.lazy_tensor import LazyTensor
from pangu.training.checkpoint import MANIFEST

CONFIG = ModelConfig(num_layers=2, hidden_size=4, num_heads=2, vocab_size=12, max_positions=3)
HEADS = Overrides(num_heads=2)
MODEL_SLACK = 4 * 2**20
"""Of a reader that builds the model that the files describe."""


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
    identity = {f"model.{key}": value for key, value in CONFIG.identity().items()}
    identity |= {"parallel.tensor": 1, "parallel.pipeline": 1, "data-parallel size": 1, "parallel.zero_stage": 1, "train.precision": "fp32"}
    manifest = {
        "identity": identity,
        "files": {name: {"bytes": (folder / name).stat().st_size, "sha256": "0" * 64}},
        "progress": {"step": 3},
    }
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
