"""Checkpoints of the published PyTorch port and of the tools around it: every dialect is read whole, and what is damaged is refused."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.megatron_files import assert_same, config_8, port_files, tensors_of
from torch import Tensor

from pangu.conversion.megatron import DIALECT, FILE, TRACKER, detect, read, write
from pangu.conversion.weights import Overrides, WriteOptions
from pangu.errors import InputError

HEADS = Overrides(num_heads=8)


# --- dialects of other writers ------------------------------------------------------------------------------------------------------------


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
