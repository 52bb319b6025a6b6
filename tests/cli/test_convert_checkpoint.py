"""`tools/convert_checkpoint.py`: every format into every other, and what it refuses."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pangu.config import ModelConfig
from pangu.conversion import formats, huggingface
from pangu.conversion.convert import convert
from pangu.conversion.formats import FORMATS, detect_format, open_weights
from pangu.conversion.weights import LazyTensor, Overrides, Weights, WriteOptions, complete, model_specs
from pangu.errors import InputError

ROOT = Path(__file__).parents[2]
WRITABLE = [name for name, known in FORMATS.items() if known.write]
HEADS = Overrides(num_heads=4)


def weights(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Weights:
    """A small model all of whose tensors are random, biases and norms too."""
    config = ModelConfig(num_layers=3, hidden_size=32, num_heads=4, vocab_size=50, max_positions=16)
    generator = torch.Generator().manual_seed(3)
    values = {name: (scale * torch.randn(spec.shape, generator=generator)).to(dtype) for name, spec in model_specs(config).items()}
    tensors = {name: LazyTensor(tuple(value.shape), value.dtype, lambda value=value: value) for name, value in values.items()}
    return complete(Path("memory"), tensors, HEADS, source="made here")


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

    monkeypatch.setitem(formats.FORMATS, "npy", formats.Format(FORMATS["npy"].detect, FORMATS["npy"].read, full))
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
