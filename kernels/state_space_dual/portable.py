"""State-space duality in PyTorch: the three steps of some chunks, and their gradients.

With a_t the sum of the log decays of a chunk's tokens up to t, and S the state that enters the chunk:

    states    added = sum_s exp(a_last - a_s) x_s B_s'                   what the chunk adds to the state at its end
    local     y_t = sum_{s <= t} (C_t . B_s) exp(a_t - a_s) x_s          masked attention inside the chunk
    read-out  y_t += exp(a_t) S C_t                                      and S' = exp(a_last) S + added

Only the last needs the state. Exponents are differences of sums taken in double precision within the chunk, never
ratios: all are sums of log decays over a stretch, so nothing overflows. Their gradients come as those of a: what a pair
(t, s) adds to a_t it takes from a_s.

Legend: B batch, T tokens, H heads, P head width, G groups of heads that share B and C, R heads of a group (H = G R),
K = R P, N states, M chunks, Q tokens of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_LOG2_E = math.log2(math.e)


def chunked(x_BT: Tensor, chunk: int) -> Tensor:
    """(B, M, Q, ...): cut into chunks, the last one filled up with zeros."""
    length = x_BT.shape[1]
    padding = -length % chunk
    if padding:
        x_BT = torch.cat((x_BT, x_BT.new_zeros(x_BT.shape[0], padding, *x_BT.shape[2:])), 1)
    return x_BT.reshape(x_BT.shape[0], (length + padding) // chunk, chunk, *x_BT.shape[2:])


def documents_before(starts_BT: Tensor | None, chunk: int) -> Tensor | None:
    """(B or 1, M, Q): documents that have begun in the token's chunk up to and with it."""
    return None if starts_BT is None else chunked(starts_BT, chunk).long().cumsum(2)


def causal_pairs(chunk: int, count_BMQ: Tensor | None, device: torch.device) -> Tensor:
    """(Q, Q), or (B or 1, M, Q, Q) with documents: True where output t may see input s."""
    causal_QQ = torch.ones(chunk, chunk, dtype=torch.bool, device=device).tril_()
    if count_BMQ is None:
        return causal_QQ
    return causal_QQ & (count_BMQ.unsqueeze(3) == count_BMQ.unsqueeze(2))


