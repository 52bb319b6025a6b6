"""Weights directories: every layout writes the same bits, every rank reads its slice of them, and what is damaged is refused in a line."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.harness import run_distributed
from helpers.layouts import random_batches
from helpers.layouts import small_config as small_run
from helpers.ranks import share
from helpers.small_model import sharp_weights, small_config
from helpers.tiny_tokenizer import tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ext.collectives import world_size
from megatron_ext.context import ParallelContext
from megatron_ext.sharding import ShardSpec, canonical_parameters
from megatron_ext.supervision import rendezvous
from megatron_ext.topology import Groups, Topology
from pangu.config import ModelConfig
from pangu.config.layout import resolve
from pangu.conversion import export, huggingface
from pangu.conversion.export import write_weights
from pangu.conversion.huggingface import CONFIG, INDEX, TOKENIZER
from pangu.conversion.weights import Overrides, Weights, WriteOptions, model_specs
from pangu.engine.engine import TrainingEngine
from pangu.errors import InputError
from pangu.model.model import PanguModel

ALONE = Groups.from_topology(Topology(tensor=1, pipeline=1, data=1), 0)
WTE, BIAS, NORM = "transformer.wte.weight", "transformer.h.1.attn.c_proj.bias", "transformer.ln_f.weight"


def weights_of(config: ModelConfig) -> dict[str, Tensor]:
    """Tensors none of which is zero or constant, biases included."""
    model = PanguModel(config, ParallelContext(fill=sharp_weights(3)))
    return {spec.name: parameter.detach() for spec, parameter in canonical_parameters(model)}


def write(path: Path, config: ModelConfig | None = None, dtype: torch.dtype = torch.float32, **arguments: Any) -> dict[str, Tensor]:
    """Write a small model's weights; returns them."""
    config = config or small_config()
    tensors = {name: tensor.to(dtype) for name, tensor in weights_of(config).items()}
    specs = model_specs(config)
    write_weights(path, config, ALONE, ((specs[name], partial(nullcontext, tensor)) for name, tensor in tensors.items()), **arguments)
    return tensors


