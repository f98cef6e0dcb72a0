"""Causal softmax attention with all scores in memory. The oracle of the tests.

Legend: B batch, T queries, S keys, H query heads, G key and value heads, K head dimension.
"""

import torch
from torch import Tensor


def attention_reference(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    *,
    query_start: int = 0,
    key_start: int = 0,
    document_begin: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Query at global position i sees keys at global positions from its document's begin to i. Returns (out, lse)."""
    length, heads, head_dim = q_BTHK.shape[1:]
    keys, kv_heads = k_BSGK.shape[1:3]
    k_BSHK = k_BSGK.repeat_interleave(heads // kv_heads, 2)
    v_BSHK = v_BSGK.repeat_interleave(heads // kv_heads, 2)
    scores = torch.einsum("bthk,bshk->bths", q_BTHK, k_BSHK) * (head_dim**-0.5 if scale is None else scale)
    query = query_start + torch.arange(length, device=scores.device)[None, :, None]
    key = key_start + torch.arange(keys, device=scores.device)[None, None, :]
    visible = key <= query
    if document_begin is not None:
        visible = visible & (key >= document_begin[:, :, None])
    visible_BT1S = visible[:, :, None, :]
    lse_BTH = scores.masked_fill(~visible_BT1S, -torch.inf).logsumexp(-1)
    seen_BT11 = visible_BT1S.any(-1, keepdim=True)
    lse_safe = torch.where(seen_BT11, lse_BTH.unsqueeze(-1), 0.0)
    weights = torch.where(visible_BT1S, torch.exp(scores.masked_fill(~visible_BT1S, 0.0) - lse_safe), 0.0)
    return torch.einsum("bths,bshk->bthk", weights, v_BSHK), lse_BTH
