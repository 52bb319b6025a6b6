"""The model against its own mathematics in numpy: logits, loss and gradients of every dialect, and errors that the comparison must notice.

The model runs in float64, so that it is held to 1e-10. Two places of it compute in fp32 whatever they are given: the softmax of `eager`
attention, and the cross-entropy with its gradient. What passes through them is held to less; gradients are compared once more with a
cross-entropy in float64 in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import numpy_reference
from helpers.numpy_reference import Array, Ids, Network, Parameters
from numpy.typing import NDArray
from torch import Tensor

from megatron_ext import attention as model_attention
from megatron_ext import cross_entropy as model_cross_entropy
from megatron_ext.context import ParallelContext
from megatron_ext.sharding import ShardSpec, canonical_parameters
from pangu.config import ModelConfig
from pangu.model.block import RunOptions
from pangu.model.model import PanguModel

# No two sides are equal where they need not be, and F is not 4·H.
LAYERS, HIDDEN, HEADS, FEATURES, VOCAB, POSITIONS = 3, 12, 3, 20, 29, 11
BATCH, LENGTH = 2, 9

EXACT = 1e-10
"""Of logits in float64: 2e-14 is usual."""
SINGLE = 2e-6
"""Of a loss or a gradient that passes through fp32: 5e-7 is usual."""
SLOPE = 1e-8
STEP = 1e-5
"""Of the central differences. What they leave out, STEP² times a third derivative, and rounding over STEP are both below SLOPE."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch in numpy."""

    tokens_BS: Ids
    position_ids_BS: Ids
    labels_BS: Ids
    loss_mask_BS: Array

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The arguments of `PanguModel.forward`."""
        tokens, position_ids, labels = (torch.from_numpy(ids) for ids in (self.tokens_BS, self.position_ids_BS, self.labels_BS))
        return tokens, position_ids, labels, torch.from_numpy(self.loss_mask_BS.astype(np.float32))


@cache
def batch(*, restarts: bool) -> Batch:
    """Samples of two and of three documents, one of which is a single token, or without any border; six positions carry no loss."""
    draw = np.random.default_rng(11)
    ids = draw.integers(VOCAB, size=(BATCH, LENGTH + 1))
    places = [[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 0, 1, 2, 3, 4, 5]] if restarts else [list(range(LENGTH))] * BATCH
    loss_mask = np.ones((BATCH, LENGTH))
    loss_mask[[0, 0, 1, 1, 1, 1], [3, 8, 0, 1, 2, 7]] = 0.0
    return Batch(np.ascontiguousarray(ids[:, :-1]), np.array(places), np.ascontiguousarray(ids[:, 1:]), loss_mask)


def network(gelu: str = "tanh", final_norm: str = "before_query", *, within_documents: bool = True) -> Network:
    return Network(LAYERS, HEADS, gelu, final_norm, within_documents)


def model_of(net: Network, *, dtype: torch.dtype = torch.float64, attention: str = "sdpa", recompute: str = "none") -> PanguModel:
    """The model with the parameters of `weights()`."""
    config = ModelConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, num_heads=HEADS, ffn_hidden_size=FEATURES, vocab_size=VOCAB, max_positions=POSITIONS,
        gelu=net.gelu, final_norm=net.final_norm, attention=attention, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip

    def fill(local: Tensor, spec: ShardSpec, rank: int, size: int) -> None:
        local.copy_(torch.from_numpy(weights()[spec.name]))

    options = RunOptions(recompute=recompute, reset_at_document=net.within_documents)
    return PanguModel(config, ParallelContext(dtype=dtype, fill=fill), options)


@cache
def weights() -> dict[str, Array]:
    """Every parameter by canonical name, so large that each changes the logits: attention is uneven, and no gain is 1 and no bias 0."""
    square, block = (HIDDEN, HIDDEN), {}
    for index in range(LAYERS):
        of = f"transformer.h.{index}."
        block |= {f"{of}attn.{part}_proj.weight": square for part in "qkvc"} | {f"{of}attn.{part}_proj.bias": (HIDDEN,) for part in "qkvc"}
        block |= {f"{of}{norm}.{kind}": (HIDDEN,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
        block |= {f"{of}mlp.c_fc.weight": (FEATURES, HIDDEN), f"{of}mlp.c_fc.bias": (FEATURES,)}
        block |= {f"{of}mlp.c_proj.weight": (HIDDEN, FEATURES), f"{of}mlp.c_proj.bias": (HIDDEN,)}
    tables = {"transformer.wte.weight": (VOCAB, HIDDEN)} | {f"transformer.{table}.weight": (POSITIONS, HIDDEN) for table in ("wpe", "wqe")}
    shapes = {**tables, **block, "transformer.ln_f.weight": (HIDDEN,), "transformer.ln_f.bias": (HIDDEN,)}
    draw = np.random.default_rng(7)
    deviation = {1: 0.3, 2: 0.4}
    values = {name: draw.normal(0.0, deviation[len(shape)], shape) for name, shape in shapes.items()}
    return {name: value + 1.0 if ".ln_" in name and name.endswith("weight") else value for name, value in values.items()}


def logits_of(model: PanguModel, given: Batch) -> Array:
    tokens, position_ids, _, _ = given.tensors()
    with torch.no_grad():
        return model.logits(tokens, position_ids).double().numpy()


def loss_of(model: PanguModel, given: Batch) -> float:
    with torch.no_grad():
        return model(*given.tensors()).item()


def gradients(model: PanguModel, given: Batch, *, exact: bool) -> dict[str, Array]:
    """By canonical name. `exact`: of a cross-entropy in float64 over the model's logits, else of the model's own loss."""
    tokens, position_ids, labels, mask = given.tensors()
    model.zero_grad()
    if exact:
        each_N = F.cross_entropy(model.logits(tokens, position_ids).flatten(0, 1), labels.flatten(), reduction="none")
        loss = (each_N * mask.flatten()).sum() / mask.sum()
    else:
        loss = model(tokens, position_ids, labels, mask)
    loss.backward()
    return {spec.name: parameter.grad.double().numpy().copy() for spec, parameter in canonical_parameters(model)}


def reference_logits(net: Network, parameters: Parameters, given: Batch) -> Array:
    return numpy_reference.logits(net, parameters, given.tokens_BS, given.position_ids_BS)


def reference_loss(net: Network, parameters: Parameters, given: Batch) -> float:
    return numpy_reference.loss(net, parameters, given.tokens_BS, given.position_ids_BS, given.labels_BS, given.loss_mask_BS)


def directions(name: str) -> list[Array]:
    """Where the slope of the loss is measured: along two single elements of a parameter, and along all of them at once; of length 1."""
    shape = weights()[name].shape
    draw = np.random.default_rng(list(name.encode()))
    elements = [np.zeros(shape) for _ in range(2)]
    for element in elements:
        element[tuple(draw.integers(side) for side in shape)] = 1.0
    return [*elements, draw.choice([-1.0, 1.0], shape) / math.sqrt(math.prod(shape))]


@cache
def slopes(net: Network, *, restarts: bool) -> dict[str, list[float]]:
    """Central differences of the reference's loss, by parameter and direction."""

    def moved(name: str, by: Array) -> float:
        return reference_loss(net, {**weights(), name: weights()[name] + by}, batch(restarts=restarts))

    return {name: [(moved(name, STEP * d) - moved(name, -STEP * d)) / (2 * STEP) for d in directions(name)] for name in weights()}


