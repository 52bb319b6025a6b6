"""MindSpore files that are damaged, hostile or of another model: refused in one line, in bounded time and memory."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.golden import golden_weights
from helpers.mindspore_bytes import array_value, checkpoint, field, value, varint
from helpers.mindspore_weights import random_weights, renamed, stored

from pangu.conversion import mindspore
from pangu.conversion.weights import Overrides, WriteOptions
from pangu.errors import InputError
from pangu.tensor_files import mindspore_file

HEADS = Overrides(num_heads=4)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A whole checkpoint of 10 KB."""
    path = tmp_path / "tiny.ckpt"
    mindspore.write(random_weights(), path, WriteOptions())
    return path


def refused(path: Path, match: str = ".") -> None:
    with pytest.raises(InputError, match=match) as caught:
        mindspore.read(path, HEADS)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


class TestRefused:
    def records(self, content: bytes) -> list[tuple[int, int]]:
        """Offset and end of each value."""
        found, at = [], 0
        while at < len(content):
            size, body, shift = 0, at + 1, 0
            while True:
                size |= (content[body] & 0x7F) << shift
                shift, body = shift + 7, body + 1
                if content[body - 1] < 0x80:
                    break
            found.append((at, body + size))
            at = body + size
        return found

    def test_cut_off_anywhere(self, tiny: Path) -> None:
        content = tiny.read_bytes()
        records = self.records(content)
        assert len(records) == 37
        for _, end in records:
            for cut in (end - 1, end, end + 1):
                if cut != len(content):
                    tiny.write_bytes((content + b"\n")[:cut])
                    refused(tiny)

    def test_a_flipped_bit_in_any_length(self, tiny: Path) -> None:
        content = tiny.read_bytes()
        for at, _ in self.records(content):
            tag_length = at + (2 if content[at + 1] < 0x80 else 3) + 1
            for offset in (at, at + 1, tag_length - 1, tag_length):
                for bit in (0, 3, 6, 7):
                    damaged = bytearray(content)
                    damaged[offset] ^= 1 << bit
                    tiny.write_bytes(damaged)
                    refused(tiny)

    @pytest.mark.parametrize(
        "content",
        [
            b"\n" + varint(2**32) + b"\n\x03abc" + bytes(1000),
            b"\n" + varint(1000) + b"\n" + varint(2**32) + bytes(1000),
            b"\n" + varint(1010) + b"\n\x01a\x12" + varint(2**32) + bytes(1000),
            value("a", bytes(1000), [2**16, 2**16], "UInt8"),
            value("a", bytes(1000), [2**40, 2**40, 2**40], "Float32"),
            value("a", bytes(1000), [2**63], "Float32"),
            value("a", b"", [2**40, 0, 2**40], "Float32") + value("a", bytes(1000), [2**40, 0, 2**40], "Float32"),
            value("a", bytes(4), [1] * 1000, "Float32"),
            value("a", bytes(4), b"\1" * 1000, "Float32"),
            value("a" * 5000, bytes(4), [1], "Float32"),
            b"".join(field(7, 0) for _ in range(1000)),
            b"\n\x02\n\x00" * 250,
        ],
    )
    def test_claims_without_bytes(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "x.ckpt"
        path.write_bytes(content)
        tracemalloc.start()
        refused(path, r"byte \d|does not begin")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**20

    def test_more_values_than_any_model_has(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a hostile file costs is bounded by their number."""
        assert mindspore_file.MAX_VALUES == 65_536
        monkeypatch.setattr(mindspore_file, "MAX_VALUES", 1000)
        path = tmp_path / "x.ckpt"
        path.write_bytes(value("a", b"\0", [1], "Int8") * 1001)
        refused(path, "more than 1,000 fields")

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (b"", "is empty"),
            (b"\xd8\x5e\x3a\x7f" + bytes(100), "encrypted"),
            (b"\xd9\x5e\x3a\x7f" + bytes(100), "encrypted"),
            (np.random.default_rng(1).bytes(5000), "does not begin"),
            (b"\n" + np.random.default_rng(2).bytes(5000), "byte"),
            (b"PK\x03\x04" + bytes(50), "does not begin"),
            (field(9, b"x") * 3, "does not begin"),
            (field(1, field(1, b"a")) + value("a", b"", [], "str"), "which no dialect"),
            (value("a", b"1", [1], "Int8") + value("b", b"1", [1], "Int8") + value("a", b"1", [1], "Int8"), "a second time, after byte 0"),
            (value("a", bytes(8), [2, 2], "Float32") + value("a", bytes(8), [4], "Float32"), "goes on as"),
            (value("a", bytes(8), [2, 2], "Float32") + value("a", bytes(8), [2, 2], "Int32"), "goes on as"),
            (value("a", bytes(12), [2, 2], "Float32"), "holds 12 bytes, Float32 .* needs 16"),
            (array_value("a", np.ones(3)) * 2, "holds 48 bytes"),
            (field(1, field(2, field(1, 1))), "without a tag"),
            (field(1, field(1, b"a") + field(2, field(1, 1))), "without type and content"),
            (field(1, field(1, b"a") + field(1, b"b")), "each once"),
            (field(1, field(1, b"\xff\xfe")), "not text"),
            (field(1, field(1, b"a\nb")), "not text"),
            (b"\n\x02\x08\xff", "does not end"),
            (b"\n\x02\x0b\x0c", "no protobuf field"),
        ],
    )  # fmt: skip
    def test_what_is_no_checkpoint(self, tmp_path: Path, content: bytes, match: str) -> None:
        (tmp_path / "x.ckpt").write_bytes(content)
        refused(tmp_path / "x.ckpt", match)

    def test_no_file(self, tmp_path: Path) -> None:
        refused(tmp_path / "x.ckpt", "cannot be read")
        refused(tmp_path, "cannot be read")

    def changed(self, tiny: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
        arrays = stored(mindspore.read(tiny, HEADS))
        change(arrays)
        tiny.write_bytes(checkpoint(arrays))
        return tiny

    @pytest.mark.parametrize(
        ("missing", "match"),
        [
            ("backbone.blocks.0.attention.dense2.bias", "lacks backbone.blocks.0.attention.dense2.bias"),
            ("backbone.top_query_layer.layernorm1.gamma", "lacks backbone.top_query_layer.layernorm1.gamma"),
            ("backbone.layernorm.beta", "lacks transformer.ln_f.bias"),
            ("backbone.top_query_embedding.embedding_table", "lacks a query embedding"),
        ],
    )
    def test_a_missing_tensor(self, tiny: Path, missing: str, match: str) -> None:
        refused(self.changed(tiny, lambda arrays: arrays.pop(missing)), match)

    def test_a_missing_layer(self, tiny: Path, shared: Path) -> None:
        def without(prefix: str, arrays: dict[str, np.ndarray]) -> bytes:
            return checkpoint({name: array for name, array in arrays.items() if not name.startswith(prefix)})

        golden = golden_weights(shared)
        tiny.write_bytes(without("backbone.top_query_layer.", golden))
        refused(tiny, "lacks backbone.top_query_layer")
        tiny.write_bytes(without("backbone.blocks.0.", golden))
        refused(tiny, "lacks backbone.blocks.0")
        tiny.write_bytes(checkpoint(renamed(golden, "pipeline") | {"backbone.top_query_layer.layernorm1.gamma": np.ones(64, np.float32)}))
        refused(tiny, "holds backbone.top_query_layer")

    @pytest.mark.parametrize(
        ("name", "change", "match"),
        [
            ("backbone.blocks.0.output.mapping.weight", np.transpose, r"shape \[32, 8\], expected \[8, ...\]"),
            ("backbone.top_query_layer.output.projection.weight", np.transpose, r"shape \[8, 32\], expected \[..., 8\]"),
            ("backbone.blocks.0.attention.dense1.weight", lambda a: a[:, :4], "attn.q_proj.weight has shape"),
            ("backbone.layernorm.gamma", lambda a: a[None], "ln_f.weight has shape"),
            ("backbone.layernorm.gamma", lambda a: a[0], "no weight has"),
            ("backbone.layernorm.gamma", lambda a: a[:0], "no weight has"),
            ("backbone.word_embedding.embedding_table", lambda a: a.ravel(), "wte.weight has shape"),
            ("backbone.layernorm.gamma", lambda a: a.astype(np.int32), "of type Int32"),
        ],
    )
    def test_a_wrong_shape_or_type(self, tiny: Path, name: str, change: Callable[[np.ndarray], np.ndarray], match: str) -> None:
        refused(self.changed(tiny, lambda arrays: arrays.update({name: change(arrays[name])})), match)

    @pytest.mark.parametrize(
        ("name", "match"),
        [
            ("backbone.blocks.0.router.weight", "which no dialect"),
            ("backbone.blocks.00.layernorm1.gamma", "which no dialect"),
            ("layernorm.gamma", "the same tensor"),
            ("word_embedding_table", "the same tensor"),
            ("backbone.blocks.9999.layernorm1.gamma", "lacks backbone.blocks.1"),
        ],
    )
    def test_an_unexpected_tensor(self, tiny: Path, name: str, match: str) -> None:
        refused(self.changed(tiny, lambda arrays: arrays.update({name: np.ones(8, np.float32)})), match)

    def test_a_file_that_shrinks(self, tiny: Path) -> None:
        weights = mindspore.read(tiny, HEADS)
        tiny.write_bytes(tiny.read_bytes()[:200])
        with pytest.raises(InputError, match="became shorter"):
            weights.tensors["transformer.h.1.mlp.c_proj.bias"].read()

    @pytest.mark.parametrize("counter", [np.full(5, 3, np.int32), np.full((), np.inf, np.float32), np.full(1, -1, np.int32)])
    def test_an_odd_counter(self, tiny: Path, counter: np.ndarray) -> None:
        self.changed(tiny, lambda arrays: arrays.update(global_step=counter))
        assert mindspore.read(tiny, HEADS).step in (None, -1)


def test_mutated_files_are_refused_or_read(tiny: Path) -> None:
    """Bytes changed, inserted, removed and repeated: an InputError or a model, never anything else, and never slowly."""
    content = tiny.read_bytes()
    generator = np.random.default_rng(20210426)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(generator.integers(1, 4)):
            at = int(generator.integers(len(damaged)))
            kind = generator.integers(5)
            if kind == 0:
                damaged[at] = int(generator.choice([0, 1, 0x7F, 0x80, 0xFF, int(generator.integers(256))]))
            elif kind == 1:
                damaged[at] ^= 1 << int(generator.integers(8))
            elif kind == 2:
                damaged[at:at] = generator.bytes(int(generator.integers(1, 12)))
            elif kind == 3:
                del damaged[at : at + int(generator.integers(1, 40))]
            else:
                damaged[at:at] = damaged[at // 2 : at // 2 + int(generator.integers(1, 400))]
        tiny.write_bytes(damaged)
        began = time.perf_counter()
        try:
            for tensor in mindspore.read(tiny, HEADS).tensors.values():
                assert tensor.read().shape == tensor.shape
            outcomes["read"] += 1
        except InputError:
            outcomes["refused"] += 1
        assert time.perf_counter() - began < 5
    assert outcomes["refused"] > 150 and outcomes["read"] > 30, outcomes
