"""What an inspection finds: every problem at once, in every format, and nothing in what is sound."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.harness import run_distributed
from helpers.layouts import random_batches, small_config, start
from helpers.manifests import edit_manifest
from helpers.mindspore_bytes import checkpoint, strategy
from safetensors.torch import load_file, save_file
from torch import Tensor

from pangu.config import ModelConfig
from pangu.conversion import huggingface, inspection, mindspore
from pangu.conversion.convert import convert
from pangu.conversion.formats import open_weights
from pangu.conversion.inspection import Inspection, bytes_to_verify, look, measure, verify
from pangu.conversion.weights import Overrides, Weights, WriteOptions, model_specs
from pangu.errors import InputError
from pangu.tensor_files.lazy_tensor import LazyTensor
from pangu.training.checkpoint import Progress, save_checkpoint

Tensors = dict[str, Tensor]
FORMATS = ["huggingface", "npy", "mindspore", "megatron"]
CONFIG = ModelConfig(num_layers=3, hidden_size=32, num_heads=4, vocab_size=50, max_positions=16)
WTE, GAIN, BIAS = "transformer.wte.weight", "transformer.h.1.ln_1.weight", "transformer.h.0.mlp.c_fc.bias"
QUERY, OUT = "transformer.h.2.attn.q_proj.weight", "transformer.h.2.mlp.c_proj.weight"


def tensors_of(dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(spec.shape, generator=generator).to(dtype) for name, spec in model_specs(CONFIG).items()}


def written(path: Path, name: str, tensors: Tensors) -> Path:
    """A checkpoint in a format; megatron's in two files."""
    lazy = {key: LazyTensor(tuple(value.shape), value.dtype, lambda value=value: value) for key, value in tensors.items()}
    convert(Weights(CONFIG, lazy, "made here"), name, path, WriteOptions(tensor_parallel=2))
    return path


def changed(path: Path, name: str, change: Callable[[Tensors], Any]) -> Path:
    """A checkpoint whose stored tensors were changed, by the format's own names for those of `CONFIG`. The megatron one is of one file."""
    if name == "megatron":
        convert(open_weights(written(path.with_name("split"), name, tensors_of())), name, path, WriteOptions())
        (file,) = path.rglob("*.pt")
        root = torch.load(file, weights_only=True)
        flat = {(*place[:-1], place[-1]): ours for ours, place in _megatron_places().items()}
        stored = {ours: _follow(root, place) for place, ours in flat.items()}
        before = dict(stored)
        change(stored)
        for ours in before.keys() | stored.keys():
            *place, last = _megatron_places().get(ours, ("transformer", ours))
            inner = _follow(root, place)
            inner.pop(last, None)
            if ours in stored:
                inner[last] = stored[ours]
        torch.save(root, file)
        return path
    tensors = tensors_of()
    change(tensors)
    if name == "huggingface":
        written(path, name, tensors_of())
        for file in path.glob("*.safetensors*"):
            file.unlink()
        save_file(tensors, path / "model.safetensors")
        return path
    names = mindspore.file_names(CONFIG)
    arrays = {
        names.get(ours, ours): (value.T if ours.endswith(mindspore._TRANSPOSED) else value).contiguous().numpy()
        for ours, value in tensors.items()
    }
    if name == "mindspore":
        path.write_bytes(checkpoint(arrays))
    else:
        path.mkdir()
        for key, array in arrays.items():
            np.save(path / f"{key}.npy", array)
    return path


def _megatron_places() -> dict[str, tuple[str, ...]]:
    from pangu.conversion.megatron import _port_names

    return _port_names(CONFIG.num_layers)


def _follow(root: dict[str, Any], place: Any) -> Any:
    inner = root["model"]["language_model"]
    for key in place:
        inner = inner[key]
    return inner


def verified(path: Path, **options: Any) -> Inspection:
    found = look(path, **options)
    total, read = bytes_to_verify(found), []
    verify(found, read.append)
    assert sum(read) <= total
    return found


def report_of(path: Path) -> set[str]:
    return set(verified(path).problems)


# --- any format --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_a_sound_model_is_described_and_has_no_problems(name: str, tmp_path: Path) -> None:
    found = verified(written(tmp_path / "model", name, tensors_of(torch.float16)), num_heads=4)
    assert found.problems == []
    told = found.as_dict(tensors=True)
    assert (told["format"], told["sound"], told["verified"]) == (name, True, True)
    assert told["model"] == {key: getattr(CONFIG, key) for key in told["model"]}
    assert told["num_parameters"] == sum(value.numel() for value in tensors_of().values()) and told["num_tensors"] == 53
    assert told["dtypes"] == {"float16": 53} and told["num_bytes"] > 2 * told["num_parameters"] and not told["left_out"]
    assert told["layout"] == ({"tensor": 2} if name == "megatron" else {})
    for tensor in told["tensors"]:
        expected = tensors_of(torch.float16)[tensor["name"]].double()
        assert tensor["shape"] == list(expected.shape)
        assert [tensor["minimum"], tensor["maximum"]] == [expected.min(), expected.max()]
        assert [tensor["mean"], tensor["std"]] == pytest.approx([float(expected.mean()), float(expected.std(correction=0))], rel=1e-9)
    json.dumps(told)


