"""Weights in the memory layout that a CPU reads fastest. The time per token is the time to read every weight once.

Shapes: B rows, S positions, I input features, O output features (or vocabulary), H hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ext.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron_ext.matmul import has_onednn
from pangu.model.model import PanguModel

Linear = (ColumnParallelLinear, RowParallelLinear)
MAX_WEIGHT, MAX_ACTIVATION = 63, 127
"""Largest absolute values of quantized weights (7 bits) and activations. Processors without VNNI add pairs of 8-bit products, inputs
shifted to [0, 255], in 16 bits, and silently saturate. 2 · 255 · 63 fits, so that every processor gives the exact sums."""


def arrange_for_cpu(model: PanguModel) -> None:
    """Store the matrices, in place, in the layout with which a CPU multiplies a few rows fastest; the values do not change.

    For a whole model in fp32 on an x86 processor they are packed for oneDNN: it can then no longer be trained or saved. Otherwise they are
    stored as [in, out], which BLAS reads faster.
    """
    if model.context.tensor.size == 1 and has_onednn() and all(parameter.dtype == torch.float32 for parameter in model.parameters()):
        _replace(model, PackedLinear, PackedEmbedding)
        return
    for module in model.modules():
        if isinstance(module, (*Linear, VocabParallelEmbedding)):
            module.weight.data = module.weight.data.t().contiguous().t()


def quantize(model: PanguModel) -> None:
    """Replace the linear layers and the word embedding by 8-bit ones, in place. The model can then no longer be trained or saved."""
    assert model.context.tensor.size == 1, "a rank's scales would be those of its slice"
    _replace(model, Int8Linear, Int8Embedding)


def _replace(model: PanguModel, linear: Callable[[Tensor, Tensor], nn.Module], embedding: Callable[[Tensor], nn.Module]) -> None:
    """Replace the linear layers and the word embedding by modules built from their weights and biases."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear):
                setattr(module, name, linear(child.weight, child.bias))
            elif isinstance(child, VocabParallelEmbedding):
                setattr(module, name, embedding(child.weight))


class PackedLinear(nn.Module):
    """y = x Wᵀ + b in fp32, with W packed once in oneDNN's block format. torch's own BLAS does not pack it, or packs it at each call.

    The result of a row of x does not depend on the other rows.
    """

    packed_OI: Tensor
    """The packed weight, an opaque tensor whose memory cannot be read."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        # Without the number of rows as a hint: blocks chosen for one row are read more slowly, even with one.
        packed_OI = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach().contiguous(), None)
        self.register_buffer("packed_OI", packed_OI, persistent=False)
        self.bias = bias_O

    def forward(self, x_BSI: Tensor) -> Tensor:
        """Apply the layer."""
        return torch.ops.mkldnn._linear_pointwise(x_BSI, self.packed_OI, self.bias, "none", [], "")


class PackedEmbedding(nn.Module):
    """A table of V rows and the output layer that is tied to it, for which a packed copy of the table is kept."""

    def __init__(self, weight_VH: Tensor) -> None:
        super().__init__()
        self.weight = weight_VH
        self.output = PackedLinear(weight_VH, None)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Look ids up: ids_BS int64 -> x_BSH."""
        return F.embedding(ids_BS, self.weight)

    def logits(self, x_BSH: Tensor) -> Tensor:
        """Scores of all ids: x_BSH -> [B, S, V]."""
        return self.output(x_BSH)


class Int8Matrix(nn.Module):
    """A matrix W [O, I] in 8 bits, with a scale per row.

    Inputs are quantized to 8 bits with a scale per position, so that a row's result does not depend on the rows beside
    it; the sums are whole numbers and exact.
    """

    values_OI: Tensor
    scale_O: Tensor

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        weight_OI = weight_OI.detach()
        scale_O = _scale(weight_OI, MAX_WEIGHT)
        self.register_buffer("values_OI", (weight_OI / scale_O).round().to(torch.int8))
        self.register_buffer("scale_O", scale_O.squeeze(-1))

    def multiply(self, x_BSI: Tensor) -> Tensor:
        """x Wᵀ: [B, S, O]."""
        scale_BS1 = _scale(x_BSI, MAX_ACTIVATION)
        rounded_BSI = (x_BSI / scale_BS1).round().to(torch.int8)
        sums = torch._int_mm(rounded_BSI.flatten(0, 1), self.values_OI.t())
        return sums.unflatten(0, x_BSI.shape[:2]) * self.scale_O * scale_BS1


class Int8Linear(Int8Matrix):
    """y = x Wᵀ + b."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor) -> None:
        super().__init__(weight_OI)
        self.bias = bias_O

    def forward(self, x_BSI: Tensor) -> Tensor:
        """Apply the layer."""
        return self.multiply(x_BSI) + self.bias


class Int8Embedding(Int8Matrix):
    """A table of V rows in 8 bits, and the output layer that is tied to it."""

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Look ids up: ids_BS int64 -> x_BSH."""
        return self.values_OI[ids_BS] * self.scale_O[ids_BS].unsqueeze(-1)

    def logits(self, x_BSH: Tensor) -> Tensor:
        """Scores of all ids: x_BSH -> [B, S, V]."""
        return self.multiply(x_BSH)


def _scale(x: Tensor, largest: int) -> Tensor:
    """Quantization scale of each row of the last dimension: the value of one step, if its greatest absolute value maps to `largest`."""
    return x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-20) / largest
