"""The published PyTorch port's checkpoints: the original's logits, and every number of files out and back bit for bit."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.golden import mindspore_name
from helpers.megatron_files import assert_same, config_8, tensors_of, weights_of
from helpers.ranks import share
from helpers.tiny_tokenizer import tiny_model
from torch import Tensor

from megatron_ext.context import ParallelContext
from pangu.conversion import megatron
from pangu.conversion.megatron import FILE, TRACKER, detect, read, write
from pangu.conversion.weights import Overrides, Weights, WriteOptions, model_specs
from pangu.errors import InputError
from pangu.model.model import PanguModel
from pangu.tensor_files.lazy_tensor import LazyTensor

# --- the original's own files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "eod"])
@pytest.mark.parametrize("gelu", ["erf", "tanh"])
@pytest.mark.parametrize(("name", "tolerance"), [("mp1_fp32_native", 5e-5), ("mp2_fp16_splittool", 3e-2)])
@torch.no_grad()
def test_logits_are_the_originals(name: str, tolerance: float, gelu: str, case: str, shared: Path) -> None:
    weights = read(shared / "oracle/B/ckpt" / name, Overrides(num_heads=4, gelu=gelu))
    expected = np.load(shared / f"oracle/B/logits_mp1_{gelu}gelu.npz")
    from pangu.model.block import RunOptions

    model = PanguModel(weights.config, ParallelContext(fill=weights.fill), RunOptions(reset_at_document=case == "eod")).eval()
    tokens = torch.from_numpy(np.load(shared / f"oracle/A/case_{case}.npz")["input_ids"][:, :-1]).long()
    logits = model.logits(tokens, torch.from_numpy(expected[f"{case}/position_ids"]).long())
    assert (logits - torch.from_numpy(expected[f"{case}/logits"])).abs().max() < tolerance


def test_what_the_originals_files_say(shared: Path) -> None:
    native = read(shared / "oracle/B/ckpt/mp1_fp32_native", Overrides())
    assert (native.config.num_layers, native.config.num_heads, native.config.gelu, native.step) == (3, 4, "erf", 1000)
    assert "erf" in native.source and "args" in native.left_out and "torch_rng_state" in native.left_out
    split = read(shared / "oracle/B/ckpt/mp2_fp16_splittool", Overrides(num_heads=4))
    assert (split.config.gelu, split.step, split.left_out) == ("tanh", 7800, ())
    assert "2 files" in split.source and "tanh, which trained the released weights" in split.source
    with pytest.raises(InputError, match="Give --heads"):
        read(shared / "oracle/B/ckpt/mp2_fp16_splittool", Overrides())
    for name, tensor in native.tensors.items():
        half = split.tensors[name].read()
        assert half.dtype == torch.float16 and torch.equal(half, tensor.read().half()), name


def test_tensors_are_the_originals(shared: Path) -> None:
    """Under the names and in the layout that the port's own map to the original gives."""
    names = json.loads((shared / "oracle/B/name_map_to_mindspore.json").read_text())
    expected = {entry["mindspore"]: name.removeprefix("language_model.") for name, entry in names.items()}
    ours = {canonical: ".".join(place) for canonical, place in megatron._port_names(3).items()}
    assert {name: expected[mindspore_name(name)] for name in ours} == ours


def test_files_are_laid_out_as_the_ports_own(shared: Path, tmp_path: Path) -> None:
    weights = read(shared / "oracle/B/ckpt/mp1_fp32_native", Overrides())
    write(weights, tmp_path / "out", WriteOptions())
    root = torch.load(tmp_path / "out/iter_0001000/mp_rank_00" / FILE, weights_only=True)
    layout = json.loads((shared / "oracle/B/state_dict_layout.json").read_text())
    found = {}
    for path, (shape, dtype) in layout.items():
        value = root["model"]
        for key in path.split("/"):
            value = value[key]
        found[path] = [list(value.shape), str(value.dtype)]
        assert found[path] == [shape, dtype]
    theirs = torch.load(shared / "oracle/B/ckpt/mp1_fp32_native/iter_0001000/mp_rank_00" / FILE, weights_only=False)
    assert {section: set(value) for section, value in root["model"]["language_model"].items()} == {
        section: set(value) for section, value in theirs["model"]["language_model"].items()
    }
    assert root["iteration"] == 1000 and (tmp_path / "out" / TRACKER).read_text() == "1000\n"


