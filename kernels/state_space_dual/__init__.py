"""State-space duality (Mamba-2): a recurrence with one decay per head and token, whose state is a matrix.

Origin: T. Dao and A. Gu, arXiv 2405.21060; github.com/state-spaces/mamba (ssd_combined.py). With constant decays it is
retention (arXiv 2307.08621). Offsets are 64-bit and states pass gradients both ways, at any length. Legend: B batch,
T tokens, H heads, P head width, G groups of heads that share B and C, N states.
"""

import torch
from torch import Tensor

from .. import triton_support
from ..arguments import compute_dtype, expect_shape
from ..documents import checked_starts
from ..stages import Stages
from .pieces import Plan, sums_of_chunks
from .stages import PortableStages
from .whole import Whole

__all__ = ["begin_state_space_dual", "state_space_dual"]


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
    arguments, those sums, a few chunks, and one state per segment of at least four chunks.

    Raises:
        ValueError: if shapes do not agree or H is not a multiple of G.
    """
    batch, length, heads, width = x_BTHP.shape
    _check(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN, chunk_size)
    shape = (batch, heads, width, B_BTGN.shape[3])
    expect_shape("state-space dual", "initial_state", initial_state, shape)
    starts_BT = checked_starts(document_starts, batch, length)
    dtype = compute_dtype(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN, initial_state)
    if initial_state is None:
        initial_state = torch.zeros(shape, dtype=dtype, device=x_BTHP.device)
    initial_state = initial_state.to(dtype)
    if _takes_triton(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN, initial_state):
        from .triton_dual import TritonDual

        return TritonDual.apply(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN, initial_state, starts_BT)
    chunk = min(chunk_size, max(length, 1))
    plan, sums_BMQH = Plan.make(x_BTHP, chunk, dtype, starts_BT), sums_of_chunks(log_decay_BTH, chunk)
    return Whole.apply(plan, x_BTHP, sums_BMQH, B_BTGN, C_BTGN, initial_state)


def begin_state_space_dual(
    x_BTHP: Tensor,
    log_decay_BTH: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    *,
    document_starts: Tensor | None = None,
    chunk_size: int = 128,
) -> Stages:
    """`state_space_dual` of a part of a sequence, in stages: the state that leaves, (B, H, P, N), is known before the
    outputs are. See `Stages`.

    Arguments and errors are those of `state_space_dual`. Between the stages, and for the backward pass, there is one
    state for each chunk beside the arguments and the sums of log decays. On Triton the stages are the state that leaves
    from zero, the outputs from zero, and the read-out of the entering state, which is a pass of its own there; the
    gradients of x and B come with the first.
    """
    batch, length = x_BTHP.shape[:2]
    _check(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN, chunk_size)
    starts_BT = checked_starts(document_starts, batch, length)
    if _takes_triton(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN):
        from .triton_stages import TritonStages

        return TritonStages(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN, starts_BT)
    dtype = compute_dtype(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN)
    chunk = min(chunk_size, max(length, 1))
    return PortableStages(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN, starts_BT, chunk, dtype)


def _check(x_BTHP: Tensor, log_decay_BTH: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, chunk_size: int) -> None:
    batch, length, heads, _ = x_BTHP.shape
    groups, states = B_BTGN.shape[2:]
    if heads % groups:
        raise ValueError(f"state-space dual: {heads} heads cannot share {groups} groups; use a divisor of {heads}")
    if chunk_size < 1:
        raise ValueError(f"state-space dual: chunk_size is {chunk_size}, must be at least 1")
    expect_shape("state-space dual", "log_decay_BTH", log_decay_BTH, (batch, length, heads))
    expect_shape("state-space dual", "B_BTGN", B_BTGN, (batch, length, groups, states))
    expect_shape("state-space dual", "C_BTGN", C_BTGN, (batch, length, groups, states))


def _takes_triton(x_BTHP: Tensor, log_decay_BTH: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, *state: Tensor) -> bool:
    if not triton_support.takes(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN, *state):
        return False
    from .triton_dual import fits

    return fits(x_BTHP, B_BTGN)