def slope_errors(found: dict[str, Array], expected: dict[str, list[float]]) -> dict[str, float]:
    """How far a model's gradients lie from the slopes, at worst, by parameter."""
    assert found.keys() == expected.keys()
    pairs = {name: zip(directions(name), expected[name], strict=True) for name in expected}
    return {name: float(np.max([abs((found[name] * d).sum() - slope) for d, slope in pairs[name]])) for name in pairs}


def not_below(tolerance: float, errors: dict[str, float]) -> dict[str, float]:
    """Those that are too large or no number."""
    return {name: error for name, error in errors.items() if not error < tolerance}


GELUS = ("tanh", "erf", "sigmoid")
NORMS = ("before_query", "after_query")
# Whether attention stays inside documents, and whether positions restart. The third is no recipe of training, but the model allows it.
ARRANGEMENTS = {"documents": (True, True), "causal": (False, False), "causal, positions restart": (False, True)}
every_dialect = pytest.mark.parametrize(
    ("net", "restarts"),
    [
        pytest.param(network(gelu, norm, within_documents=within), restarts, id=f"{gelu}-{norm}-{title}")
        for gelu in GELUS
        for norm in NORMS
        for title, (within, restarts) in ARRANGEMENTS.items()
    ],
)


def test_the_model_has_the_parameters_of_the_reference() -> None:
    shapes = {spec.name: tuple(parameter.shape) for spec, parameter in canonical_parameters(model_of(network()))}
    assert shapes == {name: value.shape for name, value in weights().items()}