@pytest.mark.parametrize("name", FORMATS)
def test_all_problems_are_found_at_once(name: str, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        del tensors[GAIN], tensors[BIAS.replace("c_fc", "c_proj")]
        tensors["more.weight"] = torch.randn(3)
        tensors["transformer.ln_f.bias"] = torch.randn(31)
        tensors[QUERY] = torch.full_like(tensors[QUERY], 0.5)
        tensors[OUT][30, 100] = torch.nan
        tensors[OUT][7, 5] = -torch.inf

    path = changed(tmp_path / "model", name, spoil)
    unknown = "language_model.transformer.more.weight" if name == "megatron" else "more.weight"
    shapes = {
        f"lacks {GAIN}",
        f"lacks {BIAS.replace('c_fc', 'c_proj')}",
        f"holds unknown {unknown}",
        "transformer.ln_f.bias has shape [31], expected [32]",
    }
    assert set(look(path).problems) == shapes
    values = {
        f"{QUERY} is constant: each of its 1,024 numbers is 0.5",
        f"{OUT} has 1 NaN and 1 infinite numbers of 4,096, the first at [7, 5]",
    }
    assert report_of(path) == shapes | values
    with pytest.raises(InputError):
        open_weights(path, Overrides(num_heads=4))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "pattern", [r"\.h\.2\.mlp\.", r"\.h\.0\.", r"wte|wqe", r"wpe", r"\.h\.2\.", r"(wte|wpe|wqe|c_fc\.(weight|bias))"], ids=str
)
def test_every_missing_tensor_is_listed(name: str, pattern: str, tmp_path: Path) -> None:
    absent = [key for key in tensors_of() if re.search(pattern, key)]
    path = changed(tmp_path / "model", name, lambda tensors: [tensors.pop(key) for key in absent])
    kind = [] if path.is_dir() else ["mindspore"]
    found = look(path, format_name=name)
    assert not kind or kind == [name]
    lacking = {problem.removeprefix("lacks ") for problem in found.problems if problem.startswith("lacks transformer.")}
    if name == "huggingface" and pattern == r"\.h\.2\.":
        assert found.problems == ["its configuration says num_layers = 3, but its tensors have 2"]
    else:
        assert lacking == set(absent)


def test_a_model_that_was_not_trained_is_sound(tmp_path: Path) -> None:
    tensors = tensors_of()
    for key, value in tensors.items():
        if ".ln_" in key and key.endswith("weight"):
            value.fill_(1)
        elif key.endswith("bias"):
            value.zero_()
    found = verified(written(tmp_path / "model", "huggingface", tensors))
    assert found.problems == []
    assert found.notes == ["LayerNorm gains of all ones: 7, biases of all zeros: 25; so they are in a model that was not trained"]
    tensors[GAIN].zero_()
    tensors[BIAS].fill_(1)
    spoilt = verified(written(tmp_path / "spoilt", "huggingface", tensors))
    assert [problem.partition(" is constant")[0] for problem in spoilt.problems] == [BIAS, GAIN]


@pytest.mark.parametrize("name", ["npy", "mindspore"])
def test_heads_that_nothing_tells_are_no_problem(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / "model", name, tensors_of())
    found = look(path)
    assert found.problems == [] and "heads" in found.notes[0] and found.as_dict()["model"]["num_heads"] is None
    assert look(path, num_heads=4).as_dict()["model"]["num_heads"] == 4


# --- numbers -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 7, 100, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_numbers_are_measured_in_blocks(block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "BLOCK_NUMBERS", block)
    tensor = (100 + torch.randn(23, 17, generator=torch.Generator().manual_seed(1))).to(dtype)
    for value in (tensor, tensor.T, tensor[3], torch.tensor(2.0), tensor[:1]):
        exact = value.double()
        found = measure(value)
        assert (found.minimum, found.maximum, found.num_nan, found.num_inf) == (exact.min(), exact.max(), 0, 0)
        assert [found.mean, found.std] == pytest.approx([float(exact.mean()), float(exact.std(correction=0))], rel=1e-9)
    tensor[5, 3] = torch.nan
    tensor[22, :] = torch.inf
    exact = tensor[tensor.isfinite()].double()
    found = measure(tensor)
    assert (found.num_nan, found.num_inf, found.first_bad) == (1, 17, (5, 3))
    assert [found.minimum, found.maximum] == [exact.min(), exact.max()] and found.mean == pytest.approx(float(exact.mean()), rel=1e-9)
    assert measure(tensor.T).first_bad == (0, 22)
    assert measure(tensor[22]).mean is None and measure(tensor[:0]).first_bad is None


