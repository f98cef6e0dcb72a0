"""A memory S of values by keys that every token multiplies by a matrix of its own, over a sequence that is split.

    S_t = S_{t-1} (diag(w_t) + a_t b_t') + v_t k_t'          y_t = S_t r_t

The equations are `kernels.wkv7`'s. A shard's tokens act on the memory that enters as the product of their matrices: two
matrices N x N a head cross a boundary, whatever the length. Shapes: B batch, T local tokens, H heads, N head width.
"""

from __future__ import annotations

from torch import Tensor

from ..kernels import wkv7, wkv7_transition
from ..parallel import Dense, SequenceShard, prefix_state


def matrix_memory(
    r_BTHN: Tensor,
    log_w_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHN: Tensor,
    a_BTHN: Tensor,
    b_BTHN: Tensor,
    shard: SequenceShard,
    initial_BHNN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, N) at this shard's tokens, and the memory after the last; it is empty where a document begins.

    `initial_BHNN`: the memory before the sequence, where there is one, the same on every process.
    """
    sequences = (r_BTHN, log_w_BTHN, k_BTHN, v_BTHN, a_BTHN, b_BTHN)
    initial_BHNN = initial_BHNN if shard.rank == 0 else None
    starts_BT, entering_BHNN = shard.start_mask(r_BTHN.device), initial_BHNN
    if shard.size > 1:
        _, own_BHNN = wkv7(*sequences, initial_state=initial_BHNN, document_starts=starts_BT)
        transition = Dense(wkv7_transition(log_w_BTHN, a_BTHN, b_BTHN), shard.reset_mask(r_BTHN.device))
        # memories are values by keys and transitions act on keys: the prefix is over transposed memories
        entering_BHNN = prefix_state(transition, own_BHNN.mT.contiguous(), shard).mT
        if initial_BHNN is not None:
            entering_BHNN = entering_BHNN + initial_BHNN
    return wkv7(*sequences, initial_state=entering_BHNN, document_starts=starts_BT)
