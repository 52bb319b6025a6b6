"""`tools/convert_checkpoint.py`: every format into every other, and what it refuses."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.harness import run_distributed
from helpers.layouts import random_batches, small_config, start
from helpers.mindspore_bytes import strategy
from helpers.mindspore_shards_of import layout_of, write_shards

from megatron_ext.sharding import canonical_parameters
from pangu.config import ModelConfig
from pangu.conversion import formats, huggingface, mindspore
from pangu.conversion.convert import convert
from pangu.conversion.export import write_weights
from pangu.conversion.formats import FORMATS, detect_format, open_weights
from pangu.conversion.weights import Overrides, Weights, WriteOptions, complete, model_specs
from pangu.errors import InputError
from pangu.tensor_files.lazy_tensor import LazyTensor
from pangu.training.checkpoint import Progress, save_checkpoint

ROOT = Path(__file__).parents[2]
WRITABLE = [name for name, known in FORMATS.items() if known.write]
HEADS = Overrides(num_heads=4)


def weights(dtype: torch.dtype = torch.float32, scale: float = 1.0, num_heads: int = 4) -> Weights:
    """A small model all of whose tensors are random, biases and norms too."""
    config = ModelConfig(num_layers=3, hidden_size=32, num_heads=num_heads, vocab_size=50, max_positions=16)
    generator = torch.Generator().manual_seed(3)
    values = {name: (scale * torch.randn(spec.shape, generator=generator)).to(dtype) for name, spec in model_specs(config).items()}
    tensors = {name: LazyTensor(tuple(value.shape), value.dtype, lambda value=value: value) for name, value in values.items()}
    return complete(Path("memory"), tensors, Overrides(num_heads=num_heads), source="made here")


def equal(one: Weights, other: Weights) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(tensor.read(), other.tensors[name].read()) and tensor.dtype == other.tensors[name].dtype
        for name, tensor in one.tensors.items()
    )


@pytest.mark.parametrize(("first", "second"), list(itertools.product(WRITABLE, WRITABLE)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_format_to_any_other_and_back_is_bit_exact(first: str, second: str, dtype: torch.dtype, tmp_path: Path) -> None:
    original = weights(dtype)
    convert(original, first, tmp_path / "a", WriteOptions(tensor_parallel=2))
    assert detect_format(tmp_path / "a") == first
    convert(open_weights(tmp_path / "a", HEADS), second, tmp_path / "b", WriteOptions(tensor_parallel=4))
    assert detect_format(tmp_path / "b") == second
    back = open_weights(tmp_path / "b", HEADS)
    assert back.config == original.config
    assert equal(back, original)


def shards(original: Weights, folder: Path) -> Path:
    """The model as eight ranks of a released checkpoint hold it."""
    names = mindspore.file_names(original.config)
    arrays = {name: mindspore.stored_layout(ours, original.tensors[ours]).read().numpy() for ours, name in names.items()}
    write_shards(folder, arrays, 4, 2)
    (folder / "ckpt_strategy.ckpt").write_bytes(strategy({name: layout_of(name, array, 4, 2) for name, array in arrays.items()}))
    return folder


def trained(directory: str) -> None:
    """Two steps on tensor 2 x pipeline 2, saved, and the weights as training exports them."""
    config = small_config(checkpoint={"dir": f"{directory}/checkpoints"}, parallel={"tensor": 2, "pipeline": 2})
    engine = start(config)
    batches = random_batches(config, engine.groups)
    for _ in range(2):
        engine.train_step(batches, 1e-2)
    save_checkpoint(engine, Progress(step=2))
    parameters = ((spec, partial(engine.whole, parameter)) for spec, parameter in canonical_parameters(engine.module))
    write_weights(Path(directory) / "weights", config.model, engine.groups, parameters)


@pytest.fixture(scope="module")
def only_read(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """The formats that are not written: a source in each, and the same model as a canonical directory."""
    root = tmp_path_factory.mktemp("sources")
    convert(weights(), "huggingface", root / "weights", WriteOptions())
    run_distributed(trained, 4, str(root / "run"))
    return {
        "mindspore-shards": (shards(weights(), root / "released"), root / "weights"),
        "deepspeed": (root / "run/checkpoints", root / "run/weights"),
    }


@pytest.mark.parametrize("target", WRITABLE)
@pytest.mark.parametrize("source", [name for name, known in FORMATS.items() if not known.write])
def test_what_is_only_read_becomes_any_other_format_bit_for_bit(
    source: str, target: str, only_read: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    path, same = only_read[source]
    assert detect_format(path) == source
    convert(open_weights(path, HEADS), target, tmp_path / "out", WriteOptions(tensor_parallel=4))
    assert equal(open_weights(tmp_path / "out", HEADS), open_weights(same, HEADS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_any_number_of_megatron_files_into_any_other_is_bit_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    """The vocabulary of 50 divides by neither 4 nor 8; biases and norms are random."""
    original = weights(dtype, num_heads=8)
    for ranks in (1, 2, 4, 8):
        convert(original, "megatron", tmp_path / str(ranks), WriteOptions(tensor_parallel=ranks))
        for again in (1, 2, 4, 8):
            output = tmp_path / f"{ranks} to {again}"
            convert(open_weights(tmp_path / str(ranks), Overrides(num_heads=8)), "megatron", output, WriteOptions(tensor_parallel=again))
            assert len(list(output.rglob("*.pt"))) == again
            assert equal(open_weights(output, Overrides(num_heads=8)), original)


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/convert_checkpoint.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_tool_converts_the_original_and_tells_what_it_is(shared: Path, tmp_path: Path) -> None:
    source = shared / "oracle/A/pangu_tiny.ckpt"
    result = run("--from", "auto", "--to", "huggingface", "--input", source, "--output", tmp_path / "out", "--heads", "4")
    assert result.returncode == 0, result.stderr
    assert "3 layers (query layer included), hidden 64, heads 4" in result.stdout and "gelu tanh" in result.stdout
    assert equal(huggingface.read(tmp_path / "out", Overrides()), open_weights(source, HEADS))
    again = run("--to", "huggingface", "--input", source, "--output", tmp_path / "out", "--heads", "4")
    assert again.returncode == 2 and again.stderr.startswith("error: ") and "exists already" in again.stderr
    headless = run("--to", "npy", "--input", source, "--output", tmp_path / "npy")
    assert headless.returncode == 2 and "Give --heads" in headless.stderr and not (tmp_path / "npy").exists()


def test_a_failed_conversion_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(weights(), "npy", tmp_path / "out", WriteOptions())
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(weights: Weights, output: Path, options: WriteOptions) -> None:
        output.mkdir()
        (output / "half").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(formats.FORMATS, "npy", replace(FORMATS["npy"], write=full))
    with pytest.raises(InputError, match="Free some space"):
        convert(weights(), "npy", tmp_path / "out", WriteOptions(), force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_force_replaces_and_only_read_formats_are_not_written(tmp_path: Path) -> None:
    convert(weights(), "mindspore", tmp_path / "out", WriteOptions())
    with pytest.raises(InputError, match="exists already"):
        convert(weights(), "npy", tmp_path / "out", WriteOptions())
    convert(weights(), "npy", tmp_path / "out", WriteOptions(), force=True)
    assert equal(open_weights(tmp_path / "out", HEADS), weights())
    with pytest.raises(InputError, match="only read"):
        convert(weights(), "deepspeed", tmp_path / "other", WriteOptions())


@pytest.mark.parametrize("to", WRITABLE)
def test_values_that_fp16_cannot_hold_are_refused(to: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="more than fp16 can"):
        convert(weights(scale=1e6), to, tmp_path / "out", WriteOptions(dtype=torch.float16))
    assert not any(tmp_path.iterdir())


def test_nothing_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        detect_format(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("no weights")
    with pytest.raises(InputError, match="no known format"):
        detect_format(tmp_path)
