"""PanGu-α written down once more, from its mathematics: dense, in float64, in plain numpy, without a line of the model's code.

It is as slow and as plain as the formulas. Parameters come by canonical name, matrices as [out, in].

Shapes: B micro-batch, S sequence, H hidden, F feed-forward, N heads, D head dimension (H = N·D), V vocabulary, P positions;
in attention Q counts the positions that ask and K those that answer, both are S.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ids = NDArray[np.int64]
Parameters = Mapping[str, Array]

EPSILON = 1e-5
"""Under the root of every LayerNorm."""


@dataclass(frozen=True)
class Network:
    """What the parameters' shapes do not tell."""

    num_layers: int
    """Transformer layers, the query layer included: it is the last."""
    num_heads: int
    gelu: str
    """`tanh`, `erf` or `sigmoid`."""
    final_norm: str
    """`before_query` or `after_query`."""
    within_documents: bool
    """Whether a position sees only its own document. Otherwise it sees everything up to itself."""


def loss(network: Network, parameters: Parameters, tokens_BS: Ids, position_ids_BS: Ids, labels_BS: Ids, loss_mask_BS: Array) -> float:
    """Mean of -log p(label) over the positions whose mask is 1; 0 where there is none."""
    z_BSV = logits(network, parameters, tokens_BS, position_ids_BS)
    highest_BS1 = z_BSV.max(axis=-1, keepdims=True)
    log_p_BSV = z_BSV - highest_BS1 - np.log(np.exp(z_BSV - highest_BS1).sum(axis=-1, keepdims=True))
    log_p_BS = np.take_along_axis(log_p_BSV, labels_BS[..., None], axis=-1)[..., 0]
    return float(-(log_p_BS * loss_mask_BS).sum() / max(loss_mask_BS.sum(), 1.0))


def logits(network: Network, parameters: Parameters, tokens_BS: Ids, position_ids_BS: Ids) -> Array:
    """Scores of every next token, [B, S, V]. The table of words is read twice: at the bottom by id, at the top as a matrix."""
    words_VH = parameters["transformer.wte.weight"]
    visible_BQK = visible(position_ids_BS, within_documents=network.within_documents)
    x_BSH = words_VH[tokens_BS] + parameters["transformer.wpe.weight"][position_ids_BS]
    for index in range(network.num_layers - 1):
        x_BSH = layer(network, parameters, f"transformer.h.{index}", x_BSH, visible_BQK)
    top, final = f"transformer.h.{network.num_layers - 1}", "transformer.ln_f"
    asked_BSH = parameters["transformer.wqe.weight"][position_ids_BS]
    if network.final_norm == "before_query":
        x_BSH = layer(network, parameters, top, layer_norm(parameters, final, x_BSH), visible_BQK, asked_BSH)
    elif network.final_norm == "after_query":
        x_BSH = layer_norm(parameters, final, layer(network, parameters, top, x_BSH, visible_BQK, asked_BSH))
    else:
        raise ValueError(network.final_norm)
    return x_BSH @ words_VH.T


def layer(
    network: Network, parameters: Parameters, name: str, x_BSH: Array, visible_BQK: NDArray[np.bool_], asked_BSH: Array | None = None
) -> Array:
    """x + Attention(LN₁ x), then x + MLP(LN₂ x). The query layer projects `asked_BSH` as it is to its queries; others project LN₁ x."""
    normal_BSH = layer_norm(parameters, f"{name}.ln_1", x_BSH)
    q_BSH = linear(parameters, f"{name}.attn.q_proj", normal_BSH if asked_BSH is None else asked_BSH)
    k_BSH = linear(parameters, f"{name}.attn.k_proj", normal_BSH)
    v_BSH = linear(parameters, f"{name}.attn.v_proj", normal_BSH)
    heads_BSH = attention(q_BSH, k_BSH, v_BSH, visible_BQK, num_heads=network.num_heads)
    x_BSH = x_BSH + linear(parameters, f"{name}.attn.c_proj", heads_BSH)
    inner_BSF = linear(parameters, f"{name}.mlp.c_fc", layer_norm(parameters, f"{name}.ln_2", x_BSH))
    return x_BSH + linear(parameters, f"{name}.mlp.c_proj", ACTIVATIONS[network.gelu](inner_BSF))


def attention(q_BSH: Array, k_BSH: Array, v_BSH: Array, visible_BQK: NDArray[np.bool_], *, num_heads: int) -> Array:
    """softmax(q·k / √D) v of one head after the other: head n owns the features n·D to (n + 1)·D, in and out."""
    size, heads = q_BSH.shape[-1] // num_heads, []
    for first in range(0, num_heads * size, size):
        q_BQD, k_BKD, v_BKD = (x_BSH[:, :, first : first + size] for x_BSH in (q_BSH, k_BSH, v_BSH))
        scores_BQK = np.where(visible_BQK, q_BQD @ k_BKD.swapaxes(1, 2) / math.sqrt(size), -np.inf)
        weights_BQK = np.exp(scores_BQK - scores_BQK.max(axis=-1, keepdims=True))
        heads.append(weights_BQK / weights_BQK.sum(axis=-1, keepdims=True) @ v_BKD)
    return np.concatenate(heads, axis=-1)


def visible(position_ids_BS: Ids, *, within_documents: bool) -> NDArray[np.bool_]:
    """Which keys each query sees, [B, Q, K]: none ahead; and of those behind, where documents count, as many as its place in its own."""
    place_S = np.arange(position_ids_BS.shape[1])
    behind_QK = place_S[:, None] - place_S
    reach_BS = position_ids_BS if within_documents else np.full_like(position_ids_BS, len(place_S))
    return (behind_QK >= 0) & (behind_QK <= reach_BS[:, :, None])


def layer_norm(parameters: Parameters, name: str, x_BSH: Array) -> Array:
    """(x - mean) / √(variance + ε) · weight + bias over H; the variance divides by H."""
    centred_BSH = x_BSH - x_BSH.mean(axis=-1, keepdims=True)
    variance_BS1 = (centred_BSH**2).mean(axis=-1, keepdims=True)
    return centred_BSH / np.sqrt(variance_BS1 + EPSILON) * parameters[f"{name}.weight"] + parameters[f"{name}.bias"]


def linear(parameters: Parameters, name: str, x_BSI: Array) -> Array:
    """W x + b at every position."""
    return x_BSI @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"]


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _gelu_erf(x: Array) -> Array:
    return x * 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def _gelu_sigmoid(x: Array) -> Array:
    return x / (1.0 + np.exp(-1.702 * x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"tanh": _gelu_tanh, "erf": _gelu_erf, "sigmoid": _gelu_sigmoid}
