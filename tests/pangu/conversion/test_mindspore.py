from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.golden import golden_batch, golden_model, golden_weights
from helpers.mindspore_bytes import checkpoint, field, value, varint
from helpers.mindspore_weights import random_weights, renamed, stored

from megatron_ext.context import ParallelContext
from pangu.conversion import mindspore
from pangu.conversion.weights import Overrides, Weights, WriteOptions
from pangu.errors import InputError
from pangu.model.model import PanguModel
from pangu.tensor_files import mindspore_file

HEADS = Overrides(num_heads=4)


def logits(weights: Weights, shared: Path) -> np.ndarray:
    config = weights.config.model_copy(update={"hidden_dropout": 0.0, "attention_dropout": 0.0})
    model = PanguModel(config, ParallelContext(fill=weights.fill))
    tokens, position_ids, _, _ = golden_batch(np.load(shared / "oracle/A/case_plain.npz"))
    with torch.no_grad():
        return model.logits(tokens, position_ids).numpy()


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A whole checkpoint of 10 KB."""
    path = tmp_path / "tiny.ckpt"
    mindspore.write(random_weights(), path, WriteOptions())
    return path


class TestOriginalFiles:
    @pytest.mark.parametrize("name", ["pangu_tiny", "pangu_tiny_sliced", "pangu_tiny_pcl_names"])
    def test_tensors_and_logits_are_the_original_s(self, shared: Path, name: str) -> None:
        weights = mindspore.read(shared / f"oracle/A/{name}.ckpt", HEADS)
        expected = golden_weights(shared)
        found = stored(weights)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[key], expected[key]) for key in expected)
        assert (weights.config.gelu, weights.config.final_norm, weights.config.num_layers) == ("tanh", "before_query", 3)
        assert ("pcl-pangu" in weights.source) == ("pcl" in name)
        assert np.abs(logits(weights, shared) - np.load(shared / "oracle/A/case_plain.npz")["logits"]).max() < 5e-5

    def test_half_precision(self, shared: Path) -> None:
        weights = mindspore.read(shared / "oracle/A/pangu_tiny_fp16.ckpt", HEADS)
        found, expected = stored(weights), golden_weights(shared)
        assert all(found[key].dtype == np.float16 and np.array_equal(found[key], expected[key].astype(np.float16)) for key in expected)
        assert np.abs(logits(weights, shared) - np.load(shared / "oracle/A/case_plain.npz")["logits"]).max() < 2e-2

    def test_training_checkpoint(self, shared: Path) -> None:
        weights = mindspore.read(shared / "oracle/A/pangu_tiny_train_step5.ckpt", HEADS)
        expected = np.load(shared / "oracle/A/train_clip1.npz")
        assert all(np.array_equal(array, expected[f"step5/{name}"]) for name, array in stored(weights).items())
        assert weights.step == 5
        assert len(weights.left_out) == 2 * 53 + 2
        assert {"global_step", "loss_scale", "adam_m.backbone.layernorm.gamma"} <= set(weights.left_out)

    @pytest.mark.parametrize(("name", "chunk"), [("pangu_tiny", None), ("pangu_tiny_fp16", None), ("pangu_tiny_sliced", 24 * 1024)])
    def test_writing_gives_the_same_file(
        self, shared: Path, tmp_path: Path, name: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if chunk:
            monkeypatch.setattr(mindspore_file, "CHUNK_BYTES", chunk)
        source = shared / f"oracle/A/{name}.ckpt"
        mindspore.write(mindspore.read(source, HEADS), tmp_path / "again.ckpt", WriteOptions())
        assert (tmp_path / "again.ckpt").read_bytes() == source.read_bytes()

    def test_any_slice_of_any_tensor(self, shared: Path) -> None:
        weights = mindspore.read(shared / "oracle/A/pangu_tiny_sliced.ckpt", HEADS)
        for name, tensor in weights.tensors.items():
            assert tensor.read_part is not None
            full = tensor.read()
            assert full.shape == tensor.shape and full.dtype == tensor.dtype
            for dimension, length in enumerate(tensor.shape):
                for begin, end in ((0, length), (length // 3, length // 2), (length - 1, length), (3, 3)):
                    part = tensor.read_part(dimension, begin, end)
                    assert torch.equal(part, full.narrow(dimension, begin, end - begin)), name


class TestDialects:
    @pytest.mark.parametrize(
        ("dialect", "gelu", "final_norm"),
        [
            ("model zoo", "sigmoid", "before_query"),
            ("mindformers' converter", "tanh", "before_query"),
            ("pcl-pangu", "tanh", "before_query"),
            ("pipeline", "tanh", "after_query"),
        ],
    )
    def test_names_tell_the_dialect(self, shared: Path, tmp_path: Path, dialect: str, gelu: str, final_norm: str) -> None:
        path = tmp_path / "x.ckpt"
        path.write_bytes(checkpoint(renamed(golden_weights(shared), dialect)))
        weights = mindspore.read(path, HEADS)
        assert dialect in weights.source
        assert (weights.config.gelu, weights.config.final_norm) == (gelu, final_norm)
        tokens, position_ids, _, _ = golden_batch(np.load(shared / "oracle/A/case_plain.npz"))
        with torch.no_grad():
            expected = golden_model(shared, gelu=gelu, final_norm=final_norm).logits(tokens, position_ids).numpy()
        assert np.array_equal(logits(weights, shared), expected)

    def test_overrides_win(self, shared: Path, tmp_path: Path) -> None:
        path = tmp_path / "x.ckpt"
        path.write_bytes(checkpoint(renamed(golden_weights(shared), "model zoo")))
        weights = mindspore.read(path, Overrides(num_heads=4, gelu="tanh"))
        assert np.abs(logits(weights, shared) - np.load(shared / "oracle/A/case_plain.npz")["logits"]).max() < 5e-5
        with pytest.raises(InputError, match="--heads"):
            mindspore.read(path, Overrides())

    def test_the_published_map_of_names(self, shared: Path) -> None:
        mapping = json.loads((shared / "oracle/A/pcl_mindspore_names_stage1.json").read_text())
        assert {name: name for name in renamed(dict.fromkeys(mapping.values()), "pcl-pangu")} == {name: name for name in mapping}

    @pytest.mark.parametrize("rename", [lambda n: f"network.{n}", lambda n: f"module.{n}", lambda n: n.removeprefix("backbone.")])
    def test_prefixes(self, tiny: Path, rename: Callable[[str], str]) -> None:
        arrays = stored(mindspore.read(tiny, HEADS))
        tiny.write_bytes(checkpoint({rename(name): array for name, array in arrays.items()}))
        assert stored(mindspore.read(tiny, HEADS)).keys() == arrays.keys()

    def test_names_of_the_source_code(self, tiny: Path) -> None:
        arrays = stored(mindspore.read(tiny, HEADS))
        in_code = {re.sub(r"(projection|mapping)\.(weight|bias)", r"\1.mapping_\2", name): array for name, array in arrays.items()}
        assert in_code.keys() != arrays.keys()
        tiny.write_bytes(checkpoint(in_code))
        again = stored(mindspore.read(tiny, HEADS))
        assert all(np.array_equal(again[name], arrays[name]) for name in arrays)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("final_norm", ["before_query", "after_query"])
    def test_round_trip(self, tmp_path: Path, dtype: torch.dtype, final_norm: str) -> None:
        weights = random_weights(dtype, final_norm=final_norm)
        mindspore.write(weights, tmp_path / "x.ckpt", WriteOptions())
        again = mindspore.read(tmp_path / "x.ckpt", HEADS)
        assert again.config == weights.config
        for name, tensor in weights.tensors.items():
            assert again.tensors[name].dtype == dtype
            assert torch.equal(again.tensors[name].read(), tensor.read()), name

    def test_another_dtype(self, tmp_path: Path) -> None:
        mindspore.write(random_weights(), tmp_path / "x.ckpt", WriteOptions(dtype=torch.bfloat16))
        again = mindspore.read(tmp_path / "x.ckpt", HEADS)
        for name, tensor in random_weights().tensors.items():
            assert torch.equal(again.tensors[name].read(), tensor.read().bfloat16())

    def test_blocks_and_chunks_do_not_show(self, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mindspore_file, "BLOCK_BYTES", 100)
        mindspore.write(random_weights(), tmp_path / "x.ckpt", WriteOptions())
        assert (tmp_path / "x.ckpt").read_bytes() == tiny.read_bytes()


class TestForms:
    """What other versions of MindSpore write."""

    def scanned(self, tmp_path: Path, content: bytes) -> dict[str, mindspore_file.StoredTensor]:
        (tmp_path / "x.ckpt").write_bytes(content)
        return mindspore_file.scan(tmp_path / "x.ckpt")

    def test_types_scalars_and_unknown_fields(self, tmp_path: Path) -> None:
        array = np.arange(6, dtype=np.float32).reshape(2, 3)
        content = (
            value("packed", array.tobytes(), varint(2) + varint(3), "float32")
            + value("old scalar", b"\0\0\0\0", [0], "Float32")
            + value("scalar", b"\x07\0\0\0", [], "Int32")
            + value("empty", b"", [0], "Float32")
            + value("early", b"\1\2", [2], "Uint8")
            + value("flags", b"\1\0", [2], "Bool")
            + value("text", "é".encode("utf-32-le"), [0], "str")
            + value("nibbles", b"\x12", [2], "Int4")
            + field(1, field(1, b"map") + field(3, b"whatever"))
            + field(1, field(3, b"whatever") + field(1, b"map"))
            + field(9, b"unknown")
            + varint(10 << 3 | 1) + bytes(8) + varint(10 << 3 | 5) + bytes(4) + field(11, 12)
            + field(1, field(7, 1)
            + field(2, field(3, b"\0\0") + field(2, b"BFloat16") + field(1, 1) + field(8, b"?")) + field(1, b"turned"))
        )  # fmt: skip
        tensors = self.scanned(tmp_path, content)
        path = tmp_path / "x.ckpt"
        assert np.array_equal(tensors["packed"].read(path).numpy(), array)
        assert {name: tensor.shape for name, tensor in tensors.items()} == {
            "packed": (2, 3), "old scalar": (), "scalar": (), "empty": (0,), "early": (2,), "flags": (2,), "text": (0,), "nibbles": (2,),
            "map": (), "turned": (1,),
        }  # fmt: skip
        assert tensors["scalar"].read(path).item() == 7
        assert tensors["early"].read(path).tolist() == [1, 2]
        assert tensors["flags"].read(path).tolist() == [True, False]
        assert tensors["turned"].dtype == torch.bfloat16
        assert [name for name, tensor in tensors.items() if tensor.dtype is None] == ["text", "nibbles", "map"]

    def test_checksum(self, tiny: Path) -> None:
        plain = tiny.read_bytes()
        assert mindspore_file.verify_checksum(tiny) is False
        tiny.write_bytes(plain + b"crc_num" + zlib.crc32(plain).to_bytes(10, "big"))
        assert mindspore_file.verify_checksum(tiny) is True
        assert len(mindspore.read(tiny, HEADS).tensors) == 16 * 2 + 5
        tiny.write_bytes(plain[:-1] + bytes([plain[-1] ^ 1]) + b"crc_num" + zlib.crc32(plain).to_bytes(10, "big"))
        mindspore.read(tiny, HEADS)
        with pytest.raises(InputError, match="CRC-32"):
            mindspore_file.verify_checksum(tiny)

    def test_detection(self, tiny: Path, tmp_path: Path) -> None:
        assert mindspore.detect(tiny)
        assert not mindspore.detect(tmp_path)
        for name, content in (("a.pt", b"PK\x03\x04"), ("b.bin", b"\x80\x02}q\x00"), ("c", b""), ("d", b"\n\n\n\n\n\n\n\n")):
            (tmp_path / name).write_bytes(content)
            assert not mindspore.detect(tmp_path / name)
        (tmp_path / "nameless").write_bytes(tiny.read_bytes())
        assert mindspore.detect(tmp_path / "nameless")

    def test_tokenizer_beside(self, tiny: Path) -> None:
        assert mindspore.read(tiny, HEADS).tokenizer is None
        (tiny.parent / "vocab.model").write_bytes(b"")
        assert mindspore.read(tiny, HEADS).tokenizer == tiny.parent / "vocab.model"
