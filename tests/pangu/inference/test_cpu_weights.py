"""Weights laid out for a CPU are the same weights; 8-bit ones are near, exact in their sums on every processor, and blind to the batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_model import TOKENIZER_VOCAB, WINDOW, NumberTokenizer, small_model

from megatron_ext import accelerator
from megatron_ext.topology import Group
from pangu.errors import InputError
from pangu.inference import cpu_weights
from pangu.inference.cpu_weights import Int8Embedding, Int8Matrix, PackedEmbedding, PackedLinear, quantize
from pangu.inference.generation import TextGenerator

TOKENS = torch.randint(0, TOKENIZER_VOCAB, (4, WINDOW), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.arange(WINDOW).expand(4, -1)


@pytest.mark.parametrize("packs", [True, False])
def test_arranged_weights_are_the_same(packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packs:
        monkeypatch.setattr(cpu_weights, "has_onednn", lambda: False)
    elif not cpu_weights.has_onednn():
        pytest.skip("this torch or this processor packs no weights")
    plain, arranged = small_model(), small_model()
    cpu_weights.arrange_for_cpu(arranged)
    if packs:
        assert isinstance(arranged.wte, PackedEmbedding)
        assert all(isinstance(module, PackedLinear) for name, module in arranged.named_modules() if name.endswith(("_proj", "c_fc")))
        assert torch.equal(arranged.wte(TOKENS), plain.wte(TOKENS))
    else:
        assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), arranged.parameters(), strict=True))
        assert arranged.blocks[0].mlp.c_fc.weight.stride() == (1, 128)
    with torch.inference_mode():
        assert (plain.logits(TOKENS, POSITIONS) - arranged.logits(TOKENS, POSITIONS)).abs().max() < 5e-5


@pytest.mark.skipif(not cpu_weights.has_onednn(), reason="this torch or this processor packs no weights")
def test_packed_weights_generate_what_plain_ones_recompute() -> None:
    """And the whole batch at once, prompts of every length: it does not change a row."""
    plain, packed = small_model(), small_model()
    cpu_weights.arrange_for_cpu(packed)
    of = TextGenerator(packed, NumberTokenizer())  # type: ignore[arg-type]
    rows = [TOKENS[0, :length].tolist() for length in range(1, WINDOW)]
    prompts = [" ".join(map(str, ids)) for ids in rows]
    together = of.generate(prompts, max_new_tokens=1, temperature=0, stop_ids=())
    for ids, prompt, first in zip(rows, prompts, together, strict=True):
        [alone] = of.generate([prompt], max_new_tokens=WINDOW - len(ids), temperature=0, stop_ids=())
        assert alone.ids[:1] == first.ids
        with torch.inference_mode():
            while len(ids) < WINDOW:
                logits = plain.logits(torch.tensor([ids]), torch.arange(len(ids)).unsqueeze(0))[0, -1, :TOKENIZER_VOCAB]
                ids.append(int(logits.argmax()))
        assert ids[-len(alone.ids) :] == alone.ids


def test_weights_that_cannot_be_packed_are_laid_out() -> None:
    """A rank's slice, whose parts of a sum must still meet, and other numbers than fp32."""
    double = small_model().double()
    cpu_weights.arrange_for_cpu(double)
    sliced = small_model(Group(ranks=(0, 1), rank=0))
    cpu_weights.arrange_for_cpu(sliced)
    assert double.blocks[0].mlp.c_fc.weight.stride() == (1, 128)
    assert sliced.blocks[0].mlp.c_fc.weight.stride() == (1, 64)


def test_an_8_bit_product_is_near() -> None:
    random = torch.Generator().manual_seed(2)
    weight = torch.randn(200, 64, generator=random) * torch.logspace(-3, 3, 200).unsqueeze(-1)  # rows of very different size
    x = torch.randn(3, 5, 64, generator=random) * torch.logspace(-2, 2, 5).unsqueeze(-1)
    exact, near = x @ weight.t(), Int8Matrix(weight).multiply(x)
    assert near.shape == exact.shape == (3, 5, 200)
    size = x.norm(dim=-1).unsqueeze(-1) * weight.norm(dim=-1)  # of each product's terms, which may cancel out
    assert 0 < ((near - exact).abs() / size).max() < 0.01
    assert torch.equal(Int8Matrix(torch.zeros(3, 4)).multiply(torch.zeros(1, 1, 4)), torch.zeros(1, 1, 3))


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    matrix = Int8Matrix(torch.randn(97, 33, generator=torch.Generator().manual_seed(3)))
    x = torch.randn(6, 4, 33, generator=torch.Generator().manual_seed(4)) * torch.tensor([1.0, 100.0, 0.01, 1, 5, 7]).view(6, 1, 1)
    together = matrix.multiply(x)
    assert all(torch.equal(together[row : row + 1], matrix.multiply(x[row : row + 1])) for row in range(6))


EXTREMES = """
import torch
from pangu.inference.cpu_weights import Int8Matrix
for O, I in ((1536, 384), (384, 1536), (97, 33)):
    for B in (1, 8, 40):
        x = torch.ones(B, 1, I) * (1 - 2 * (torch.arange(B) % 2)).view(B, 1, 1)
        sums = Int8Matrix(torch.ones(O, I)).multiply(x)
        assert ((sums - x.sum(dim=-1, keepdim=True)).abs() < 1e-3 * I).all(), (O, I, B)
"""


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE", "DEFAULT"])
def test_the_largest_values_do_not_overflow_on_any_processor(instructions: str) -> None:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", EXTREMES], env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr


def test_an_8_bit_model_is_near_and_takes_a_quarter_of_the_memory() -> None:
    plain, quantized = small_model(), small_model()
    quantize(quantized)
    with torch.inference_mode():
        exact, near = plain.logits(TOKENS, POSITIONS), quantized.logits(TOKENS, POSITIONS)
    assert 0 < (near - exact).norm() / exact.norm() < 0.1
    assert isinstance(quantized.wte, Int8Embedding)
    wide = [name for name, parameter in quantized.named_parameters() if parameter.dim() == 2]
    assert wide == ["position.wpe.weight", "query_layer.wqe.weight"]
    assert {tensor.dtype for name, tensor in quantized.named_buffers() if name.endswith("values_OI")} == {torch.int8}


def test_an_8_bit_model_generates_independently_of_the_batch() -> None:
    model = small_model()
    quantize(model)
    of = TextGenerator(model, NumberTokenizer())  # type: ignore[arg-type]
    prompts = [" ".join(map(str, TOKENS[row, : 3 + row].tolist())) for row in range(4)]
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0}
    assert of.generate(prompts, **options) == [of.generate([text], **options)[0] for text in prompts]


def test_8_bits_are_refused_beyond_one_process_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="int8 works in one process on a CPU; found 2 processes"):
        TextGenerator.from_directory("nowhere", int8=True)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(accelerator, "device", lambda: torch.device("meta"))
    with pytest.raises(InputError, match="found meta"):
        TextGenerator.from_directory("nowhere", int8=True)
