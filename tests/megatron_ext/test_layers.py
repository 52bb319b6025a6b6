"""The parallel layers against dense torch, in float64, with no parameter at zero: outputs, gradients of inputs and of every parameter."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.harness import run_distributed
from helpers.ranks import share, tensor_groups
from torch import Tensor, nn

from megatron_ext.context import ParallelContext
from megatron_ext.errors import LayoutError
from megatron_ext.layers import (
    ColumnParallelLinear,
    Embedding,
    LayerNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    enter_tensor_parallel,
    mask_padded_ids,
    split_sequence,
)
from megatron_ext.sharding import Init, ShardSpec, canonical_parameters
from megatron_ext.topology import Group

B, S, H, O = 2, 8, 12, 20  # noqa: E741  (the legend of the layers)
INIT = Init("normal", 1.0)


def seeded(name: str, shape: tuple[int, ...]) -> Tensor:
    """The same numbers for the same name on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())), dtype=torch.float64)


def rows(x: Tensor, group: Group, dim: int) -> Tensor:
    return share(x, group.rank, group.size, dim)


def fill(local: Tensor, spec: ShardSpec, rank: int, size: int) -> None:
    full = seeded(spec.name, spec.shape)
    local.copy_(full if spec.split_dim is None else share(full, rank, size, spec.split_dim))


class Case:
    """One layer on one layout beside its dense twin, whose parameters are plain leaves under the canonical names."""

    def __init__(self, group: Group, sequence_parallel: bool) -> None:
        self.group = group
        self.context = ParallelContext(tensor=group, sequence_parallel=sequence_parallel, dtype=torch.float64, fill=fill)
        self.dense: dict[str, Tensor] = {}

    def parameter(self, name: str, *shape: int) -> Tensor:
        self.dense[name] = seeded(name, shape).requires_grad_()
        return self.dense[name]

    def stream(self, x: Tensor) -> Tensor:
        """What this rank holds of a tensor on the residual stream."""
        return rows(x, self.group, 1) if self.context.splits_sequence else x

    def check(
        self,
        module: nn.Module,
        mine: Tensor,
        expected: Tensor,
        cut: Callable[[Tensor], Tensor],
        inputs: tuple[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]], ...] = (),
    ) -> None:
        """Compare values, send the same random gradient through both and compare what arrives.

        `cut` takes this rank's part out of the dense result; `inputs` are (mine, dense, cut).
        """
        torch.testing.assert_close(mine, cut(expected), rtol=1e-12, atol=1e-12)
        upstream = seeded("upstream", tuple(expected.shape))
        (mine * cut(upstream)).sum().backward()
        (expected * upstream).sum().backward()
        for x, dense, cut_input in inputs:
            torch.testing.assert_close(x.grad, cut_input(dense.grad), rtol=1e-11, atol=1e-11, msg=lambda text: f"input: {text}")
        seen = set()
        for spec, parameter in canonical_parameters(module):
            gradient = self.dense[spec.name].grad
            expected_gradient = gradient if spec.split_dim is None else rows(gradient, self.group, spec.split_dim)
            torch.testing.assert_close(
                parameter.grad, expected_gradient, rtol=1e-11, atol=1e-11, msg=lambda text, spec=spec: f"{spec.name}: {text}"
            )
            assert parameter.model_parallel == (spec.split_dim is not None and self.group.size > 1), spec.name
            seen.add(spec.name)
        assert seen == self.dense.keys()


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def check_column(case: Case) -> None:
    dense = leaf(seeded("x", (B, S, H)))
    x = leaf(case.stream(dense))
    layer = ColumnParallelLinear(H, O, case.context, name="column", init=INIT)
    expected = F.linear(dense, case.parameter("column.weight", O, H), case.parameter("column.bias", O))
    y = layer(enter_tensor_parallel(x, case.context))
    case.check(layer, y, expected, lambda t: rows(t, case.group, -1), ((x, dense, case.stream),))


def check_row(case: Case) -> None:
    dense = leaf(seeded("x", (B, S, O)))
    x = leaf(rows(dense, case.group, -1))
    layer = RowParallelLinear(O, H, case.context, name="row", init=INIT)
    expected = F.linear(dense, case.parameter("row.weight", H, O), case.parameter("row.bias", H))
    case.check(layer, layer(x), expected, case.stream, ((x, dense, lambda t: rows(t, case.group, -1)),))


def check_layer_norm(case: Case) -> None:
    dense = leaf(seeded("x", (B, S, H)) * 3 + 1)
    x = leaf(case.stream(dense))
    layer = LayerNorm(H, case.context, name="norm", eps=1e-3)
    weight, bias = case.parameter("norm.weight", H), case.parameter("norm.bias", H)
    variance, mean = torch.var_mean(dense, dim=-1, unbiased=False, keepdim=True)
    expected = (dense - mean) / (variance + 1e-3).sqrt() * weight + bias
    case.check(layer, layer(x), expected, case.stream, ((x, dense, case.stream),))


def check_positions(case: Case) -> None:
    ids = torch.arange(B * S).reshape(B, S) % 7
    layer = Embedding(9, H, case.context, name="positions", init=INIT)
    expected = case.parameter("positions.weight", 9, H)[ids]
    case.check(layer, split_sequence(layer(ids), case.context), expected, case.stream)