def test_names_and_shapes_are_told_without_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = changed(tmp_path / "model", "huggingface", lambda tensors: tensors.update({"lm_head.weight": tensors[WTE].clone()}))

    def unread(one: LazyTensor, other: LazyTensor) -> bool:
        raise AssertionError("tensors were read")

    monkeypatch.setattr(huggingface, "_equal", unread)
    assert look(path).problems == []


# --- copies of a tensor ------------------------------------------------------------------------------------------------------------------


def test_an_output_layer_that_differs(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors[WTE].clone()
        tensors["lm_head.weight"][49, 31] += 1

    assert report_of(changed(tmp_path / "equal", "huggingface", lambda t: t.update({"lm_head.weight": t[WTE].clone()}))) == set()
    different = report_of(changed(tmp_path / "model", "huggingface", add))
    assert different == {f"{WTE} differs in lm_head.weight from what is read (1 of 1,600 numbers, the first at [49, 31])"}


def test_replicas_of_tensor_parallel_ranks_that_differ(tmp_path: Path) -> None:
    path = written(tmp_path / "model", "megatron", tensors_of())
    file = next(path.rglob("mp_rank_01/*.pt"))
    root = torch.load(file, weights_only=True)
    root["model"]["language_model"]["transformer"]["layers.1.input_layernorm.weight"][3] += 1
    root["model"]["language_model"]["embedding"]["position_embeddings"]["weight"][1:] = torch.nan
    torch.save(root, file)
    assert look(path).problems == []
    assert report_of(path) == {
        f"{GAIN} differs in tensor rank 1 from what is read (1 of 32 numbers, the first at [3])",
        "transformer.wpe.weight differs in tensor rank 1 from what is read (480 of 512 numbers, the first at [1, 0])",
    }


def test_replicas_of_mindspore_ranks_that_differ(tmp_path: Path) -> None:
    """Every tensor whole on each of five ranks, as small matrices are, transposed ones too."""
    names = mindspore.file_names(CONFIG)
    arrays = {
        names[ours]: mindspore.stored_layout(ours, tensor).read().contiguous().numpy() for ours, tensor in _lazy(tensors_of()).items()
    }
    for rank in range(5):
        own = {name: array.copy() for name, array in arrays.items()}
        if rank > 0:
            own["backbone.top_query_layer.output.projection.weight"][100, 30] = 5
        (tmp_path / f"filerted_{rank}.ckpt").write_bytes(checkpoint(own))
    layouts = {name: ((5,), (-1,) * array.ndim, 0, 0) for name, array in arrays.items()}
    (tmp_path / "x_strategy.ckpt").write_bytes(strategy(layouts))
    found = verified(tmp_path)
    where = "rank 1, rank 2, rank 3 and 1 more"
    assert found.problems == [f"{OUT} differs in {where} from what is read (1 of 4,096 numbers, the first at [30, 100])"]
    assert found.as_dict()["layout"] == {"ranks": 5} and found.as_dict()["num_files"] == 5


def _lazy(tensors: Tensors) -> dict[str, LazyTensor]:
    return {key: LazyTensor(tuple(value.shape), value.dtype, lambda value=value: value) for key, value in tensors.items()}


# --- damaged files -----------------------------------------------------------------------------------------------------------------------


def test_a_crc_that_does_not_fit(tmp_path: Path) -> None:
    path = written(tmp_path / "model.ckpt", "mindspore", tensors_of())
    assert "no CRC-32 at the end of 1 of 1 files" in verified(path).notes[-1]
    content = path.read_bytes()
    trailer = b"crc_num" + zlib.crc32(content).to_bytes(10, "big")
    path.write_bytes(content + trailer)
    found = verified(path)
    assert found.problems == [] and not any("CRC" in note for note in found.notes)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) + trailer)
    assert look(path).problems == []
    (problem,) = verified(path).problems
    assert "do not have the CRC-32" in problem


