"""Core attention, softmax(Q Kᵀ / √D) V, behind one signature: `eager` is the reference, `sdpa` and `npu_fusion` are fused.

Shapes: B micro-batch, N heads on this rank, S queries, K keys, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.random import RngStreams


def document_mask(position_ids_BS: Tensor) -> Tensor:
    """Attention mask for samples that hold several documents: each query sees the keys of its own document up to itself.

    A document begins where the position id is 0, so the position ids alone determine the documents.

    Shapes: position_ids_BS int64 -> bool [B, 1, S, S], True where visible.
    """
    document_BS = (position_ids_BS == 0).cumsum(dim=-1)
    same = document_BS.unsqueeze(-1) == document_BS.unsqueeze(-2)
    return (same & causal_mask(position_ids_BS.shape[-1], position_ids_BS.device)).unsqueeze(1)


def causal_mask(length: int, device: torch.device) -> Tensor:
    """bool [S, S], True where the key is not later than the query."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def core_attention(
    q_BNSD: Tensor,
    k_BNKD: Tensor,
    v_BNKD: Tensor,
    mask: Tensor | None,
    *,
    implementation: str,
    dropout: float,
    rng: RngStreams,
) -> Tensor:
    """Attention of each head.

    Args:
        q_BNSD: queries.
        k_BNKD: keys.
        v_BNKD: values.
        mask: bool, broadcastable to [B, 1, S, K], True where visible; every query must see a key. None: causal, and then S = K.
        implementation: `eager`, `sdpa` or `npu_fusion`.
        dropout: probability with which an attention weight is dropped; 0 outside training.
        rng: dropout draws from its tensor-parallel stream, since each rank holds different heads.

    Returns:
        [B, N, S, D], dtype of the queries.
    """
    attend = IMPLEMENTATIONS[implementation]
    if dropout == 0.0:
        return attend(q_BNSD, k_BNKD, v_BNKD, mask, 0.0)
    with rng.tensor_parallel():
        return attend(q_BNSD, k_BNKD, v_BNKD, mask, dropout)


def _eager(q_BNSD: Tensor, k_BNKD: Tensor, v_BNKD: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    if mask is None:
        mask = causal_mask(q_BNSD.shape[-2], q_BNSD.device)
    # Scaled before the product: fp16 scores of the original overflowed when they were divided after it.
    scores_BNSK = (q_BNSD / math.sqrt(q_BNSD.shape[-1])) @ k_BNKD.transpose(-1, -2)
    weights_BNSK = scores_BNSK.float().masked_fill(~mask, float("-inf")).softmax(dim=-1).to(q_BNSD.dtype)
    return F.dropout(weights_BNSK, dropout) @ v_BNKD


def _sdpa(q_BNSD: Tensor, k_BNKD: Tensor, v_BNKD: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    return F.scaled_dot_product_attention(q_BNSD, k_BNKD, v_BNKD, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)


def _npu_fusion(q_BNSD: Tensor, k_BNKD: Tensor, v_BNKD: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    import torch_npu

    if mask is None:
        # sparse_mode 2 is causal and expects one compressed triangle of 2048 × 2048, True where hidden, whatever the real length.
        hidden, sparse_mode = ~causal_mask(2048, q_BNSD.device), 2
    else:
        hidden, sparse_mode = ~mask, 0
    output_BNSD: Tensor = torch_npu.npu_fusion_attention(
        q_BNSD,
        k_BNKD,
        v_BNKD,
        q_BNSD.shape[1],
        "BNSD",
        atten_mask=hidden,
        scale=1.0 / math.sqrt(q_BNSD.shape[-1]),
        keep_prob=1.0 - dropout,
        sparse_mode=sparse_mode,
    )[0]
    return output_BNSD


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]] = {
    "eager": _eager,
    "sdpa": _sdpa,
    "npu_fusion": _npu_fusion,
}
