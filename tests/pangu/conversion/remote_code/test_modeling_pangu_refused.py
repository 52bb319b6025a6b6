"""What other models compute in silence, the code that travels with the weights refuses in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.in_transformers import TOLERANCE, changed, load, tokens_of
from helpers.small_model import WINDOW

transformers = pytest.importorskip("transformers")


def test_a_full_mask_means_the_same_under_both_attentions(model: Any) -> None:
    """True is visible: eager attention would add it to the scores as 1."""
    tokens = tokens_of(10, 1, 12)
    position_ids = torch.tensor([[*range(5), *range(7)]])
    document = torch.tensor([0] * 5 + [1] * 7)
    mask = ((document.unsqueeze(1) == document) & torch.ones(12, 12, dtype=torch.bool).tril())[None, None]
    numbers = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(tokens, position_ids=position_ids).logits
        for given in (mask, numbers, numbers.double()):
            found = model(tokens, position_ids=position_ids, attention_mask=given).logits
            assert (found - expected).abs().max() < TOLERANCE


SQUARE = torch.ones(1, 1, 6, 6).tril()
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a full mask of 0 and 1": ({"attention_mask": SQUARE, "position_ids": torch.arange(6).unsqueeze(0)}, "numbers above 0"),
    "a full mask of integers": ({"attention_mask": SQUARE.long(), "position_ids": torch.arange(6).unsqueeze(0)}, "expected bool"),
    "a full mask without positions": ({"attention_mask": SQUARE.bool()}, "Give position_ids too"),
    "a mask of three dimensions": ({"attention_mask": SQUARE[0]}, r"shape \[1, 6, 6\], expected \[1, 6\]"),
    "a mask of another length": ({"attention_mask": torch.ones(1, 5)}, r"shape \[1, 5\], expected \[1, 6\]"),
    "a position past the window": (
        {"position_ids": torch.arange(6).unsqueeze(0) + WINDOW - 5},
        rf"from 19 to {WINDOW}, .* 0 to {WINDOW - 1}",
    ),
    "a position below 0": ({"position_ids": torch.arange(6).unsqueeze(0) - 1}, "from -1 to 4"),
    "ids and embeddings": ({"inputs_embeds": torch.zeros(1, 6, 32)}, "either input_ids or inputs_embeds"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_meant_is_refused(what: str, model: Any) -> None:
    arguments, told = REFUSED[what]
    with pytest.raises(ValueError, match=told):
        model(tokens_of(1, 1, 6), **arguments)


def test_a_mask_that_forgets_the_cache_is_refused(model: Any) -> None:
    cache = model(tokens_of(1, 1, 6), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"shape \[1, 2\], expected \[1, 8\]"):
        model(tokens_of(2, 1, 2), past_key_values=cache, attention_mask=torch.ones(1, 2))


def test_generating_past_the_window_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="prompt and max_new_tokens share the window"):
        model.generate(tokens_of(1, 1, 20), attention_mask=torch.ones(1, 20), max_new_tokens=10, eos_token_id=None)
    model.generate(tokens_of(1, 1, 20), attention_mask=torch.ones(1, 20), max_new_tokens=5, eos_token_id=None)


def test_attention_weights_are_not_promised_by_sdpa(small: Path) -> None:
    with pytest.raises(ValueError, match="only eager attention"):
        load(small)(tokens_of(1, 1, 4), output_attentions=True)


def test_checkpointing_does_not_drop_a_cache(model: Any) -> None:
    cache = model(tokens_of(1, 1, 6)).past_key_values
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(tokens_of(2, 1, 2), past_key_values=cache)


WTE, WQE, HEAD = "transformer.wte.weight", "transformer.wqe.weight", "lm_head.weight"


@pytest.mark.parametrize("missing", [WQE, WTE, "transformer.h.2.mlp.c_fc.bias"])
def test_weights_that_lack_a_tensor_are_refused(missing: str, small: Path, tmp_path: Path) -> None:
    path = changed(small, tmp_path, lambda tensors: tensors.pop(missing))
    with pytest.raises(ValueError, match=f"lack {missing}"):
        load(path)
    with pytest.raises(ValueError, match=f"lack {missing.removeprefix('transformer.')}"):
        transformers.AutoModel.from_pretrained(path, trust_remote_code=True)


def test_another_output_layer_is_refused(small: Path, tmp_path: Path) -> None:
    path = changed(small, tmp_path, lambda tensors: tensors.update({HEAD: tensors[WTE] + 1e-3}))
    with pytest.raises(ValueError, match=r"lm_head\.weight that differs"):
        load(path)


def test_an_output_layer_trained_apart_can_be_asked_for(small: Path, tmp_path: Path) -> None:
    path = changed(small, tmp_path, lambda tensors: tensors.update({HEAD: -tensors[WTE]}), tie_word_embeddings=False)
    tokens = tokens_of(1, 1, 6)
    assert torch.allclose(load(path)(tokens).logits, -load(small)(tokens).logits)


def test_a_stored_copy_of_the_word_embedding_is_tied(small: Path, tmp_path: Path) -> None:
    buffers = {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4), "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    model = load(changed(small, tmp_path, lambda tensors: tensors.update({HEAD: tensors[WTE].clone(), **buffers})))
    assert model.lm_head.weight is model.transformer.wte.weight
