"""The model against the original MindSpore code: logits, loss, intermediate values and gradients of a tiny configuration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.golden import golden_batch, golden_model

TOLERANCE_LOGITS = 5e-5
TOLERANCE_GRADIENTS = 5e-6


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", ["plain", "eod"])
def test_logits_and_losses_equal_the_original(shared: Path, case: str, attention: str) -> None:
    golden = np.load(shared / f"oracle/A/case_{case}.npz")
    model = golden_model(shared, reset_at_document=case == "eod", attention=attention)
    tokens, position_ids, labels, loss_mask = golden_batch(golden)
    with torch.no_grad():
        logits = model.logits(tokens, position_ids)
        loss = model(tokens, position_ids, labels, loss_mask)
    assert np.abs(logits.numpy() - golden["logits"]).max() < TOLERANCE_LOGITS
    assert abs(loss.item() - float(golden["loss"])) < 5e-6


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_gradients_equal_the_original(shared: Path, recompute: str) -> None:
    from helpers.golden import to_mindspore

    golden = np.load(shared / "oracle/A/grads_plain.npz")
    model = golden_model(shared, recompute=recompute)
    model(*golden_batch(np.load(shared / "oracle/A/case_plain.npz"))).backward()
    checked = 0
    for name, gradient in to_mindspore({p.shard_spec.name: p.grad for p in model.parameters()}).items():
        assert np.abs(gradient - golden[name]).max() < TOLERANCE_GRADIENTS, name
        checked += 1
    assert checked == 53


@pytest.mark.parametrize("variant", [{"gelu": "erf"}, {"gelu": "sigmoid"}, {"final_norm": "after_query"}])
def test_another_dialect_gives_other_logits(shared: Path, variant: dict[str, str]) -> None:
    golden = np.load(shared / "oracle/A/case_plain.npz")
    tokens, position_ids, _, _ = golden_batch(golden)
    with torch.no_grad():
        logits = golden_model(shared, **variant).logits(tokens, position_ids)
    assert np.abs(logits.numpy() - golden["logits"]).max() > 1e-3


def test_erf_gelu_equals_the_megatron_port(shared: Path) -> None:
    golden = np.load(shared / "oracle/B/logits_mp1_erfgelu.npz")
    tokens, position_ids, _, _ = golden_batch(np.load(shared / "oracle/A/case_plain.npz"))
    with torch.no_grad():
        logits = golden_model(shared, gelu="erf").logits(tokens, position_ids)
    assert np.abs(logits.numpy() - golden["plain/logits"]).max() < TOLERANCE_LOGITS