def stored(path: Path) -> dict[str, Tensor]:
    """All tensors of a directory, read without the code under test."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def opened(path: Path) -> Weights:
    return huggingface.read(path, Overrides())


def read(weights: Weights, spec: ShardSpec, rank: int = 0, size: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    local = torch.full(spec.local_shape(size), math.nan, dtype=dtype)  # what is not written shows
    weights.fill(local, spec, rank, size)
    return local


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [101, 10])
def test_each_rank_reads_its_slice_of_what_was_written(vocab_size: int, size: int, tmp_path: Path) -> None:
    """Over four ranks 101 ids leave the last one padding, and 10 ids fill 3, 3, 3 and 1 rows."""
    tensors = write(tmp_path / "weights", small_config(vocab_size=vocab_size))
    weights = opened(tmp_path / "weights")
    for name, spec in model_specs(weights.config).items():
        for rank in range(size):
            expected = tensors[name] if spec.split_dim is None else share(tensors[name], rank, size, spec.split_dim)
            assert torch.equal(read(weights, spec, rank, size), expected), (name, rank)


def test_a_rank_with_nothing_but_padding_reads_zeros(tmp_path: Path) -> None:
    write(tmp_path / "weights", small_config(vocab_size=10))
    weights = opened(tmp_path / "weights")
    spec = model_specs(weights.config)[WTE]
    assert spec.offset(7, 8) >= 10
    assert (read(weights, spec, 7, 8) == 0).all()


def test_values_are_cast_to_the_slices_type(tmp_path: Path) -> None:
    tensors = write(tmp_path / "weights", dtype=torch.bfloat16)
    weights = opened(tmp_path / "weights")
    for name, spec in model_specs(weights.config).items():
        assert torch.equal(read(weights, spec), tensors[name].float())
        assert torch.equal(read(weights, spec, dtype=torch.bfloat16), tensors[name])
    assert json.loads((tmp_path / "weights" / CONFIG).read_text())["dtype"] == "bfloat16"


def test_others_may_read_the_files(directory: Path) -> None:
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in directory.iterdir())


@pytest.mark.parametrize("sizes", [{}, {"gelu": "erf"}, {"gelu": "sigmoid", "final_norm": "after_query"}, {"ffn_hidden_size": 48}])
def test_the_model_is_described_in_huggingfaces_words(sizes: dict[str, Any], tmp_path: Path) -> None:
    config = small_config(**sizes)
    write(tmp_path / "weights", config)
    values = json.loads((tmp_path / "weights" / CONFIG).read_text())
    described = {
        "model_type": "gpt_pangu",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "activation_function": {"tanh": "gelu_new", "erf": "gelu", "sigmoid": "quick_gelu"}[config.gelu],
        "final_norm": config.final_norm,
        "eos_token_id": 9,
        "pad_token_id": 6,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    assert described.items() <= values.items()
    assert opened(tmp_path / "weights").config == config


def test_many_files_hold_what_the_index_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 8_000)
    path = tmp_path / "weights"
    tensors = write(path)
    index = json.loads((path / INDEX).read_text())
    files = sorted(file.name for file in path.glob("*.safetensors"))
    assert len(files) > 5
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert sorted(set(index["weight_map"].values())) == files
    largest = max(tensor.nbytes for tensor in tensors.values())
    for file in files:
        with safe_open(path / file, "pt") as content:
            assert set(content.keys()) == {name for name, where in index["weight_map"].items() if where == file}
            assert content.metadata() == {"format": "pt"}
        assert (path / file).stat().st_size < 8_000 + largest + 8_000  # and a header
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert_same(stored(path), tensors)
    weights = opened(path)
    assert_same({name: read(weights, spec) for name, spec in model_specs(weights.config).items()}, tensors)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_converters_writer_writes_the_same_directory(dtype: torch.dtype | None, directory: Path, tmp_path: Path) -> None:
    """It makes the files itself, tensor by tensor; safetensors' own reader reads them."""
    source = opened(directory)
    huggingface.write(source, tmp_path / "converted", WriteOptions(dtype=dtype))
    expected = {name: tensor.to(dtype or tensor.dtype) for name, tensor in stored(directory).items()}
    assert_same(stored(tmp_path / "converted"), expected)
    index = json.loads((tmp_path / "converted" / INDEX).read_text())
    files = sorted(file.name for file in (tmp_path / "converted").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files and len(files) > 5
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    again = opened(tmp_path / "converted")
    assert (again.config, again.dtype) == (source.config, dtype or torch.float32)


def test_a_single_file_without_an_index_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    tensors = write(path)
    (path / INDEX).unlink()
    next(path.glob("*.safetensors")).rename(path / "model.safetensors")
    weights = opened(path)
    assert_same({name: read(weights, spec) for name, spec in model_specs(weights.config).items()}, tensors)


# --- layouts -----------------------------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {"parallel": {"zero_stage": 0}}),
    "tensor 2 x pipeline 2": (4, {"parallel": {"tensor": 2, "pipeline": 2}}),
    "data 2, ZeRO-3": (2, {"parallel": {"zero_stage": 3}}),
    "tensor 2, bf16": (2, {"parallel": {"tensor": 2}, "train": {"precision": "bf16"}}),
}


