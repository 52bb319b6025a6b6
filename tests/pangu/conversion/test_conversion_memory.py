"""Converting takes memory for the largest tensor, whatever the model's size: the formula of docs/conversion.md, measured."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from helpers.harness import run_distributed

from pangu.benchmarks.convert import random_weights
from pangu.benchmarks.machine import memory
from pangu.config import ModelConfig
from pangu.conversion.convert import convert
from pangu.conversion.formats import open_weights
from pangu.conversion.weights import Overrides, WriteOptions
from pangu.tensor_files.blocks import BLOCK_BYTES

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is measured with /proc")

MIB = 2**20
HEADS = Overrides(num_heads=8)
FILES = 8
# Layers and bytes of the largest tensor, an MLP's matrix in fp16.
SIZES = {"small": (2, 8 * MIB), "deep": (6, 8 * MIB), "wide": (2, 16 * MIB)}
HIDDEN = 512


def model(layers: int, largest: int) -> ModelConfig:
    """Small but for the matrices of its MLP."""
    ffn = largest // (2 * HIDDEN)
    return ModelConfig(num_layers=layers, hidden_size=HIDDEN, num_heads=8, ffn_hidden_size=ffn, vocab_size=64, max_positions=16)


def peak(tiny: Path, source: Path, to: str, output: Path, dtype: torch.dtype | None = None) -> int:
    """Most resident bytes of a conversion over those of the same conversion of a model of nearly nothing, in a process of its own."""
    # Freed memory goes back at once: tensors count, not what the allocator keeps.
    assert ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD
    baseline = 0
    for path in (tiny, source):
        baseline = memory()["VmHWM"]
        convert(open_weights(path, HEADS), to, output / path.name, WriteOptions(dtype, FILES))
    return memory()["VmHWM"] - baseline


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Models of all sizes, and a tiny one, in the formats that are converted from; removed with the module."""
    folder = tmp_path_factory.mktemp("models")
    made: dict[tuple[str, str], Path] = {}
    for name, (layers, largest) in {**SIZES, "tiny": (1, 8 * 2 * HIDDEN)}.items():
        for form in ("mindspore", "huggingface", "megatron"):
            made[name, form] = folder / f"{form}-{name}"
            convert(random_weights(model(layers, largest), torch.float16), form, made[name, form], WriteOptions(tensor_parallel=FILES))
    return made


# A tensor is read once; changing between the layouts copies a transposed one, and cutting a matrix along its columns for megatron copies a
# slice. A slice that is merged is mapped beside the full tensor, but dropped before that is transposed.
@pytest.mark.parametrize(
    ("before", "to", "tensors"),
    [
        ("mindspore", "mindspore", 1),
        ("mindspore", "huggingface", 2),
        ("huggingface", "megatron", 1 + 1 / FILES),
        ("megatron", "mindspore", 2),
        ("megatron", "huggingface", 1 + 1 / FILES),
    ],
)
def test_memory_is_that_of_the_largest_tensor(
    before: str, to: str, tensors: float, sources: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    for size, (layers, largest) in SIZES.items():
        [found] = run_distributed(peak, 1, sources["tiny", before], sources[size, before], to, tmp_path / size)
        assert 2 * layers * largest > 1.5 * tensors * largest, "the whole model would be seen"
        assert found == pytest.approx(tensors * largest, abs=largest / 16 + MIB), (size, found / MIB, tensors * largest / MIB)


def test_another_type_takes_two_blocks_more(sources: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    tiny, wide = (sources[size, "huggingface"] for size in ("tiny", "wide"))
    [found] = run_distributed(peak, 1, tiny, wide, "huggingface", tmp_path, torch.float32)
    assert found == pytest.approx(SIZES["wide"][1] + 2 * BLOCK_BYTES, abs=2 * MIB)
