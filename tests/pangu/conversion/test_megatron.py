"""The published PyTorch port's checkpoints: the original's logits, every number of files out and back bit for bit, and what is refused."""

from __future__ import annotations

import argparse
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.golden import mindspore_name
from helpers.ranks import share
from helpers.small_model import sharp_weights, small_config
from torch import Tensor

from megatron_ext.context import ParallelContext
from megatron_ext.sharding import canonical_parameters
from pangu.config import ModelConfig
from pangu.conversion import megatron
from pangu.conversion.megatron import DIALECT, FILE, TRACKER, detect, read, write
from pangu.conversion.weights import Overrides, Weights, WriteOptions, model_specs
from pangu.errors import InputError
from pangu.model.model import PanguModel
from pangu.tensor_files.lazy_tensor import LazyTensor

HEADS = Overrides(num_heads=8)


def tensors_of(config: ModelConfig) -> dict[str, Tensor]:
    """Tensors none of which is zero or constant, biases included."""
    model = PanguModel(config, ParallelContext(fill=sharp_weights(3)))
    return {spec.name: parameter.detach() for spec, parameter in canonical_parameters(model)}


def weights_of(tensors: dict[str, Tensor], config: ModelConfig, **rest: Any) -> Weights:
    lazy = {name: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor) for name, tensor in tensors.items()}
    return Weights(config, lazy, "a test", **rest)


def config_8(**changes: Any) -> ModelConfig:
    return small_config(num_heads=8, **changes)


def assert_same(found: Weights, expected: dict[str, Tensor]) -> None:
    assert list(found.tensors) == list(expected)
    for name, tensor in expected.items():
        lazy = found.tensors[name]
        value = lazy.read()
        assert (lazy.shape, lazy.dtype) == (tuple(value.shape), value.dtype) == (tuple(tensor.shape), tensor.dtype), name
        assert torch.equal(value, tensor), name


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
    (tmp_path / "vocab.model").write_bytes(b"pieces")
    write(weights_of(tensors_of(config), config, tokenizer=tmp_path / "vocab.model"), tmp_path / "out", WriteOptions())
    assert (tmp_path / "out" / TRACKER).read_text() == "release\n"
    found = read(tmp_path / "out", Overrides())
    assert found.step is None
    assert found.tokenizer is not None and found.tokenizer.read_bytes() == b"pieces"


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


# --- dialects of other writers ------------------------------------------------------------------------------------------------------------


def port_files(
    folder: Path,
    tensors: dict[str, Tensor],
    ranks: int = 1,
    *,
    pad_to: int = 1,
    padding: float = 1.0,
    legacy: bool = False,
    change: Callable[[dict[str, Any]], Any] = lambda root: None,
    **root: Any,
) -> Path:
    """Files as the port and its tools write them, made with torch alone."""
    num_layers = len({name.split(".")[2] for name in tensors if ".h." in name})
    for rank in range(ranks):
        model: dict[str, Any] = {}
        for ours, place in megatron._port_names(num_layers).items():
            tensor = tensors[ours]
            if ours == "transformer.wte.weight":
                missing = -tensor.shape[0] % (pad_to * ranks)
                tensor = torch.cat([tensor, torch.full((missing, tensor.shape[1]), padding, dtype=tensor.dtype)])
            split_dim = SPLIT_DIMS.get(".".join(ours.split(".")[-3:]) if ".h." in ours else ours)
            inner = model
            for section in place[:-1]:
                inner = inner.setdefault(section, {})
            inner[place[-1]] = tensor if split_dim is None else tensor.chunk(ranks, split_dim)[rank].clone()
        values = {"iteration": 5, "model": {"language_model": model}, **root}
        change(values)
        (folder / f"mp_rank_{rank:02d}").mkdir(parents=True)
        torch.save(values, folder / f"mp_rank_{rank:02d}" / FILE, _use_new_zipfile_serialization=not legacy)
    return folder


# What the port cuts along which dimension (facts of the format, written down apart from the code under test).
SPLIT_DIMS = {"transformer.wte.weight": 0, "attn.c_proj.weight": 1, "mlp.c_proj.weight": 1} | {
    f"{layer}.{kind}": 0 for layer in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.c_fc") for kind in ("weight", "bias")
}


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_the_port_are_read(legacy: bool, ranks: int, tmp_path: Path) -> None:
    config = config_8(vocab_size=104)
    tensors = tensors_of(config)
    state = {"args": argparse.Namespace(num_attention_heads=8, openai_gelu=True), "random_rng_state": (3, tuple(range(625)), None)}
    port_files(tmp_path / "iter_0000005", tensors, ranks, legacy=legacy, **state)
    found = read(tmp_path / "iter_0000005", Overrides())
    assert_same(found, tensors)
    assert (found.config.num_heads, found.config.gelu, found.left_out) == (8, "tanh", ("args", "random_rng_state"))


