"""Causal softmax attention between any range of queries and any range of keys of one sequence.

The blockwise form and the log-sum-exp that joins blocks: T. Dao et al., arXiv 2205.14135; H. Liu et al. (ring
attention), arXiv 2310.01889.

Legend: B batch, T queries, S keys, H query heads, G key and value heads, K head dimension.
"""

from torch import Tensor

from .portable import Attention, Positions, attend_, attend_backward_, nothing_seen

__all__ = ["Positions", "attend_", "attend_backward_", "attention", "nothing_seen"]


def attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    *,
    query_start: int = 0,
    key_start: int = 0,
    document_begin: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of queries at global positions query_start + t to keys at key_start + s, causal. Returns (out, lse).

    Args:
        q_BTHK: queries. k_BSGK, v_BSGK: keys and values; query head h uses head h // (H / G).
        query_start, key_start: global position of the first query and of the first key.
        document_begin: int64 (B or 1, T), the global position where each query's document begins; earlier keys are
            invisible. Best on the CPU, whatever the device: it decides what is computed.
        scale: factor of the scores, K^-1/2 by default.

    out_BTHK has the dtype of the queries; lse_BTH, the log-sum-exp of the scaled scores, is float32 (float64 for
    float64). A query that sees no key has out 0 and lse -inf. Gradients flow through both, so that results over
    different keys can be joined: lse = logaddexp(a, b), out = exp(a - lse) out_a + exp(b - lse) out_b.

    Scores are never held for all pairs, and blocks that are wholly invisible are not computed.

    Raises:
        ValueError: if shapes or dtypes do not agree.
    """
    batch, length, heads, head_dim = q_BTHK.shape
    keys, kv_heads = k_BSGK.shape[1:3]
    if tuple(k_BSGK.shape) != (batch, keys, kv_heads, head_dim) or v_BSGK.shape != k_BSGK.shape:
        raise ValueError(
            f"attention: keys {tuple(k_BSGK.shape)} and values {tuple(v_BSGK.shape)} do not fit queries "
            f"{tuple(q_BTHK.shape)}; expected ({batch}, keys, heads, {head_dim}) for both"
        )
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"attention: {heads} query heads are not a multiple of {kv_heads} key and value heads")
    if not q_BTHK.dtype == k_BSGK.dtype == v_BSGK.dtype:
        raise ValueError(f"attention: dtypes differ: {q_BTHK.dtype}, {k_BSGK.dtype}, {v_BSGK.dtype}")
    if document_begin is not None and tuple(document_begin.shape) not in ((1, length), (batch, length)):
        raise ValueError(
            f"attention: document_begin has shape {tuple(document_begin.shape)}, expected ({batch} or 1, {length})"
        )
    scale = head_dim**-0.5 if scale is None else scale
    return Attention.apply(q_BTHK, k_BSGK, v_BSGK, Positions(query_start, key_start, document_begin), scale)