def export_twice(directory: str, sections: dict[str, Any]) -> None:
    """Write the weights of a run before and after its first step."""
    huggingface.SHARD_BYTES = 8_000
    config = small_run(**sections)
    rendezvous.initialize(60)
    groups = Groups.create((layout := resolve(config, world_size())).topology)
    engine = TrainingEngine(config, layout, groups, sharp_weights(3))

    def write_as(name: str) -> None:
        parameters = ((spec, partial(engine.whole, parameter)) for spec, parameter in canonical_parameters(engine.module))
        write_weights(Path(directory) / name, config.model, groups, parameters)

    write_as("initial")
    engine.train_step(random_batches(config, groups), 1e-2)
    write_as("trained")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each layout's weights under its name."""
    root = tmp_path_factory.mktemp("layouts")
    for layout, (ranks, sections) in LAYOUTS.items():
        run_distributed(export_twice, ranks, str(root / layout), sections)
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_writes_the_initial_bits(layout: str, exported: Path) -> None:
    dtype = torch.bfloat16 if "bf16" in layout else torch.float32
    expected = {name: tensor.to(dtype) for name, tensor in weights_of(small_run().model).items()}
    path = exported / layout / "initial"
    assert_same(stored(path), expected)
    # No tensor is there twice, the tied one of a pipeline's last stage included.
    names = []
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            names += content.keys()
    assert sorted(names) == sorted(expected)
    assert opened(path).dtype == dtype


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "one process"])
def test_every_layout_writes_what_it_has_learned(layout: str, exported: Path) -> None:
    found, expected = stored(exported / layout / "trained"), stored(exported / "one process" / "trained")
    before, expected_before = stored(exported / layout / "initial"), stored(exported / "one process" / "initial")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if "k_proj.bias" in name:
            continue  # its true gradient is zero: what Adam makes of rounding noise differs by layout
        assert (tensor - expected_before[name]).abs().max() > 4e-3, name
        assert not torch.equal(found[name], before[name]), name
        if found[name].dtype == torch.float32:  # in bf16, rounding turns the sign of small gradients and with it Adam's first step
            error = (found[name] - tensor).abs()
            assert error.mean() < 1e-5 and error.max() < 1e-3, name


# --- what is refused ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good directory of several files, to be spoilt."""
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 8_000)
    write(tmp_path / "weights")
    return tmp_path / "weights"


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def file_of(directory: Path, name: str) -> Path:
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][name]