def test_every_path_into_a_checkpoint_leads_to_it(tmp_path: Path) -> None:
    tensors = tensors_of(config_8(vocab_size=104))
    port_files(tmp_path / "run/iter_0000005", tensors, 2)
    for path in ("run", "run/iter_0000005", "run/iter_0000005/mp_rank_00", f"run/iter_0000005/mp_rank_01/{FILE}"):
        assert detect(tmp_path / path), path
        assert_same(read(tmp_path / path, HEADS), tensors)
    (tmp_path / "run" / TRACKER).write_text("5")
    assert_same(read(tmp_path / "run", HEADS), tensors)
    shutil.copytree(tmp_path / "run/iter_0000005", tmp_path / "run/iter_0000009")
    assert_same(read(tmp_path / "run", HEADS), tensors)
    shutil.move(tmp_path / "run/iter_0000005", tmp_path / "run/release")
    (tmp_path / "run" / TRACKER).write_text("release\n")
    assert_same(read(tmp_path / "run", HEADS), tensors)


def test_a_single_file_and_its_other_suffix(tmp_path: Path) -> None:
    tensors = tensors_of(config_8(vocab_size=104))
    folder = port_files(tmp_path / "iter_0000005", tensors)
    shutil.move(folder / "mp_rank_00" / FILE, folder / "mp_rank_00/model_optim_rng.pth")
    assert_same(read(folder, HEADS), tensors)
    shutil.move(folder / "mp_rank_00/model_optim_rng.pth", tmp_path / "pangu.pth")
    assert detect(tmp_path / "pangu.pth")
    assert_same(read(tmp_path / "pangu.pth", HEADS), tensors)
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert not detect(tmp_path / "text.pt") and not detect(tmp_path / "nowhere")
    shutil.rmtree(folder)
    assert not detect(tmp_path)


def test_evolutions_name_of_the_query_embedding(tmp_path: Path) -> None:
    def rename(root: dict[str, Any]) -> None:
        model = root["model"]["language_model"]
        model["task_embedding"] = model.pop("topQueryEmbedding")

    def both(root: dict[str, Any]) -> None:
        model = root["model"]["language_model"]
        model["task_embedding"] = model["topQueryEmbedding"]

    tensors = tensors_of(config_8(vocab_size=104))
    assert_same(read(port_files(tmp_path / "a", tensors, change=rename), HEADS), tensors)
    with pytest.raises(InputError, match="query embedding twice"):
        read(port_files(tmp_path / "b", tensors, change=both), HEADS)


@pytest.mark.parametrize(
    ("stored", "step"),
    [(7, 7), ("iter_0007800", 7800), ("12", 12), (0, None), ("last", None), (True, None), ([3], None)],
)
def test_the_step_in_its_forms(stored: Any, step: int | None, tmp_path: Path) -> None:
    assert read(port_files(tmp_path / "a", tensors_of(config_8()), iteration=stored), HEADS).step == step


def test_the_step_of_very_old_files(tmp_path: Path) -> None:
    def rename(root: dict[str, Any]) -> None:
        root["total_iters"] = root.pop("iteration")

    assert read(port_files(tmp_path / "a", tensors_of(config_8()), change=rename), HEADS).step == 5


# --- vocabularies -------------------------------------------------------------------------------------------------------------------------


def with_vocabulary(rows: int) -> dict[str, Tensor]:
    tensors = tensors_of(config_8(vocab_size=10))
    tensors["transformer.wte.weight"] = torch.randn(rows, 32)
    return tensors


@pytest.mark.parametrize(("ranks", "rows"), [(1, 40064), (2, 40192), (4, 40448), (8, 40960)])
@pytest.mark.parametrize("padding", [1.0, 0.02])
def test_the_published_vocabularys_padding_is_cut(ranks: int, rows: int, padding: float, tmp_path: Path) -> None:
    tensors = with_vocabulary(40000)
    found = read(port_files(tmp_path / "a", tensors, ranks, pad_to=128, padding=padding), HEADS)
    assert f"cut from {rows} padded rows to 40000" in found.source
    assert_same(found, tensors)
    write(found, tmp_path / "out", WriteOptions(tensor_parallel=ranks))
    again = read(tmp_path / "out", Overrides())
    assert_same(again, tensors)
    assert "cut" not in again.source


