"""Copies of PanGu-α that others have published: their names, files and leftovers are understood, and what is another model is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.golden import golden_batch, golden_model
from helpers.small_model import sharp_weights, small_config
from helpers.tiny_tokenizer import tiny_model
from safetensors.torch import save_file
from torch import Tensor

from megatron_ext.context import ParallelContext
from megatron_ext.sharding import canonical_parameters
from pangu.config import ModelConfig
from pangu.conversion import huggingface
from pangu.conversion.formats import detect_format
from pangu.conversion.weights import Overrides, Weights, WriteOptions, model_specs
from pangu.errors import InputError
from pangu.model.model import PanguModel

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
Tensors = dict[str, Tensor]


def tensors_of(**sizes: Any) -> Tensors:
    model = PanguModel(small_config(**sizes), ParallelContext(fill=sharp_weights(3)))
    return {spec.name: parameter.detach() for spec, parameter in canonical_parameters(model)}


def describe(tensors: Tensors, **changes: Any) -> dict[str, Any]:
    """config.json as the community's configuration class saves it."""
    return {
        "model_type": "gpt_pangu",
        "architectures": ["GPTPanguForCausalLM"],
        "activation_function": "gelu",
        "attn_pdrop": 0.1,
        "bos_token_id": 9,
        "embd_pdrop": 0.1,
        "eos_token_id": 9,
        "hidden_size": 32,
        "intermediate_size": None,
        "layer_norm_epsilon": 1e-05,
        "max_position_embeddings": 24,
        "num_heads": 4,
        "num_layers": 3,
        "pad_token_id": 6,
        "resid_pdrop": 0.1,
        "scale_attn_weights": True,
        "vocab_size": tensors[WTE].shape[0] if WTE in tensors else 101,
        **changes,
    }