@every_dialect
def test_logits_and_loss_equal_the_reference(net: Network, restarts: bool) -> None:
    given, model = batch(restarts=restarts), model_of(net)
    expected, expected_loss = reference_logits(net, weights(), given), reference_loss(net, weights(), given)
    assert np.abs(logits_of(model, given) - expected).max() < EXACT
    assert abs(loss_of(model, given) - expected_loss) < SINGLE
    assert abs(model(*given.tensors()).item() - expected_loss) < SINGLE  # with gradients: another way through the code


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-5), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("within_documents", "restarts"), [(True, True), (False, False)])
def test_both_attentions_in_both_precisions(
    within_documents: bool, restarts: bool, dtype: torch.dtype, tolerance: float, attention: str
) -> None:
    net, given = network(within_documents=within_documents), batch(restarts=restarts)
    model = model_of(net, dtype=dtype, attention=attention)
    assert np.abs(logits_of(model, given) - reference_logits(net, weights(), given)).max() < tolerance
    assert abs(loss_of(model, given) - reference_loss(net, weights(), given)) < tolerance


def test_a_document_gives_what_it_gives_alone() -> None:
    net, given = network(), batch(restarts=True)
    alone = reference_logits(net, weights(), Batch(*(field[:1, 4:] for field in vars(given).values())))
    assert np.abs(logits_of(model_of(net), given)[0, 4:] - alone[0]).max() < EXACT


def test_where_no_position_counts_the_loss_and_its_gradients_are_zero() -> None:
    given = replace(batch(restarts=True), loss_mask_BS=np.zeros((BATCH, LENGTH)))
    model = model_of(network())
    assert loss_of(model, given) == reference_loss(network(), weights(), given) == 0.0
    assert all(not gradient.any() for gradient in gradients(model, given, exact=False).values())


@pytest.mark.parametrize(
    ("net", "restarts"),
    [
        pytest.param(network(gelu, norm, within_documents=within), within, id=f"{gelu}-{norm}-{'documents' if within else 'causal'}")
        for gelu, norm, within in [*product(GELUS, NORMS, [True]), *product(["tanh"], NORMS, [False])]
    ],
)
def test_gradients_equal_finite_differences(net: Network, restarts: bool) -> None:
    given, expected, model = batch(restarts=restarts), slopes(net, restarts=restarts), model_of(net)
    for exact, tolerance in ((True, SLOPE), (False, SINGLE)):
        assert not_below(tolerance, slope_errors(gradients(model, given, exact=exact), expected)) == {}
    # Softmax does not see what is added to all keys alike; everything else moves the loss, or its comparison would show nothing.
    still = {name for name, found in expected.items() if max(map(abs, found)) < 1e-4}
    assert still == {f"transformer.h.{index}.attn.k_proj.bias" for index in range(LAYERS)}


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients_with_recomputation_equal_finite_differences(attention: str, recompute: str) -> None:
    model = model_of(network(), attention=attention, recompute=recompute)
    errors = slope_errors(gradients(model, batch(restarts=True), exact=False), slopes(network(), restarts=True))
    assert not_below(SINGLE, errors) == {}


def test_gradients_of_a_loss_in_chunks_equal_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_cross_entropy, "CHUNK_LOGITS", 4 * VOCAB)
    errors = slope_errors(gradients(model_of(network()), batch(restarts=True), exact=False), slopes(network(), restarts=True))
    assert not_below(SINGLE, errors) == {}


# Planted errors: the comparison must notice each. A `Change` is what the reference alone is given.

Change = Callable[[Network, dict[str, Array], Batch], tuple[Network, dict[str, Array], Batch]]


def swapped(one: str, other: str) -> Change:
    """Two parameters of equal shape take each other's place in every layer that has them."""

    def name_of(name: str) -> str:
        return name.replace(one, other) if one in name else name.replace(other, one)

    return lambda net, parameters, given: (net, {name_of(name): value for name, value in parameters.items()}, given)


def transposed(part: str) -> Change:
    """A square matrix is read as [in, out]."""
    return lambda net, parameters, given: (net, {name: value.T if part in name else value for name, value in parameters.items()}, given)


def other_network(**changes: object) -> Change:
    return lambda net, parameters, given: (replace(net, **changes), parameters, given)


def other_batch(change: Callable[[Batch], Batch]) -> Change:
    return lambda net, parameters, given: (net, parameters, change(given))


WRONG_LOGITS: dict[str, Change] = {
    "gelu erf": other_network(gelu="erf"),
    "gelu sigmoid": other_network(gelu="sigmoid"),
    "final norm after": other_network(final_norm="after_query"),
    "documents see each other": other_network(within_documents=False),
    "positions do not restart": other_batch(lambda given: replace(given, position_ids_BS=batch(restarts=False).position_ids_BS)),
    "other heads": other_network(num_heads=2),
    "queries and keys": swapped("q_proj", "k_proj"),
    "keys and values": swapped("k_proj", "v_proj"),
    "the two norms of a layer": swapped("ln_1", "ln_2"),
    "positions and questions": swapped("wpe", "wqe"),
    "queries transposed": transposed("q_proj.weight"),
    "values transposed": transposed("v_proj.weight"),
    "output projection transposed": transposed("attn.c_proj.weight"),
}
WRONG_LOSS: dict[str, Change] = {
    "no loss mask": other_batch(lambda given: replace(given, loss_mask_BS=np.ones_like(given.loss_mask_BS))),
    "mask shifted": other_batch(lambda given: replace(given, loss_mask_BS=np.roll(given.loss_mask_BS, 1, axis=1))),
    "labels not shifted": other_batch(lambda given: replace(given, labels_BS=given.tokens_BS)),
}