@pytest.mark.parametrize("rows", [40960, 40192])
def test_padding_outlives_a_merge(rows: int, tmp_path: Path) -> None:
    assert read(port_files(tmp_path / "a", with_vocabulary(rows)), HEADS).config.vocab_size == 40000


@pytest.mark.parametrize("rows", [39936, 40000, 40001, 40100, 40128, 41088, 52224])
def test_other_vocabularies_are_whole(rows: int, tmp_path: Path) -> None:
    tensors = with_vocabulary(rows)
    found = read(port_files(tmp_path / "a", tensors), HEADS)
    assert "cut" not in found.source
    assert_same(found, tensors)


@pytest.mark.parametrize(("multiple", "kept"), [(1, 40960), (128, 40960), (1024, 40000), ("many", 40000)])
def test_the_runs_own_arguments_decide(multiple: Any, kept: int, tmp_path: Path) -> None:
    """40,960 rows are not what one file pads 40,000 to at 1 or 128, so there they are a vocabulary of their own."""
    args = argparse.Namespace(num_attention_heads=8, make_vocab_size_divisible_by=multiple)
    assert read(port_files(tmp_path / "a", with_vocabulary(40960), args=args), Overrides()).config.vocab_size == kept


@pytest.mark.parametrize("size", [100, 103, 0, -1, "101", None, True, 10**30])
def test_a_mark_that_does_not_fit_is_refused(size: Any, tmp_path: Path) -> None:
    """102 rows in two files hold a vocabulary of 101 or 102."""
    tensors = tensors_of(config_8(vocab_size=102))
    folder = port_files(tmp_path / "a", tensors, 2, **{DIALECT: {"vocab_size": size, "num_heads": 8}})
    if type(size) in (int, str):
        with pytest.raises(InputError, match="do not fit"):
            read(folder, Overrides())
    else:
        assert_same(read(folder, Overrides()), tensors)


# --- what is refused ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint of four files, to be spoilt."""
    return port_files(tmp_path / "run/iter_0000005", tensors_of(config_8(vocab_size=104)), 4)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        weights = read(path, HEADS)
        for tensor in weights.tensors.values():
            tensor.read()
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    root = torch.load(file, weights_only=True)
    change(root)
    torch.save(root, file)


def rank_file(folder: Path, rank: int) -> Path:
    return folder / f"mp_rank_{rank:02d}" / FILE


@pytest.mark.parametrize("rank", [0, 2])
def test_a_missing_rank_is_named(rank: int, folder: Path) -> None:
    shutil.rmtree(folder / f"mp_rank_{rank:02d}")
    assert f"mp_rank_{rank:02d} is missing" in refusal(folder)