def rewrite(directory: Path, name: str, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the file that holds a tensor."""
    tensors = load_file(file_of(directory, name))
    change(tensors)
    save_file(tensors, file_of(directory, name))


def refusal(directory: Path) -> str:
    """The one line with which a directory is refused, when it is opened or when all of it is read."""
    with pytest.raises(InputError) as error:
        weights = opened(directory)
        for spec in model_specs(weights.config).values():
            read(weights, spec)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_unspoilt_directory_is_read(directory: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        refusal(directory)


def test_a_missing_tensor_is_refused(directory: Path) -> None:
    edit_json(directory / INDEX, lambda index: [index["weight_map"].pop(name) for name in (BIAS, NORM)])
    message = refusal(directory)
    assert message.startswith(f"{directory}: lacks {BIAS} and 1 more; ") and "53 tensors" in message


def add(directory: Path, name: str, tensor: Tensor) -> None:
    """Put one more tensor into a file and the index."""
    rewrite(directory, WTE, lambda tensors: tensors.update({name: tensor.contiguous()}))
    edit_json(directory / INDEX, lambda index: index["weight_map"].update({name: index["weight_map"][WTE]}))


def test_an_unknown_tensor_is_refused(directory: Path) -> None:
    add(directory, "transformer.h.1.attn.rotary", torch.ones(3))
    assert "holds unknown transformer.h.1.attn.rotary; " in refusal(directory)


def test_an_output_layer_may_be_there_if_it_is_the_word_embedding(directory: Path) -> None:
    words = stored(directory)[WTE]
    add(directory, "lm_head.weight", words.clone())
    assert opened(directory).left_out == ("lm_head.weight",)
    words[-1, -1] += 1e-3
    add(directory, "lm_head.weight", words)
    assert "lm_head.weight differs from transformer.wte.weight" in refusal(directory)


def test_another_shape_is_refused(directory: Path) -> None:
    rewrite(directory, BIAS, lambda tensors: tensors.update({BIAS: tensors[BIAS][:-1].clone()}))
    message = refusal(directory)
    assert f"{directory}: {BIAS} has shape [31], expected [32]" in message


@pytest.mark.parametrize("where", ["../elsewhere.safetensors", "/etc/passwd", "sub/file.safetensors", "..", "", 7, None, ["a"]])
def test_an_index_that_points_out_of_the_directory_is_refused(where: Any, directory: Path) -> None:
    shutil.copy(file_of(directory, WTE), directory.parent / "elsewhere.safetensors")
    edit_json(directory / INDEX, lambda index: index["weight_map"].update({WTE: where}))
    message = refusal(directory)
    assert "expected the name of a file beside it" in message and WTE in message


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', "\ufffd"])
def test_an_index_that_is_none_is_refused(text: str, directory: Path) -> None:
    (directory / INDEX).write_bytes(text.encode("utf-16"))
    assert "not an index of" in refusal(directory)
    (directory / INDEX).write_text(text)
    assert "not an index of" in refusal(directory)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(keep: int, directory: Path) -> None:
    victim = file_of(directory, WTE)
    victim.write_bytes(victim.read_bytes()[:keep])
    message = refusal(directory)
    assert str(victim) in message and "Copy or convert the weights again" in message


def test_a_lost_file_is_refused(directory: Path) -> None:
    victim = file_of(directory, WTE)
    victim.unlink()
    assert str(victim) in refusal(directory)


def test_a_file_without_the_tensor_that_the_index_promises_is_refused(directory: Path) -> None:
    rewrite(directory, BIAS, lambda tensors: tensors.pop(BIAS))
    message = refusal(directory)
    assert str(file_of(directory, BIAS)) in message and BIAS in message


@pytest.mark.parametrize("missing", [CONFIG, "model.safetensors"])
def test_a_directory_that_holds_no_weights_is_refused(missing: str, directory: Path) -> None:
    (directory / INDEX).unlink()
    if missing == CONFIG:
        (directory / CONFIG).unlink()
    assert f"{directory / missing}: cannot be read" in refusal(directory)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "gpt2"}, '"model_type": "gpt_pangu"'),
        ({"activation_function": "relu"}, "activation_function = 'relu'; expected one of gelu_new, gelu_pytorch_tanh"),
        ({"activation_function": ["gelu"]}, "activation_function = ['gelu']"),
        ({"hidden_size": "32"}, "hidden_size = '32'"),
        ({"hidden_size": 64}, "hidden_size = 64, but its tensors have 32"),
        ({"num_layers": 0}, "num_layers = 0"),
        ({"num_layers": 5}, "num_layers = 5, but its tensors have 3"),
        ({"vocab_size": 102}, "vocab_size = 102, but its tensors have 101"),
        ({"num_heads": 5}, "num_heads = 5 does not divide"),
        ({"num_heads": None}, "--heads"),
        ({"final_norm": "nowhere"}, "final_norm = 'nowhere'"),
        ({"max_position_embeddings": -1}, "max_position_embeddings = -1"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon = 1e-06"),
        ({"resid_pdrop": 1.5}, "resid_pdrop = 1.5"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change: dict[str, Any], told: str, directory: Path) -> None:
    edit_json(directory / CONFIG, lambda values: values.update(change))
    message = refusal(directory)
    assert told in message and "input_value" not in message and len(message) < 400


@pytest.mark.parametrize("text", ["", "{", "[]", '"gpt_pangu"', "\xff\xfe"])
def test_a_config_that_is_no_object_is_refused(text: str, directory: Path) -> None:
    (directory / CONFIG).write_bytes(text.encode("latin-1"))
    assert str(directory / CONFIG) in refusal(directory)


# --- writing, whole or not at all --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["write_tensors", "publish", "_config_json"])
def test_a_writer_that_fails_leaves_what_was_there(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 8_000)
    path = tmp_path / "weights"
    calls = []
    home = export if fails == "publish" else huggingface
    original = getattr(home, fails)

    def failing(*arguments: Any, **keywords: Any) -> Any:
        calls.append(fails)
        if len(calls) == (3 if fails == "write_tensors" else 1):
            raise OSError("No space left on device")
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(home, fails, failing)
        with pytest.raises(InputError, match=r"could not be written .*No space"):
            write(path)
    assert not path.exists()
    first = write(path, small_config(vocab_size=11))
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(home, fails, failing)
        with pytest.raises(InputError, match=r"could not be written .*No space"):
            write(path)
    opened(path)
    assert_same(stored(path), first)
    second = write(path)
    assert_same(stored(path), second)
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights"]  # nothing of the failed attempts stays


def test_the_tokenizer_is_put_beside_the_weights(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    model = tmp_path / "tokenizer" / TOKENIZER
    model.write_bytes(tiny_model())
    for number, given in enumerate((model, model.parent)):
        write(tmp_path / str(number), tokenizer=given)
        assert (tmp_path / str(number) / TOKENIZER).read_bytes() == tiny_model()
    write(tmp_path / "without")
    assert not (tmp_path / "without" / TOKENIZER).exists()