def pass_states(
    state_BH: Tensor, added_BMH: Tensor, decay_BMH: Tensor, *, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """The states that enter each chunk (B, M, H, ...) and the last one: state' = decay state + added.

    `decay_BMH` has the leading dimensions of the state: one number for all the rest. `reverse`: from the last chunk to
    the first, as adjoints go.
    """
    decay_BMH = decay_BMH.reshape(*decay_BMH.shape, *([1] * (added_BMH.dim() - decay_BMH.dim())))
    order = slice(None, None, -1) if reverse else slice(None)
    entering = []
    for added, decay in zip(added_BMH.unbind(1)[order], decay_BMH.unbind(1)[order], strict=True):
        entering.append(state_BH)
        state_BH = torch.addcmul(added, decay, state_BH)
    return torch.stack(entering[order], 1) if entering else torch.empty_like(added_BMH), state_BH


@dataclass(frozen=True)
class Decays:
    """Decays of some chunks, in `dtype`.

    Attributes:
        sums_BMQH: log decays summed since the chunk's begin, in double precision.
        count_BMQ: see `documents_before`; None where no document begins.
    """

    sums_BMQH: Tensor
    count_BMQ: Tensor | None
    dtype: torch.dtype

    @cached_property
    def since_BMQH1(self) -> Tensor:
        """From the chunk's begin up to and with a token; zero once a document has begun."""
        decay_BMQH = self._exp(self.sums_BMQH)
        if self.count_BMQ is not None:
            decay_BMQH *= (self.count_BMQ == 0).unsqueeze(3)
        return decay_BMQH.unsqueeze(4)

    @cached_property
    def until_BMQH1(self) -> Tensor:
        """From after a token to the chunk's end; zero if a document begins there."""
        decay_BMQH = self._exp(self.sums_BMQH[:, :, -1:] - self.sums_BMQH)
        if self.count_BMQ is not None:
            decay_BMQH *= (self.count_BMQ == self.count_BMQ[..., -1:]).unsqueeze(3)
        return decay_BMQH.unsqueeze(4)

    @cached_property
    def whole_BMH(self) -> Tensor:
        """Of the whole chunk; zero if a document begins in it."""
        decay_BMH = self._exp(self.sums_BMQH[:, :, -1])
        return decay_BMH if self.count_BMQ is None else decay_BMH * (self.count_BMQ[..., -1:] == 0)

    def between_BMHQQ(self) -> Tensor:
        """From after token s up to and with t, at (t, s); zero where t does not see s."""
        exact_BMHQ = (self.sums_BMQH * _LOG2_E).transpose(2, 3).contiguous()
        pairs = causal_pairs(exact_BMHQ.shape[3], self.count_BMQ, exact_BMHQ.device)
        hidden = torch.zeros(pairs.shape, dtype=self.dtype, device=pairs.device).masked_fill_(~pairs, -torch.inf)
        sums_BMHQ = exact_BMHQ.to(self.dtype)
        exponent_BMHQQ = sums_BMHQ.unsqueeze(4) - sums_BMHQ.unsqueeze(3)
        if self.dtype != exact_BMHQ.dtype:
            # the difference may be far smaller than the sums: it gets back what rounding took from them
            lost_BMHQ = (exact_BMHQ - sums_BMHQ).to(self.dtype)
            exponent_BMHQQ.add_(lost_BMHQ.unsqueeze(4)).sub_(lost_BMHQ.unsqueeze(3))
        return exponent_BMHQQ.add_(hidden if hidden.dim() == 2 else hidden.unsqueeze(2)).exp2_()

    def _exp(self, exponent: Tensor) -> Tensor:
        """Powers of two: PyTorch's `exp` takes up to 80 times as long on a CPU where results are zero or denormal."""
        return (exponent * _LOG2_E).to(self.dtype).exp2_()


def states(x_BMQHP: Tensor, B_BMQGN: Tensor, decays: Decays) -> Tensor:
    """What each chunk adds to the state at its end, (B, M, H, P, N)."""
    left_BMGQK = _by_group(x_BMQHP * decays.until_BMQH1, B_BMQGN.shape[3])
    return _as_states(left_BMGQK.mT @ B_BMQGN.transpose(2, 3), x_BMQHP.shape[4])


def states_backward(
    grad_BMHPN: Tensor, x_BMQHP: Tensor, B_BMQGN: Tensor, decays: Decays
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (B, M, Q, H, P), B (B, M, Q, G, N) and the sums (B, M, Q, H)."""
    groups, width = B_BMQGN.shape[3], x_BMQHP.shape[4]
    grad_BMGKN, left_BMQHP = _grouped_states(grad_BMHPN, groups), x_BMQHP * decays.until_BMQH1
    grad_B = (_by_group(left_BMQHP, groups) @ grad_BMGKN).transpose(2, 3)
    grad_left = _by_head(B_BMQGN.transpose(2, 3) @ grad_BMGKN.mT, width)
    grad_sums = left_BMQHP.mul_(grad_left).sum(4).neg_()
    grad_sums[:, :, -1] -= grad_sums.sum(2)
    return grad_left * decays.until_BMQH1, grad_B, grad_sums


def local(x_BMQHP: Tensor, B_BMQGN: Tensor, C_BMQGN: Tensor, decays: Decays) -> Tensor:
    """What a chunk's own tokens add to its outputs, (B, M, Q, H, P)."""
    scores_BMG1QQ = (C_BMQGN.transpose(2, 3) @ B_BMQGN.permute(0, 1, 3, 4, 2)).unsqueeze(3)
    weights_BMHQQ = decays.between_BMHQQ()
    weights_BMHQQ.unflatten(2, (B_BMQGN.shape[3], -1)).mul_(scores_BMG1QQ)
    return (weights_BMHQQ @ x_BMQHP.transpose(2, 3).contiguous()).transpose(2, 3)


def local_backward(
    grad_BMQHP: Tensor, x_BMQHP: Tensor, B_BMQGN: Tensor, C_BMQGN: Tensor, decays: Decays
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (B, M, Q, H, P), B and C (B, M, Q, G, N), and the sums (B, M, Q, H)."""
    groups = (B_BMQGN.shape[3], -1)
    B_BMGQN, C_BMGQN = B_BMQGN.transpose(2, 3), C_BMQGN.transpose(2, 3)
    grad_BMHQP, x_BMHQP = grad_BMQHP.transpose(2, 3).contiguous(), x_BMQHP.transpose(2, 3).contiguous()
    scores_BMG1QQ = (C_BMGQN @ B_BMGQN.mT).unsqueeze(3)
    weights_BMHQQ = decays.between_BMHQQ()
    grad_scores_BMGRQQ = (grad_BMHQP @ x_BMHQP.mT).mul_(weights_BMHQQ).unflatten(2, groups)
    weights_BMHQQ.unflatten(2, groups).mul_(scores_BMG1QQ)
    grad_x_BMHQP = weights_BMHQQ.mT @ grad_BMHQP
    shared_BMGQQ = grad_scores_BMGRQQ.sum(3)
    grad_B, grad_C = (shared_BMGQQ.mT @ C_BMGQN).transpose(2, 3), (shared_BMGQQ @ B_BMGQN).transpose(2, 3)
    grad_sums_BMHQ = grad_scores_BMGRQQ.mul_(scores_BMG1QQ).sum(5).flatten(2, 3)
    grad_sums_BMHQ -= x_BMHQP.mul(grad_x_BMHQP).sum(4)
    return grad_x_BMHQP.transpose(2, 3), grad_B, grad_C, grad_sums_BMHQ.transpose(2, 3)


def readout(entering_BMHPN: Tensor, C_BMQGN: Tensor) -> Tensor:
    """What the states that enter the chunks give their outputs (B, M, Q, H, P), but for the decay `since_BMQH1`."""
    entering_BMGKN = _grouped_states(entering_BMHPN, C_BMQGN.shape[3])
    return _by_head(C_BMQGN.transpose(2, 3) @ entering_BMGKN.mT, entering_BMHPN.shape[3])


def readout_backward(
    grad_BMQHP: Tensor, entering_BMHPN: Tensor, C_BMQGN: Tensor, decays: Decays
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the entering states (B, M, H, P, N), C (B, M, Q, G, N) and the sums (B, M, Q, H)."""
    groups, width = C_BMQGN.shape[3], grad_BMQHP.shape[4]
    grad_read = grad_BMQHP * decays.since_BMQH1
    grad_sums = readout(entering_BMHPN, C_BMQGN).mul_(grad_read).sum(4)
    grad_BMGQK = _by_group(grad_read, groups)
    grad_C = (grad_BMGQK @ _grouped_states(entering_BMHPN, groups)).transpose(2, 3)
    return _as_states(grad_BMGQK.mT @ C_BMQGN.transpose(2, 3), width), grad_C, grad_sums


def pass_backward(
    adjoint_BHPN: Tensor, grad_entering_BMHPN: Tensor, entering_BMHPN: Tensor, decays: Decays
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of `pass_states`, given the gradients of its last state and of all that enter.

    Returns the gradients of `added` (B, M, H, P, N), of the first state, and of each chunk's whole sum (B, M, H).
    """
    grad_added, adjoint_BHPN = pass_states(adjoint_BHPN, grad_entering_BMHPN, decays.whole_BMH, reverse=True)
    crossing_BMH = torch.linalg.vecdot(entering_BMHPN.flatten(3), grad_added.flatten(3))
    return grad_added, adjoint_BHPN, crossing_BMH * decays.whole_BMH


def _by_group(x_BMQHP: Tensor, groups: int) -> Tensor:
    """(B, M, G, Q, K): the heads of a group side by side."""
    return x_BMQHP.unflatten(3, (groups, -1)).transpose(2, 3).flatten(4)


def _by_head(x_BMGQK: Tensor, width: int) -> Tensor:
    """(B, M, Q, H, P)"""
    return x_BMGQK.unflatten(4, (-1, width)).transpose(2, 3).flatten(3, 4)


def _grouped_states(state_BMHPN: Tensor, groups: int) -> Tensor:
    """(B, M, G, K, N)"""
    return state_BMHPN.unflatten(2, (groups, -1)).flatten(3, 4)


def _as_states(state_BMGKN: Tensor, width: int) -> Tensor:
    """(B, M, H, P, N)"""
    return state_BMGKN.unflatten(3, (-1, width)).flatten(2, 3)
