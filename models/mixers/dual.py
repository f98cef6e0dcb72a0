"""Reading a prompt with a state space dual: what Mamba-2, RetNet and linear attention share beside their parallel form.

    S_t = e^{log_decay_t} S_{t-1} + x_t B_t'        y_t = S_t C_t

Shapes: B batch, T local tokens, H heads, P head width, G groups of heads that share B and C, N state.
"""

from __future__ import annotations

from torch import Tensor

from ...kernels import state_space_dual, state_space_dual_readout
from ...parallel import SequenceShard, Transition, prefix_state


def dual_prefill(
    x_BTHP: Tensor,
    log_decay_BTH: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    state_BHPN: Tensor,
    transition: Transition,
    shard: SequenceShard,
) -> tuple[Tensor, Tensor]:
    """One document after `state_BHPN`, the same on every process: (y, the state after this shard's last token).

    `transition`: how all of this shard's decays act on a state.
    """
    initial_BHPN = state_BHPN if shard.rank == 0 else None
    y_BTHP, leaving_BHPN = state_space_dual(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN, initial_state=initial_BHPN)
    if shard.size == 1:
        return y_BTHP, leaving_BHPN
    entering_BHPN = prefix_state(transition, leaving_BHPN, shard)
    y_BTHP = state_space_dual_readout(entering_BHPN, log_decay_BTH, C_BTGN, onto=y_BTHP)
    moved_BHPN = transition.apply(transition.travelling(), shard.local_length, entering_BHPN)
    return y_BTHP, leaving_BHPN + moved_BHPN