def test_the_last_rank_is_missed_by_the_shapes(folder: Path) -> None:
    shutil.rmtree(folder / "mp_rank_03")
    assert "has shape" in refusal(folder) or "does not divide" in refusal(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    rank_file(folder, 1).unlink()
    assert "mp_rank_01: holds 0 files" in refusal(folder)


@pytest.mark.parametrize(("text", "told"), [("9", "names '9'"), ("", "names ''"), ("../..", "names '../..'"), ("x" * 10_000, "names 'xxx")])
def test_a_tracker_that_leads_nowhere_is_refused(text: str, told: str, folder: Path) -> None:
    (folder.parent / TRACKER).write_text(text)
    message = refusal(folder.parent)
    assert told in message and "iter_0000005" in message


def test_several_iterations_without_a_tracker_are_refused(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "iter_0000009")
    assert "2 iterations; give the directory" in refusal(folder.parent)


def test_ranks_of_different_iterations_are_refused(folder: Path) -> None:
    edit(rank_file(folder, 1), lambda root: root.update(iteration=9))
    assert "different iterations: 5, 9" in refusal(folder)


def test_a_tensor_that_one_rank_lacks_is_named(folder: Path) -> None:
    edit(rank_file(folder, 1), lambda root: root["model"]["language_model"]["transformer"].pop("final_layernorm.bias"))
    assert "transformer.final_layernorm.bias" in refusal(folder)


def test_a_tensor_that_all_ranks_lack_is_named(tmp_path: Path) -> None:
    def drop(root: dict[str, Any]) -> None:
        del root["model"]["language_model"]["transformer"]["topQueryLayer.mlp.dense_4h_to_h.bias"]

    message = refusal(port_files(tmp_path / "a", tensors_of(config_8()), change=drop))
    assert "lacks transformer.h.2.mlp.c_proj.bias" in message


def test_a_missing_query_layer_is_named(tmp_path: Path) -> None:
    """The last plain block must not be taken for it."""

    def drop(root: dict[str, Any]) -> None:
        transformer = root["model"]["language_model"]["transformer"]
        for name in [name for name in transformer if name.startswith("topQueryLayer.")]:
            del transformer[name]

    assert "lacks transformer.h.2.attn.c_proj.bias and 15 more" in refusal(port_files(tmp_path / "a", tensors_of(config_8()), change=drop))


@pytest.mark.parametrize(("key", "told"), [("topQueryEmbedding", "lacks"), ("embedding", "lacks"), ("transformer", "holds no layers")])
def test_a_missing_part_is_refused(key: str, told: str, tmp_path: Path) -> None:
    assert told in refusal(port_files(tmp_path / "a", tensors_of(config_8()), change=lambda root: root["model"]["language_model"].pop(key)))


def test_a_missing_layer_is_named(tmp_path: Path) -> None:
    def drop(root: dict[str, Any]) -> None:
        transformer = root["model"]["language_model"]["transformer"]
        for name in [name for name in transformer if name.startswith("layers.0.")]:
            del transformer[name]

    assert "lacks transformer.layers.0, but has a layer 1" in refusal(port_files(tmp_path / "a", tensors_of(config_8()), change=drop))


def test_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    def add(root: dict[str, Any]) -> None:
        root["model"]["language_model"]["pooler"] = {"dense": {"weight": torch.ones(2)}}

    message = refusal(port_files(tmp_path / "a", tensors_of(config_8()), change=add))
    assert "holds unknown language_model.pooler.dense.weight" in message


@pytest.mark.parametrize(
    "value", [torch.ones(3, dtype=torch.int64), torch.ones(32), torch.tensor(1.0), "text", None, {"a": {}}, {1: torch.ones(1)}]
)
def test_what_stands_in_a_tensors_place_is_refused(value: Any, tmp_path: Path) -> None:
    def put(root: dict[str, Any]) -> None:
        root["model"]["language_model"]["transformer"]["layers.1.attention.query.weight"] = value

    refusal(port_files(tmp_path / "a", tensors_of(config_8()), change=put))


def test_other_shapes_and_types_in_one_rank_are_refused(folder: Path) -> None:
    name = "layers.1.attention.query.weight"
    for value in (torch.ones(7, 32), torch.ones(8, 32).half()):
        edit(rank_file(folder, 2), lambda root, value=value: root["model"]["language_model"]["transformer"].update({name: value}))
        message = refusal(folder)
        assert "mp_rank_02" in message and name in message


@pytest.mark.parametrize(
    "root", [{}, [], {"model": 1}, {"model": {}}, {"model": {"language_model": []}}, {"model": {"language_model": {}}}]
)
def test_another_file_of_torch_is_refused(root: Any, tmp_path: Path) -> None:
    torch.save(root, tmp_path / "file.pt")
    message = refusal(tmp_path / "file.pt")
    assert str(tmp_path / "file.pt") in message


def test_many_layers_of_nothing_are_refused_at_once(tmp_path: Path) -> None:
    tensors = {f"layers.{number}.attention.query.bias": torch.ones(1) for number in range(3000)}
    torch.save({"model": {"language_model": {"transformer": tensors}}}, tmp_path / "file.pt")
    assert "3000 layers besides the query layer, but just 3000 tensors" in refusal(tmp_path / "file.pt")


@pytest.mark.parametrize("mark", [{"gelu": "relu"}, {"final_norm": "nowhere"}, {"num_heads": 7}, {"num_heads": "eight"}, {"num_heads": -4}])
def test_a_mark_that_says_nonsense_is_refused(mark: dict[str, Any], tmp_path: Path) -> None:
    folder = port_files(tmp_path / "a", tensors_of(config_8()), **{DIALECT: mark})
    with pytest.raises(InputError) as error:
        read(folder, Overrides())
    assert "\n" not in str(error.value)


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
