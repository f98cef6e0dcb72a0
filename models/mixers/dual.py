"""A state space dual split along the sequence: what Mamba-2, RetNet and linear attention share.

    S_t = e^{log_decay_t} S_{t-1} + x_t B_t'        y_t = S_t C_t

Each shard computes the state that leaves it, and while that travels all that its chunks of tokens give their own
outputs, which is most of the work; the state that enters joins last. In the backward pass the state's gradient travels
at the same place.

Shapes: B batch, T local tokens, H heads, P head width, G groups of heads that share B and C, N state.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...kernels import begin_state_space_dual, state_space_dual
from ...parallel import SequenceShard, Transition, begin_prefix_state


def split_dual(
    x_BTHP: Tensor,
    log_decay_BTH: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    transition: Transition,
    shard: SequenceShard,
    initial_BHPN: Tensor | None = None,
) -> tuple[Tensor, Callable[[], Tensor]]:
    """(y_BTHP at this shard's tokens, in the dtype of x, what gives the state after the last of them).

    Args:
        transition: how all of this shard's decays act on a state, and whether a document begins in it.
        initial_BHPN: the state before the sequence, the same on every process; by default zeros.
    """
    sequences, starts_BT = (x_BTHP, log_decay_BTH, B_BTGN, C_BTGN), shard.start_mask(x_BTHP.device)
    if shard.size == 1:
        y_BTHP, leaving_BHPN = state_space_dual(*sequences, initial_state=initial_BHPN, document_starts=starts_BT)
        return y_BTHP, lambda: leaving_BHPN
    stages = begin_state_space_dual(*sequences, document_starts=starts_BT)
    pending = begin_prefix_state(transition, stages.leaving, shard, initial=initial_BHPN)
    stages.compute_local()
    entering_BHPN = pending.wait()
    y_BTHP = stages.finish(entering_BHPN)
    return y_BTHP, lambda: transition.after(entering_BHPN, stages.leaving, shard.local_length)
