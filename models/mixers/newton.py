"""A recurrence that is nonlinear in its state, solved for all tokens at once (DEER: Lim et al., arXiv 2309.12252).

    s_t = f(x_t, s_{t-1})

Newton's method on the whole trajectory: around the states of the last round every token is an affine map,
s_t = J_t s_{t-1} + b_t with J_t = df/ds, and the composition of affine maps is a prefix, within a shard and between
shards (`parallel.prefix_state`). Each round is exact one token further at least, and near the solution the error is
squared: a handful of rounds where the recurrence itself is bounded. The gradient is that of the solution, through one
more round whose J_t are constants.

Shapes: B batch, T local tokens, M features of a token, S numbers of the state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels.autograd import own_precision
from ...parallel import Dense, SequenceShard, global_sum, prefix_state

Recurrence = Callable[[Tensor, Tensor], Tensor]
"""(features (R, M), states before (R, S)) -> states after (R, S), row by row."""

ROUNDS = 100
"""More than any trajectory that settles has been seen to need."""


@own_precision
def newton_states(step: Recurrence, x_BTM: Tensor, initial_BS: Tensor, shard: SequenceShard) -> Tensor:
    """The state after each of this shard's tokens (B, T, S), from `initial_BS` at the beginning of every document.

    Differentiable in all that `step` uses, the features and the initial state.

    Raises:
        ValueError: it does not settle; the recurrence itself grows without bound then.
    """
    first_BT1 = first_tokens(shard, x_BTM.device).unsqueeze(-1)
    with torch.no_grad():
        entering_BTS = initial_BS.unsqueeze(1).expand(-1, x_BTM.shape[1], -1)
        for _ in range(ROUNDS):
            jacobian_BTSS = jacobians(step, x_BTM, entering_BTS)
            leaving_BTS, before_BS = one_round(step, x_BTM, entering_BTS, jacobian_BTSS, initial_BS, first_BT1, shard)
            previous_BTS = torch.cat([before_BS.unsqueeze(1), leaving_BTS[:, :-1]], dim=1)
            following_BTS = torch.where(first_BT1, initial_BS.unsqueeze(1), previous_BTS)
            moved = (following_BTS - entering_BTS).square().sum()
            moved, size = global_sum(torch.stack([moved, following_BTS.square().sum()]), shard)
            entering_BTS = following_BTS
            if moved.sqrt() <= 100 * torch.finfo(moved.dtype).eps * size.sqrt():
                break
        else:
            raise ValueError("conba: the states do not settle in Newton's rounds; set conba.solver=turns")
        jacobian_BTSS = jacobians(step, x_BTM, entering_BTS)
    return one_round(step, x_BTM, entering_BTS, jacobian_BTSS, initial_BS, first_BT1, shard)[0]


def jacobians(step: Recurrence, x_BTM: Tensor, entering_BTS: Tensor) -> Tensor:
    """df/ds of every token: (B, T, S, S)."""

    def one(x_M: Tensor, state_S: Tensor) -> Tensor:
        return step(x_M.unsqueeze(0), state_S.unsqueeze(0)).squeeze(0)

    of_rows = torch.func.vmap(torch.func.jacrev(one, argnums=1))
    jacobian_RSS = of_rows(x_BTM.detach().flatten(0, 1), entering_BTS.flatten(0, 1))
    return jacobian_RSS.unflatten(0, x_BTM.shape[:2])


def one_round(
    step: Recurrence,
    x_BTM: Tensor,
    entering_BTS: Tensor,
    jacobian_BTSS: Tensor,
    initial_BS: Tensor,
    first_BT1: Tensor,
    shard: SequenceShard,
) -> tuple[Tensor, Tensor]:
    """States after every token of the recurrence made affine around `entering_BTS`, and the one before this shard."""
    stepped_BTS = step(x_BTM.flatten(0, 1), entering_BTS.flatten(0, 1)).view_as(entering_BTS)
    offset_BTS = stepped_BTS - _times(jacobian_BTSS, entering_BTS)
    # a document's first token meets the initial state, whatever came before
    offset_BTS = offset_BTS + torch.where(first_BT1, _times(jacobian_BTSS, initial_BS.unsqueeze(1)), 0.0)
    map_BTSS = jacobian_BTSS.masked_fill(first_BT1.unsqueeze(-1), 0)
    map_BTSS, offset_BTS = compose(map_BTSS, offset_BTS)
    before_BS = torch.zeros_like(offset_BTS[:, 0])
    if shard.size > 1:
        own_BHSM = offset_BTS[:, -1, None, :, None]
        before_BS = prefix_state(Dense(map_BTSS[:, -1, None]), own_BHSM, shard)[:, 0, :, 0]
        offset_BTS = offset_BTS + _times(map_BTSS, before_BS.unsqueeze(1))
    return offset_BTS, before_BS


def compose(map_BTSS: Tensor, offset_BTS: Tensor) -> tuple[Tensor, Tensor]:
    """Of affine maps, each one after all before it (Hillis and Steele's scan)."""
    reach = 1
    while reach < map_BTSS.shape[1]:
        later, earlier = map_BTSS[:, reach:], map_BTSS[:, :-reach]
        moved_BTS = offset_BTS[:, reach:] + _times(later, offset_BTS[:, :-reach])
        offset_BTS = torch.cat([offset_BTS[:, :reach], moved_BTS], dim=1)
        map_BTSS = torch.cat([map_BTSS[:, :reach], later @ earlier], dim=1)
        reach *= 2
    return map_BTSS, offset_BTS


def first_tokens(shard: SequenceShard, device: torch.device) -> Tensor:
    """(B or 1, T) bool: where a document begins, the sequence's first token among them."""
    positions_T = torch.arange(shard.start, shard.stop, device=device)
    return positions_T == shard.document_begin(device)


def _times(map_BTSS: Tensor, state_BTS: Tensor) -> Tensor:
    return (map_BTSS @ state_BTS.unsqueeze(-1)).squeeze(-1)