def differences(model: PanguModel, given: Batch, net: Network, parameters: Parameters, reference_given: Batch) -> tuple[float, float]:
    """Of the logits, at worst, and of the loss."""
    apart = np.abs(logits_of(model, given) - reference_logits(net, parameters, reference_given)).max()
    return float(apart), abs(loss_of(model, given) - reference_loss(net, parameters, reference_given))


@pytest.mark.parametrize("error", WRONG_LOGITS)
def test_a_wrong_network_is_noticed(error: str) -> None:
    net, given = network(), batch(restarts=True)
    of_logits, of_loss = differences(model_of(net), given, *WRONG_LOGITS[error](net, weights(), given))
    assert of_logits > 1e-4
    assert of_loss > 10 * SINGLE


@pytest.mark.parametrize("error", WRONG_LOSS)
def test_a_wrong_loss_is_noticed(error: str) -> None:
    net, given = network(), batch(restarts=True)
    of_logits, of_loss = differences(model_of(net), given, *WRONG_LOSS[error](net, weights(), given))
    assert of_logits < EXACT
    assert of_loss > 1e-3


def visible_otherwise(error: str) -> Callable[..., NDArray[np.bool_]]:
    """A reference's mask that is off by one position at one of its two borders."""

    def visible(position_ids_BS: Ids, *, within_documents: bool) -> NDArray[np.bool_]:
        place_S = np.arange(LENGTH)
        behind_QK = place_S[:, None] - place_S
        ahead = 1 if error == "one ahead" else 0
        further = {"one of the document before": 1, "not the first of a document": -1}.get(error, 0)
        reach_BS = np.maximum(position_ids_BS + further, 0)
        return (behind_QK >= -ahead) & (behind_QK <= reach_BS[:, :, None])

    return visible


@pytest.mark.parametrize(
    ("error", "noticed"),
    [("one ahead", True), ("one of the document before", True), ("not the first of a document", True), ("none", False)],
)
def test_a_mask_that_is_off_by_one_is_noticed(error: str, noticed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_reference, "visible", visible_otherwise(error))
    of_logits, _ = differences(model_of(network()), batch(restarts=True), network(), weights(), batch(restarts=True))
    assert of_logits > 1e-2 if noticed else of_logits < EXACT


@pytest.mark.parametrize("within_documents", [True, False])
def test_a_shifted_mask_in_the_model_is_noticed(within_documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_ahead(length: int, device: torch.device) -> Tensor:
        return torch.ones(length, length, dtype=torch.bool, device=device).tril(1)

    net, given = network(within_documents=within_documents), batch(restarts=within_documents)
    monkeypatch.setattr(model_attention, "causal_mask", one_ahead)
    of_logits, _ = differences(model_of(net, attention="eager"), given, net, weights(), given)
    assert of_logits > 1e-2


def test_another_epsilon_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_reference, "EPSILON", 1e-6)
    of_logits, _ = differences(model_of(network()), batch(restarts=True), network(), weights(), batch(restarts=True))
    assert of_logits > 1e-6


def test_a_parameter_left_out_is_noticed() -> None:
    net, given, model = network(), batch(restarts=True), model_of(network())
    for name, value in weights().items():
        of_logits, of_loss = differences(model, given, net, {**weights(), name: np.zeros_like(value)}, given)
        assert (of_logits > 1e-3 and of_loss > 10 * SINGLE) or name.endswith("k_proj.bias"), name


def test_gradients_of_another_activation_are_noticed() -> None:
    errors = slope_errors(gradients(model_of(network("erf")), batch(restarts=True), exact=True), slopes(network(), restarts=True))
    assert min(error for name, error in errors.items() if not name.endswith("k_proj.bias")) > 100 * SLOPE


def test_a_lost_gradient_of_the_output_layer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_cross_entropy, "add_product_", lambda total, *_, **__: total.zero_())
    errors = slope_errors(gradients(model_of(network()), batch(restarts=True), exact=False), slopes(network(), restarts=True))
    assert not_below(SINGLE, errors).keys() == {"transformer.wte.weight"}
    assert errors["transformer.wte.weight"] > 1e-2
