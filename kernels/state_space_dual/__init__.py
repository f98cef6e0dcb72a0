"""State-space duality (Mamba-2): a recurrence with one decay per head and token, whose state is a matrix.

Origin: T. Dao and A. Gu, arXiv 2405.21060; github.com/state-spaces/mamba (ssd_combined.py). With constant decays it is
retention (arXiv 2307.08621). Offsets are 64-bit and states pass gradients both ways, at any length. Legend: B batch,
T tokens, H heads, P head width, G groups of heads that share B and C, N states.
"""

import torch
from torch import Tensor

from .. import triton_support
from ..documents import checked_starts
from ..living import NothingLeft, add_to_heads, groups_of_heads, reach_of_heads
from ..segments import expect_shape, segment_tokens, state_dtype, walk
from .portable import readout_segment, segment

__all__ = ["state_space_dual", "state_space_dual_readout"]


def state_space_dual(
    x_BTHP: Tensor,
    log_decay_BTH: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    *,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
    chunk_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(log_decay_t) S_{t-1} + x_t B_t^T and y_t = S_t C_t per head. Returns (y_BTHP, final_state_BHPN).

    Args:
        x_BTHP: inputs, already times the step size; float32, float64, bfloat16 or float16. y has its dtype.
        log_decay_BTH: logarithm of each token's decay (step size times A), not above zero.
        B_BTGN, C_BTGN: input and output projections; head h uses group h // (H / G).
        initial_state: (B, H, P, N) state before the first token; zeros by default. Differentiable.
        document_starts: boolean (B or 1, T); at a True token the state before it is forgotten.
        chunk_size: tokens that are computed as masked attention; the result does not depend on it.

    Computes in float32, or in float64 if any argument is; sums of log decays always in float64. Memory is that of the
    arguments, a few chunks, and one state per segment of at least four chunks.

    Raises:
        ValueError: if shapes do not agree or H is not a multiple of G.
    """
    batch, length, heads, width = x_BTHP.shape
    groups, states = B_BTGN.shape[2:]
    if heads % groups:
        raise ValueError(f"state-space dual: {heads} heads cannot share {groups} groups; use a divisor of {heads}")
    if chunk_size < 1:
        raise ValueError(f"state-space dual: chunk_size is {chunk_size}, must be at least 1")
    expect_shape("state-space dual", "log_decay_BTH", log_decay_BTH, (batch, length, heads))
    expect_shape("state-space dual", "B_BTGN", B_BTGN, (batch, length, groups, states))
    expect_shape("state-space dual", "C_BTGN", C_BTGN, (batch, length, groups, states))
    expect_shape("state-space dual", "initial_state", initial_state, (batch, heads, width, states))
    starts_BT = checked_starts(document_starts, batch, length)
    dtype = state_dtype(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN, initial_state)
    if initial_state is None:
        initial_state = torch.zeros(batch, heads, width, states, dtype=dtype, device=x_BTHP.device)

    if triton_support.takes(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN, initial_state):
        from .triton_dual import TritonDual, fits

        if fits(x_BTHP, B_BTGN):
            return TritonDual.apply(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN, initial_state.to(dtype), starts_BT)

    def one_segment(state, sequences, parameters, starts):
        return segment(chunk_size, state, sequences, starts)

    return walk(
        one_segment,
        initial_state.to(dtype),
        (x_BTHP, log_decay_BTH, B_BTGN, C_BTGN),
        segment=segment_tokens(chunk_size, batch * heads * max(chunk_size, width), x_BTHP.device),
        starts_BT=starts_BT,
    )


def state_space_dual_readout(
    state_BHPN: Tensor,
    log_decay_BTH: Tensor,
    C_BTGN: Tensor,
    *,
    onto: Tensor | None = None,
    document_starts: Tensor | None = None,
) -> Tensor:
    """What a state that enters before the first token adds to the outputs: y_t = exp(sum of log decays) state C_t.

    By linearity, a recurrence from zero plus this is the recurrence from `state_BHPN`. The work stops, for each head,
    where the decay has left less than the dtype can show, and at a sequence's first document start.

    Args:
        state_BHPN: the state that enters. log_decay_BTH, C_BTGN, document_starts: as in `state_space_dual`.
        onto: y_BTHP to which it is added, in place if it has the dtype of the computation: only the tokens that the
            state reaches are touched. Zeros by default.

    Returns y_BTHP in the dtype of the computation; gradients flow to the state, the decays, C and `onto`.

    Raises:
        ValueError: if shapes do not agree or H is not a multiple of G.
    """
    batch, heads, width, states = state_BHPN.shape
    length, groups = C_BTGN.shape[1:3]
    if heads % groups:
        raise ValueError(f"state-space dual: {heads} heads cannot share {groups} groups; use a divisor of {heads}")
    expect_shape("state-space dual", "log_decay_BTH", log_decay_BTH, (batch, length, heads))
    expect_shape("state-space dual", "C_BTGN", C_BTGN, (batch, length, groups, states))
    starts_BT = checked_starts(document_starts, batch, length)
    dtype = state_dtype(state_BHPN, log_decay_BTH, C_BTGN)
    state_BHPN = state_BHPN.to(dtype)
    if triton_support.takes(state_BHPN, log_decay_BTH, C_BTGN):
        from ..triton_readout import WIDEST, TritonReadout

        if max(width, states) <= WIDEST:
            y_BTHP = TritonReadout.apply(state_BHPN.mT, log_decay_BTH.unsqueeze(-1), C_BTGN, starts_BT)
            return y_BTHP if onto is None else onto + y_BTHP
    groups_of_equals = groups_of_heads(reach_of_heads(log_decay_BTH, dtype, starts_BT))
    if not groups_of_equals:
        nothing = NothingLeft.apply(state_BHPN.new_zeros(1, 1, 1, 1), state_BHPN, log_decay_BTH, C_BTGN)
        return nothing.expand(batch, length, heads, width) if onto is None else onto + nothing
    reach = max(tokens for _, tokens in groups_of_equals)
    log_decay_BRH, C_BRGN = log_decay_BTH[:, :reach], C_BTGN[:, :reach]
    parts = [
        walk(
            readout_segment,
            state_BHPN[:, heads_K],
            (log_decay_BRH[:, :tokens, heads_K], C_BRGN[:, :tokens].index_select(2, heads_K // (heads // groups))),
            segment=segment_tokens(64, batch * len(heads_K) * (width + states), state_BHPN.device),
            starts_BT=None if starts_BT is None else starts_BT[:, :tokens],
        )[0]
        for heads_K, tokens in groups_of_equals
    ]
    y_BTHP = state_BHPN.new_zeros(batch, length, heads, width) if onto is None else onto.to(dtype)
    return add_to_heads(y_BTHP, groups_of_equals, parts)