def check_words(case: Case, vocab_size: int) -> None:
    """Every id is looked up, and more than once."""
    ids = (torch.arange(B * S * 4).reshape(B, S * 4) * 3) % vocab_size
    layer = VocabParallelEmbedding(vocab_size, H, case.context, name="words", init=INIT)
    expected = case.parameter("words.weight", vocab_size, H)[ids]
    case.check(layer, layer(ids), expected, case.stream)


def check_logits(case: Case, vocab_size: int) -> None:
    dense = leaf(seeded("x", (B, S, H)))
    x = leaf(case.stream(dense))
    layer = VocabParallelEmbedding(vocab_size, H, case.context, name="words", init=INIT)
    expected = F.linear(dense, case.parameter("words.weight", vocab_size, H))
    case.check(layer, layer.logits(x), expected, lambda t: rows(t, case.group, -1), ((x, dense, case.stream),))


def check_network(case: Case) -> None:
    """All of them in a row, the table tied: a gradient that is right in each layer but summed once too often between two shows here."""
    vocab_size, ids, position_ids = 50, torch.arange(B * S).reshape(B, S) * 3, torch.arange(S).expand(B, S)
    context = case.context
    network = nn.ModuleDict(
        {
            "words": VocabParallelEmbedding(vocab_size, H, context, name="words", init=INIT),
            "positions": Embedding(S, H, context, name="positions", init=INIT),
            "norm": LayerNorm(H, context, name="norm"),
            "column": ColumnParallelLinear(H, O, context, name="column", init=INIT),
            "row": RowParallelLinear(O, H, context, name="row", init=INIT),
        }
    )
    x = network["words"](ids) + split_sequence(network["positions"](position_ids), context)
    x = x + network["row"](F.gelu(network["column"](enter_tensor_parallel(network["norm"](x), context))))
    logits = network["words"].logits(x)

    words, positions = case.parameter("words.weight", vocab_size, H), case.parameter("positions.weight", S, H)
    dense = words[ids] + positions[position_ids]
    normed = F.layer_norm(dense, (H,), case.parameter("norm.weight", H), case.parameter("norm.bias", H))
    inner = F.gelu(F.linear(normed, case.parameter("column.weight", O, H), case.parameter("column.bias", O)))
    dense = dense + F.linear(inner, case.parameter("row.weight", H, O), case.parameter("row.bias", H))
    case.check(network, logits, F.linear(dense, words), lambda t: rows(t, case.group, -1))


CHECKS: dict[str, Callable[[Case], None]] = {
    "column": check_column,
    "row": check_row,
    "layer norm": check_layer_norm,
    "positions": check_positions,
    "words 50": lambda case: check_words(case, 50),
    "words 5": lambda case: check_words(case, 5),
    "logits 50": lambda case: check_logits(case, 50),
    "logits 5": lambda case: check_logits(case, 5),
    "network": check_network,
}


def check_everything() -> list[str]:
    done = []
    for group in tensor_groups():
        for sequence_parallel in (False, True):
            for name, check in CHECKS.items():
                label = f"{name}, T={group.size}, sequence parallel {sequence_parallel}"
                try:
                    check(Case(group, sequence_parallel))
                except Exception as error:
                    raise AssertionError(label) from error
                done.append(label)
    return done


def test_layers_equal_dense_torch() -> None:
    for done in run_distributed(check_everything, 4):
        assert len(done) == 3 * 2 * len(CHECKS)


def test_rows_of_a_tiny_vocabulary() -> None:
    """Five ids over four ranks: 2, 2, 1 and 0 of them are real, every rank holds two rows, and the padding is zero."""
    real = []
    for rank in range(4):
        context = ParallelContext(tensor=Group((0, 1, 2, 3), rank), fill=fill)
        layer = VocabParallelEmbedding(5, H, context, name="words", init=INIT)
        assert layer.weight.shape == (2, H)
        real.append(int(layer.weight.detach().ne(0).any(dim=1).sum()))
    assert real == [2, 2, 1, 0]


@pytest.mark.parametrize(("first_id", "real"), [(0, 4), (4, 2), (8, 0), (2, 4), (3, 3)])
def test_padded_ids_are_masked(first_id: int, real: int) -> None:
    logits = torch.arange(8.0).reshape(2, 4) + 1
    masked = mask_padded_ids(logits, first_id, vocab_size=6)
    assert torch.equal(masked[:, :real], logits[:, :real])
    assert (masked[:, real:] == float("-inf")).all()
    assert torch.equal(logits, torch.arange(8.0).reshape(2, 4) + 1)


@pytest.mark.parametrize(("kind", "what"), [(ColumnParallelLinear, r"\[6, 8\]"), (RowParallelLinear, r"\[8, 6\]")])
def test_features_that_do_not_divide_are_refused(kind: type[nn.Module], what: str) -> None:
    context = ParallelContext(tensor=Group((0, 1, 2, 3), 0))
    with pytest.raises(LayoutError, match=rf"layer\.weight: dimension \d of {what} does not divide by tensor-parallel size 4"):
        kind(*((8, 6) if kind is ColumnParallelLinear else (6, 8)), context, name="layer", init=INIT)