def publish(path: Path, tensors: Tensors, *, kind: str = "bin", files: int = 1, **config: Any) -> Path:
    """A directory as others save one, in one file or in several with an index."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(describe(tensors, **config)))
    stem = "pytorch_model" if kind == "bin" else "model"
    names = list(tensors)
    weight_map = {}
    for number in range(files):
        part = {name: tensors[name].contiguous().clone() for name in names[number::files]}
        file = f"{stem}.{kind}" if files == 1 else f"{stem}-{number + 1:05d}-of-{files:05d}.{kind}"
        if kind == "bin":
            torch.save(part, path / file)
        else:
            save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    if files > 1:
        (path / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def read(path: Path, **overrides: Any) -> Weights:
    return huggingface.read(path, Overrides(**overrides))


def assert_holds(weights: Weights, tensors: Tensors) -> None:
    """Every tensor bit for bit, read whole and in slices."""
    assert list(weights.tensors) == list(model_specs(weights.config)) and weights.tensors.keys() == tensors.keys()
    for name, spec in model_specs(weights.config).items():
        assert torch.equal(weights.tensors[name].read(), tensors[name]), name
        for rank in range(2):
            local = torch.full(spec.local_shape(2), torch.nan)
            weights.fill(local, spec, rank, 2)
            assert torch.equal(local, spec.slice(tensors[name], rank, 2)), name


def rename(tensors: Tensors, pattern: str, replacement: str) -> Tensors:
    return {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}


def with_buffers(tensors: Tensors) -> Tensors:
    buffers = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 24, 24, dtype=torch.uint8).tril() for i in range(3)}
    return tensors | buffers | {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}


DIALECTS: dict[str, Callable[[Tensors], Tensors]] = {
    "plain": lambda tensors: tensors,
    "out_proj": lambda tensors: rename(tensors, r"attn\.c_proj", "attn.out_proj"),
    "buffers": with_buffers,
    "a copy of the output layer": lambda tensors: tensors | {HEAD: tensors[WTE]},
    "without the output layer's wrapping": lambda tensors: rename(tensors, r"^transformer\.", ""),
    "of a data-parallel module": lambda tensors: rename(tensors, "^", "module."),
    "all of it": lambda tensors: with_buffers(rename(tensors | {HEAD: tensors[WTE]}, r"attn\.c_proj", "attn.out_proj")),
}


@pytest.mark.parametrize(("kind", "files"), [("bin", 1), ("bin", 3), ("safetensors", 1), ("safetensors", 3)])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_read_bit_for_bit(dialect: str, kind: str, files: int, tmp_path: Path) -> None:
    tensors = tensors_of()
    path = publish(tmp_path / "copy", DIALECTS[dialect](tensors), kind=kind, files=files)
    assert detect_format(path) == "huggingface"
    weights = read(path)
    assert_holds(weights, tensors)
    assert weights.source.startswith(f"HuggingFace directory ({kind}); published by others")
    expected = {"buffers": 6, "a copy of the output layer": 1, "all of it": 7}.get(dialect, 0)
    assert len(weights.left_out) == expected
    assert (HEAD in weights.source) == (HEAD in weights.left_out)
    assert ("out_proj" in weights.source) == (dialect in ("out_proj", "all of it"))


def test_what_is_read_is_written_and_read_again(tmp_path: Path) -> None:
    tensors = tensors_of()
    weights = read(publish(tmp_path / "copy", DIALECTS["all of it"](tensors)))
    huggingface.write(weights, tmp_path / "ours", WriteOptions())
    again = read(tmp_path / "ours")
    assert_holds(again, tensors)
    assert again.config == weights.config and again.left_out == () and "others" not in again.source


def test_legacy_files_and_half_precision(tmp_path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in tensors_of().items()}
    path = publish(tmp_path / "copy", tensors)
    torch.save(tensors, path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    weights = read(path)
    assert weights.dtype == torch.float16
    assert all(torch.equal(weights.tensors[name].read(), tensor) for name, tensor in tensors.items())


# --- the dialect of the function ---------------------------------------------------------------------------------------------------------


def test_the_activation_is_what_the_copy_says_and_the_user_is_told(tmp_path: Path) -> None:
    path = publish(tmp_path / "copy", tensors_of())
    weights = read(path)
    assert (weights.config.gelu, weights.config.final_norm) == ("erf", "before_query")
    assert "ALTHOUGH THE RELEASED WEIGHTS WERE TRAINED WITH tanh" in weights.source and "--gelu tanh" in weights.source
    told = read(path, gelu="tanh")
    assert told.config.gelu == "tanh" and "ALTHOUGH" not in told.source
    huggingface.write(told, tmp_path / "ours", WriteOptions())
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["activation_function"] == "gelu_new"
    for name, gelu in (("gelu_new", "tanh"), ("gelu_pytorch_tanh", "tanh"), ("quick_gelu", "sigmoid")):
        other = read(publish(tmp_path / name, tensors_of(), activation_function=name))
        assert other.config.gelu == gelu and "ALTHOUGH" not in other.source


def test_our_own_erf_is_nobodys_mistake(tmp_path: Path) -> None:
    weights = read(publish(tmp_path / "copy", tensors_of()))
    huggingface.write(weights, tmp_path / "ours", WriteOptions())
    assert read(tmp_path / "ours").config.gelu == "erf" and "ALTHOUGH" not in read(tmp_path / "ours").source


@pytest.mark.parametrize(("gelu", "error"), [("tanh", 5e-5), ("erf", 1e-2)])
def test_a_copy_has_the_originals_logits_with_the_originals_activation(gelu: str, error: float, shared: Path, tmp_path: Path) -> None:
    """With erf it has not: the difference that the warning is about."""
    expected = np.load(shared / "oracle/A/case_plain.npz")
    tensors = {spec.name: parameter.detach() for spec, parameter in canonical_parameters(golden_model(shared))}
    sizes = {"hidden_size": 64, "max_position_embeddings": 32}
    weights = read(publish(tmp_path / "copy", DIALECTS["all of it"](tensors), **sizes), gelu=gelu)
    model = PanguModel(weights.config, ParallelContext(fill=weights.fill)).eval()
    tokens, position_ids, *_ = golden_batch(expected)
    with torch.no_grad():
        difference = (model.logits(tokens, position_ids) - torch.from_numpy(expected["logits"])).abs().max()
    assert difference < error and (gelu == "tanh") == (difference < 1e-3)


# --- padded vocabularies -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [40064, 40192, 40448, 40960])
def test_a_padded_vocabulary_is_cut_to_the_published_one(rows: int, tmp_path: Path) -> None:
    tensors = tensors_of(vocab_size=rows)
    weights = read(publish(tmp_path / "copy", tensors | {HEAD: tensors[WTE]}))
    assert weights.config.vocab_size == 40000 and f"from {rows} to the published 40000" in weights.source
    assert_holds(weights, tensors | {WTE: tensors[WTE][:40000]})


@pytest.mark.parametrize("rows", [101, 39936, 40000, 40001, 40128])
def test_another_vocabulary_is_left_alone(rows: int, tmp_path: Path) -> None:
    weights = read(publish(tmp_path / "copy", tensors_of(vocab_size=rows)))
    assert weights.config.vocab_size == rows and "vocabulary" not in weights.source


def test_our_own_vocabulary_of_that_size_is_left_alone(tmp_path: Path) -> None:
    weights = read(publish(tmp_path / "copy", tensors_of(vocab_size=40064), final_norm="before_query"))
    assert weights.config.vocab_size == 40064


# --- what is refused ---------------------------------------------------------------------------------------------------------------------


def changed(change: Callable[[Tensors], Any]) -> Tensors:
    tensors = tensors_of()
    change(tensors)
    return tensors


REFUSED: dict[str, tuple[Callable[[Tensors], Any], dict[str, Any], str]] = {
    "another output layer": (lambda t: t.update({HEAD: t[WTE] + 1e-3}), {}, "lm_head.weight differs from transformer.wte.weight"),
    "one number of it": (lambda t: t.update({HEAD: t[WTE].index_fill(0, torch.tensor([100]), 1.0)}), {}, "lm_head.weight differs"),
    "an output layer of another size": (lambda t: t.update({HEAD: t[WTE][:-1]}), {}, "lm_head.weight differs"),
    "no query layer's MLP": (  # as one published copy of 13B
        lambda t: [t.pop(name) for name in list(t) if name.startswith("transformer.h.2.mlp.")],
        {},
        "lacks transformer.h.2.mlp.c_fc.bias and 3 more; a model of 3 layers has 53 tensors",
    ),
    "no query embedding": (lambda t: t.pop("transformer.wqe.weight"), {}, "lacks transformer.wqe.weight"),
    "no word embedding": (lambda t: t.pop(WTE), {}, "lacks transformer.wte.weight"),
    "the same twice": (
        lambda t: t.update({"transformer.h.0.attn.out_proj.bias": t["transformer.h.0.attn.c_proj.bias"]}),
        {},
        "holds transformer.h.0.attn.c_proj.bias twice",
    ),
    "something else": (lambda t: t.update({"score.weight": torch.ones(2, 32)}), {}, "holds unknown score.weight"),
    "integers": (lambda t: t.update({WTE: t[WTE].to(torch.int8)}), {}, "transformer.wte.weight is int8; expected floating point"),
    "more layers than there are": (lambda t: None, {"num_layers": 4}, "says num_layers = 4, but its tensors have 3"),
    "another activation": (lambda t: None, {"activation_function": "silu"}, "activation_function = 'silu'"),
    "another epsilon": (lambda t: None, {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon = 1e-06; PanGu-α has 1e-05"),
    "scores that are not scaled": (lambda t: None, {"scale_attn_weights": False}, "scale_attn_weights = False; PanGu-α has True"),
    "several separators": (lambda t: None, {"eos_token_id": [8, 9]}, "eos_token_id = [8, 9]; expected a whole number"),
    "no activation": (lambda t: None, {"activation_function": None}, "activation_function = None"),
}


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_the_whole_of_one_model_is_refused(what: str, kind: str, tmp_path: Path) -> None:
    change, config, told = REFUSED[what]
    path = publish(tmp_path / "copy", changed(change), kind=kind, **config)
    with pytest.raises(InputError, match=re.escape(told)) as error:
        read(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_hostile_pickle_is_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "was run",))

    path = publish(tmp_path / "copy", tensors_of())
    torch.save({**tensors_of(), "x": Hostile()}, path / "pytorch_model.bin")
    with pytest.raises(InputError, match="not a flat table of tensors"):
        read(path)
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize("root", [[1, 2], {"state_dict": {}, "step": 3}, {1: torch.ones(2)}, None])
def test_a_pickle_of_something_else_is_refused(root: Any, tmp_path: Path) -> None:
    path = publish(tmp_path / "copy", tensors_of())
    torch.save(root, path / "pytorch_model.bin")
    with pytest.raises(InputError, match="not a flat table of tensors"):
        read(path)


def test_the_heads_come_from_the_size_or_from_the_user(tmp_path: Path) -> None:
    path = publish(tmp_path / "copy", tensors_of(), num_heads=None)
    with pytest.raises(InputError, match="--heads"):
        read(path)
    assert read(path, num_heads=8).config.num_heads == 8


def test_safetensors_win_over_an_old_file_beside_them(tmp_path: Path) -> None:
    path = publish(tmp_path / "copy", tensors_of(), kind="safetensors")
    torch.save({"old": torch.ones(1)}, path / "pytorch_model.bin")
    assert "(safetensors)" in read(path).source


def test_only_the_slice_is_read(tmp_path: Path) -> None:
    """A tensor-parallel rank never asks a file for a whole tensor that it holds a part of."""
    weights = read(publish(tmp_path / "copy", tensors_of(), kind="safetensors"))
    reads: list[str] = []
    for name, tensor in weights.tensors.items():
        object.__setattr__(tensor, "read", lambda name=name, read=tensor.read: reads.append(name) or read())
    specs: dict[str, Any] = model_specs(weights.config)
    for spec in specs.values():
        weights.fill(torch.empty(spec.local_shape(4)), spec, 1, 4)
    assert set(reads) == {name for name, spec in specs.items() if spec.split_dim is None}


# --- writing -----------------------------------------------------------------------------------------------------------------------------


def test_no_file_is_larger_than_it_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = read(publish(tmp_path / "copy", tensors_of()))
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 20_000)
    huggingface.write(weights, tmp_path / "ours", WriteOptions())
    sizes = [file.stat().st_size for file in sorted((tmp_path / "ours").glob("*.safetensors"))]
    assert len(sizes) >= 8 and all(size < 20_000 + 6_000 for size in sizes)  # the header comes on top
    assert_holds(read(tmp_path / "ours"), tensors_of())


def test_the_code_for_transformers_lies_beside_the_weights(tmp_path: Path) -> None:
    path = publish(tmp_path / "copy", tensors_of())
    (path / "vocab.model").write_bytes(tiny_model())
    huggingface.write(read(path), tmp_path / "ours", WriteOptions())
    written = {file.name for file in (tmp_path / "ours").iterdir()}
    code = {file.name for file in huggingface.REMOTE_CODE.glob("*.py")}
    assert code == {"configuration_pangu.py", "modeling_pangu.py", "tokenization_pangu.py"}
    assert written >= code | {"config.json", "tokenizer_config.json", "vocab.model"}
    for name in code:
        assert (tmp_path / "ours" / name).read_bytes() == (huggingface.REMOTE_CODE / name).read_bytes()
    assert (tmp_path / "ours" / "vocab.model").read_bytes() == tiny_model()
    for file, key in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")):
        reference = json.loads((tmp_path / "ours" / file).read_text())["auto_map"][key]
        module, name = (reference if isinstance(reference, str) else reference[0]).split(".")
        assert f"class {name}(" in (tmp_path / "ours" / f"{module}.py").read_text()


def test_a_copy_of_ours_is_ours(tmp_path: Path) -> None:
    config = ModelConfig(**{**small_config().model_dump(), "hidden_dropout": 0.0, "attention_dropout": 0.25, "final_norm": "after_query"})
    weights = read(publish(tmp_path / "copy", tensors_of()))
    huggingface.write(Weights(config, weights.tensors, "a test"), tmp_path / "ours", WriteOptions())
    shutil.copytree(tmp_path / "ours", tmp_path / "again")
    assert read(tmp_path / "again").config == config