# --- out and back -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_out_and_back_is_bit_exact(ranks: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """101 ids divide by no number of files: the tables are padded, and the mark tells where they end."""
    config = config_8()
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of(config).items()}
    write(weights_of(tensors, config, step=7), tmp_path / "out", WriteOptions(tensor_parallel=ranks))
    assert detect(tmp_path / "out")
    found = read(tmp_path / "out", Overrides())
    assert_same(found, tensors)
    assert found.config == config and found.step == 7 and found.left_out == ()
    specs = model_specs(config)
    for rank in range(ranks):
        root = torch.load(tmp_path / f"out/iter_0000007/mp_rank_{rank:02d}" / FILE, weights_only=True)["model"]["language_model"]
        for name, place in megatron._port_names(config.num_layers).items():
            value: Any = root
            for key in place:
                value = value[key]
            split_dim = specs[name].split_dim
            expected = tensors[name] if split_dim is None else share(tensors[name], rank, ranks, split_dim)
            assert value.is_contiguous() and torch.equal(value, expected), (name, rank)
    assert not (tmp_path / f"out/iter_0000007/mp_rank_{ranks:02d}").exists()


def test_parts_are_those_of_the_whole(tmp_path: Path) -> None:
    config = config_8()
    tensors = tensors_of(config)
    write(weights_of(tensors, config), tmp_path / "out", WriteOptions(tensor_parallel=4))
    for name, lazy in read(tmp_path / "out", Overrides()).tensors.items():
        assert lazy.read_part is not None
        for dim, extent in enumerate(lazy.shape):
            for begin, end in [(0, extent), (0, 1), (extent // 3, extent - 1), (extent - 1, extent)]:
                assert torch.equal(lazy.read_part(dim, begin, end), tensors[name].narrow(dim, begin, end - begin)), (name, dim, begin)


def test_the_dialect_survives_and_the_user_may_overrule_it(tmp_path: Path) -> None:
    config = config_8(gelu="erf", ffn_hidden_size=48, separator_id=3, pad_id=0)
    write(weights_of(tensors_of(config), config), tmp_path / "out", WriteOptions(tensor_parallel=2))
    assert read(tmp_path / "out", Overrides()).config == config
    overruled = read(tmp_path / "out", Overrides(num_heads=4, gelu="tanh"))
    assert (overruled.config.num_heads, overruled.config.gelu) == (4, "tanh")


def test_a_released_model_has_no_step(tmp_path: Path) -> None:
    config = config_8()
    (tmp_path / "vocab.model").write_bytes(tiny_model())
    write(weights_of(tensors_of(config), config, tokenizer=tmp_path / "vocab.model"), tmp_path / "out", WriteOptions())
    assert (tmp_path / "out" / TRACKER).read_text() == "release\n"
    found = read(tmp_path / "out", Overrides())
    assert found.step is None
    assert found.tokenizer is not None and found.tokenizer.read_bytes() == tiny_model()


def test_dtype_of_the_output(tmp_path: Path) -> None:
    config = config_8()
    tensors = tensors_of(config)
    write(weights_of(tensors, config), tmp_path / "out", WriteOptions(dtype=torch.bfloat16, tensor_parallel=2))
    assert_same(read(tmp_path / "out", Overrides()), {name: tensor.bfloat16() for name, tensor in tensors.items()})


@pytest.mark.parametrize("ranks", [1, 8])
def test_one_tensor_is_in_memory_at_a_time(ranks: int, tmp_path: Path) -> None:
    config = config_8()
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def lazy(tensor: Tensor) -> LazyTensor:
        def read_it() -> Tensor:
            nonlocal most
            value = tensor.clone()
            alive.append(weakref.ref(value))
            most = max(most, sum(reference() is not None for reference in alive))
            return value

        return LazyTensor(tuple(tensor.shape), tensor.dtype, read_it)

    tensors = tensors_of(config)
    counted = Weights(config, {name: lazy(tensor) for name, tensor in tensors.items()}, "a test")
    write(counted, tmp_path / "out", WriteOptions(tensor_parallel=ranks))
    assert most == 1 and len(alive) == len(tensors)


@pytest.mark.parametrize(
    ("ranks", "changes", "told"),
    [
        (3, {}, "--tensor-parallel 3 does not divide the model's 8 heads"),
        (16, {}, "--tensor-parallel 16 does not divide"),
        (0, {}, "--tensor-parallel 0"),
        (1, {"final_norm": "after_query"}, "cannot run a model with final norm after the query layer"),
        (1, {"gelu": "sigmoid"}, "cannot run a model with sigmoid GELU"),
    ],
)
def test_what_the_port_cannot_run_is_not_written(ranks: int, changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    config = config_8(**changes)
    with pytest.raises(InputError, match=told):
        write(weights_of(tensors_of(config), config), tmp_path / "out", WriteOptions(tensor_parallel=ranks))
    assert not (tmp_path / "out").exists()


def test_weights_that_are_changed_in_the_conversion_show(tmp_path: Path) -> None:
    """The comparison of this file can fail."""
    config = config_8()
    tensors = tensors_of(config)
    write(weights_of(tensors, config), tmp_path / "out", WriteOptions(tensor_parallel=2))
    found = read(tmp_path / "out", Overrides())
    name = "transformer.h.1.attn.c_proj.weight"
    transposed = replace(found.tensors[name], read=lambda: tensors[name].T)
    with pytest.raises(AssertionError):
        assert_same(replace(found, tensors={**found.tensors, name: transposed}), tensors)
