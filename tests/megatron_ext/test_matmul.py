"""Products by oneDNN are those of torch, gradients included, wherever it is chosen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext import matmul
from megatron_ext.matmul import add_product_, has_fast_onednn, linear, product

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose it for every product, on any processor."""
    monkeypatch.setattr(matmul, "has_fast_onednn", lambda: True)
    monkeypatch.setattr(matmul, "MIN_PRODUCTS", 0)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (1, 1, 7), (2, 8, 3, 7)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_and_its_gradients(shape: tuple[int, ...], has_bias: bool) -> None:
    def run(apply: object) -> list[Tensor]:
        inputs = [random(*shape).requires_grad_(), random(11, 7).requires_grad_()]
        if has_bias:
            inputs.append(random(11).requires_grad_())
        y = apply(*inputs)  # type: ignore[operator]
        y.mul(random(*y.shape)).sum().backward()
        return [y, *(x.grad for x in inputs)]  # type: ignore[list-item]

    for ours, reference in zip(run(linear), run(F.linear), strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
        assert ours.is_contiguous()


def test_inputs_that_do_not_lie_in_order() -> None:
    x, weight = random(7, 5).t(), random(7, 11).t()
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(product(x, weight.t()), x @ weight.t(), atol=1e-5, rtol=1e-5)


def test_only_gradients_that_are_needed() -> None:
    x, weight = random(5, 7), random(11, 7).requires_grad_()
    linear(x, weight).sum().backward()
    assert x.grad is None and weight.grad is not None
    frozen, y = random(11, 7), random(5, 7).requires_grad_()
    linear(y, frozen).sum().backward()
    assert frozen.grad is None and y.grad is not None


def test_sums() -> None:
    total = torch.full((5, 11), float("nan"))
    add_product_(total, random(5, 7), random(7, 11), is_first=True)
    add_product_(total, random(5, 3), random(3, 11), is_first=False)
    torch.testing.assert_close(total, random(5, 7) @ random(7, 11) + random(5, 3) @ random(3, 11), atol=1e-5, rtol=1e-5)


def test_other_types_and_small_products_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: object) -> Tensor:
        raise AssertionError("oneDNN was asked")

    monkeypatch.setattr(matmul, "_product", unexpected)
    monkeypatch.setattr(matmul._Linear, "apply", unexpected)
    for dtype in (torch.float64, torch.bfloat16):
        x, weight = random(5, 7).to(dtype), random(11, 7).to(dtype)
        assert torch.equal(linear(x, weight), F.linear(x, weight))
        assert torch.equal(product(x, weight.t()), x @ weight.t())
    total = torch.zeros(5, 11)
    add_product_(total, random(5, 7).bfloat16(), random(7, 11).bfloat16(), is_first=True)
    assert torch.equal(total, (random(5, 7).bfloat16() @ random(7, 11).bfloat16()).float())
    monkeypatch.setattr(matmul, "MIN_PRODUCTS", 5 * 7 * 11 + 1)
    assert torch.equal(linear(random(5, 7), random(11, 7)), F.linear(random(5, 7), random(11, 7)))


def test_the_processor_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, text, expected in (
        ("x86_64", "vendor_id\t: AuthenticAMD", True),
        ("x86_64", "vendor_id\t: GenuineIntel", False),
        ("aarch64", "", False),
    ):
        monkeypatch.setattr(matmul.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(matmul.Path, "read_text", lambda self, encoding, text=text: text)
        assert has_fast_onednn.__wrapped__() is expected
