"""A state space dual split along the sequence: what Mamba-2, RetNet and linear attention share.

    S_t = e^{log_decay_t} S_{t-1} + x_t B_t'        y_t = S_t C_t

Each shard computes the state that leaves it, and while that travels all that its chunks of tokens give their own
outputs, which is most of the work; the state that enters joins last. In the backward pass the state's gradient travels
at the same place.

Shapes: B batch, T local tokens, H heads, P head width, G groups of heads that share B and C, N state.
"""

from __future__ import annotations

from torch import Tensor

from ...kernels import DualStages, begin_state_space_dual, state_space_dual
from ...parallel import SequenceShard, Transition, begin_prefix_state


def split_dual(
    x_BTHP: Tensor, log_decay_BTH: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, transition: Transition, shard: SequenceShard
) -> Tensor:
    """y_BTHP at this shard's tokens, in the dtype of x.

    `transition`: how all of this shard's decays act on a state, and whether a document begins in it.
    """
    starts_BT = shard.start_mask(x_BTHP.device)
    if shard.size == 1:
        return state_space_dual(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN, document_starts=starts_BT)[0]
    stages = begin_state_space_dual(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN, document_starts=starts_BT)
    return stages.finish(_travelling_meanwhile(stages, stages.leaving, transition, shard))


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
    if shard.size == 1:
        return state_space_dual(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN, initial_state=state_BHPN)

    def after(entering_BHPN: Tensor) -> Tensor:
        return stages.leaving + transition.apply(transition.travelling(), shard.local_length, entering_BHPN)

    stages = begin_state_space_dual(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN)
    if shard.rank == 0:
        _travelling_meanwhile(stages, after(state_BHPN), transition, shard)
        entering_BHPN = state_BHPN
    else:
        entering_BHPN = _travelling_meanwhile(stages, stages.leaving, transition, shard)
    return stages.finish(entering_BHPN), after(entering_BHPN)


def _travelling_meanwhile(
    stages: DualStages, leaving_BHPN: Tensor, transition: Transition, shard: SequenceShard
) -> Tensor:
    """The state that enters, awaited after the local outputs are computed."""
    entering = begin_prefix_state(transition, leaving_BHPN, shard)
    stages.compute_local()
    return entering.wait()
