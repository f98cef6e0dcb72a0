"""Gated linear attention: a matrix state that decays by key, differently at every token.

Origin: S. Yang and others, arXiv 2312.06635; github.com/fla-org/flash-linear-attention (ops/gla). RWKV-6's recurrence
is of this form, apart from its bonus for the current token. Legend: B batch, T tokens, H heads, K key width, V value
width.
"""

import torch
from torch import Tensor

from .. import triton_support
from ..arguments import compute_dtype, expect_shape
from ..documents import checked_starts
from ..living import NothingLeft, add_to_heads, groups_of_heads, reach_of_heads
from ..segments import segment_tokens, walk
from .portable import BLOCK, CHUNK, readout_segment, segment

__all__ = ["gated_linear_attention", "gated_linear_attention_readout"]


def gated_linear_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTHK: Tensor,
    *,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T and y_t = S_t^T q_t. Returns (y_BTHV, final_state_BHKV).

    Args:
        q_BTHK, k_BTHK, v_BTHV: queries (already scaled), keys, values; float32, float64, bfloat16 or float16. y has
            the dtype of the values.
        log_decay_BTHK: logarithm of the decay of each key row, not above zero; any size below.
        initial_state: (B, H, K, V) state before the first token; zeros by default. Differentiable.
        document_starts: boolean (B or 1, T); at a True token the state before it is forgotten.

    Computes in float32, or in float64 if any argument is. Memory is that of the arguments, a few chunks, and one state
    per segment.

    Raises:
        ValueError: if shapes do not agree.
    """
    batch, length, heads, key_width = q_BTHK.shape
    value_width = v_BTHV.shape[-1]
    operation = "gated linear attention"
    expect_shape(operation, "k_BTHK", k_BTHK, (batch, length, heads, key_width))
    expect_shape(operation, "v_BTHV", v_BTHV, (batch, length, heads, value_width))
    expect_shape(operation, "log_decay_BTHK", log_decay_BTHK, (batch, length, heads, key_width))
    expect_shape(operation, "initial_state", initial_state, (batch, heads, key_width, value_width))
    starts_BT = checked_starts(document_starts, batch, length)
    sequences = (q_BTHK, k_BTHK, v_BTHV, log_decay_BTHK)
    dtype = compute_dtype(*sequences, initial_state)
    if initial_state is None:
        initial_state = torch.zeros(batch, heads, key_width, value_width, dtype=dtype, device=q_BTHK.device)

    if triton_support.takes(*sequences, initial_state):
        from .triton_gated import TritonGated, fits

        if fits(q_BTHK, v_BTHV):
            return TritonGated.apply(*sequences, initial_state.to(dtype), starts_BT)

    def one_segment(state, cut, parameters, starts):
        return segment(state, cut, starts)

    return walk(
        one_segment,
        initial_state.to(dtype),
        sequences,
        segment=segment_tokens(CHUNK, batch * heads * key_width * BLOCK, q_BTHK.device),
        starts_BT=starts_BT,
    )


def gated_linear_attention_readout(
    state_BHKV: Tensor, q_BTHK: Tensor, log_decay_BTHK: Tensor, *, document_starts: Tensor | None = None
) -> Tensor:
    """What a state that enters before the first token adds to the outputs: y_t = state^T (q_t exp(sum of log decays)).

    By linearity, a recurrence from zero plus this is the recurrence from `state_BHKV`. The work stops, for each head,
    where the decay has left less of its slowest key than the dtype can show, and at a sequence's first document start.

    Returns y_BTHV in the dtype of the computation; gradients flow to the state, the queries and the decays.

    Raises:
        ValueError: if shapes do not agree.
    """
    batch, heads, key_width, value_width = state_BHKV.shape
    length = q_BTHK.shape[1]
    operation = "gated linear attention read-out"
    expect_shape(operation, "q_BTHK", q_BTHK, (batch, length, heads, key_width))
    expect_shape(operation, "log_decay_BTHK", log_decay_BTHK, (batch, length, heads, key_width))
    starts_BT = checked_starts(document_starts, batch, length)
    dtype = compute_dtype(state_BHKV, q_BTHK, log_decay_BTHK)
    state_BHKV = state_BHKV.to(dtype)
    if triton_support.takes(state_BHKV, q_BTHK, log_decay_BTHK):
        from ..triton_readout import WIDEST, TritonReadout

        if max(key_width, value_width) <= WIDEST:
            return TritonReadout.apply(state_BHKV, log_decay_BTHK, q_BTHK, starts_BT)
    y_BTHV = torch.zeros(batch, length, heads, value_width, dtype=dtype, device=state_BHKV.device)
    reach_HK = reach_of_heads(log_decay_BTHK.flatten(2), dtype, starts_BT).view(heads, key_width)
    groups_of_equals = groups_of_heads(reach_HK.amax(1))
    if not groups_of_equals:
        return NothingLeft.apply(y_BTHV, state_BHKV, q_BTHK, log_decay_BTHK)
    parts = [
        walk(
            readout_segment,
            state_BHKV[:, heads_K],
            (q_BTHK[:, :tokens, heads_K], log_decay_BTHK[:, :tokens, heads_K]),
            segment=segment_tokens(CHUNK, batch * len(heads_K) * (key_width + value_width), y_BTHV.device),
            starts_BT=None if starts_BT is None else starts_BT[:, :tokens],
        )[0]
        for heads_K, tokens in groups_of_equals
    ]
    return add_to_heads(y_BTHV, groups_of_equals, parts)