def test_every_damaged_file_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "model", "npy", tensors_of())
    for name in ("backbone.layernorm.gamma", "backbone.blocks.0.layernorm1.gamma"):
        (path / f"{name}.npy").write_bytes((path / f"{name}.npy").read_bytes()[:-1])
    problems = look(path).problems
    assert [".gamma.npy: holds 127 bytes" in problem for problem in problems].count(True) == 2
    community = tmp_path / "copy"
    shutil.copytree(written(tmp_path / "whole", "huggingface", tensors_of()), community)
    (file,) = community.glob("*.safetensors")
    tensors = load_file(file)
    halves = [dict(list(tensors.items())[half::2]) for half in range(2)]
    weight_map = {name: f"model-{half}.safetensors" for half in range(2) for name in halves[half]}
    save_file(halves[0], community / "model-0.safetensors")
    (community / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    file.unlink()
    problems = look(community).problems
    assert "model-1.safetensors: cannot be read" in problems[0]
    assert {f"lacks {name}" for name in halves[1]} == set(problems[1:])


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        look(tmp_path / "nothing")
    with pytest.raises(InputError, match="no known format"):
        look(tmp_path)
    path = tmp_path / "far.ckpt"
    path.write_bytes(checkpoint({"backbone.blocks.9999.layernorm1.gamma": np.ones(8, np.float32)}))
    with pytest.raises(InputError, match="those of 10001 layers, its tensors 1"):
        look(path)
    path.write_bytes(checkpoint({"other.weight": np.ones(8, np.float32)}))
    with pytest.raises(InputError, match="no layers"):
        look(path)


# --- training checkpoints ----------------------------------------------------------------------------------------------------------------


def train(directory: str, sections: dict[str, Any]) -> None:
    engine = start(small_config(checkpoint={"dir": f"{directory}/checkpoints"}, **sections))
    engine.train_step(random_batches(engine.config, engine.groups), 1e-2)
    save_checkpoint(engine, Progress(step=1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("trained")
    run_distributed(train, 2, str(root / "plain"), {"parallel": {"tensor": 2}})
    run_distributed(train, 2, str(root / "zero3"), {"parallel": {"zero_stage": 3}})
    return {name: root / name for name in ("plain", "zero3")}


@pytest.fixture
def step(trained: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tensor-parallel one, to be spoilt."""
    return Path(shutil.copytree(trained["plain"] / "checkpoints/step_00000001", tmp_path / "step_00000001"))


@pytest.mark.parametrize(("name", "layout"), [("plain", (2, 1, 1, 1)), ("zero3", (1, 1, 2, 3))])
def test_a_training_checkpoint_is_described(name: str, layout: tuple[int, ...], trained: dict[str, Path]) -> None:
    found = verified(trained[name])
    assert found.problems == [] and found.path.name == "step_00000001"
    told = found.as_dict()
    assert told["layout"] == dict(zip(("tensor", "pipeline", "data", "zero_stage"), layout, strict=True))
    assert told["step"] == 1 and told["left_out"]["random state"] == 2
    assert told["num_files"] == len(list(found.path.iterdir())) - 1


def test_every_file_that_the_manifest_does_not_describe_is_named(step: Path) -> None:
    optimizer = next(step.glob("*optim_states.pt"))
    data = bytearray(optimizer.read_bytes())
    data[len(data) // 2] ^= 1
    optimizer.write_bytes(data)
    (step / "rng_rank_00001.pt").unlink()
    (step / "stray.pt").write_bytes(b"x")
    assert look(step).problems == []
    problems = report_of(step)
    assert len(problems) == 3
    assert any(problem.startswith(f"{optimizer.name} has changed") for problem in problems)
    assert any(problem.startswith("rng_rank_00001.pt is missing") for problem in problems)
    assert any(problem.startswith("stray.pt is not in manifest.json") for problem in problems)


def test_a_checkpoint_that_cannot_be_read_is_still_verified(step: Path) -> None:
    (step / "mp_rank_01_model_states.pt").unlink()
    (step / "rng_rank_00000.pt").unlink()
    found = verified(step)
    assert found.weights is None and found.as_dict()["sound"] is False
    text = "\n".join(found.problems)
    assert "mp_rank_01_model_states.pt: missing" in text and "rng_rank_00000.pt is missing" in text


def test_replicas_of_training_that_differ(step: Path) -> None:
    file = step / "mp_rank_01_model_states.pt"
    root = torch.load(file, weights_only=False)
    root["module"]["ln_f.weight"][2] += 1
    torch.save(root, file)
    edit_manifest(step, lambda manifest: manifest["files"][file.name].update(bytes=file.stat().st_size))
    problems = report_of(step)
    assert "transformer.ln_f.weight differs in tensor rank 1 from what is read (1 of 32 numbers, the first at [2])" in problems
    assert any("its sha256 differs" in problem for problem in problems) and len(problems) == 2


@pytest.mark.parametrize("described", [None, 7, {"bytes": "3"}, {"bytes": 3}, {"bytes": 3, "sha256": 5}])
@pytest.mark.parametrize("name", ["../outside", "inside"])
def test_a_manifest_that_leads_elsewhere_is_not_followed(name: str, described: Any, step: Path) -> None:
    (step.parent / "outside").write_bytes(b"abc")
    edit_manifest(step, lambda manifest: manifest["files"].update({name: described}))
    assert any("its manifest.json is not as it was written" in problem for problem in report_of(step))
