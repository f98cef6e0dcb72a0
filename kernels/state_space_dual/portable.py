"""State-space duality in PyTorch: masked attention inside chunks, states between them.

Inside a chunk, y_t = sum_s (C_t . B_s) exp(sum of log decays after s up to t) x_s is a product with a Q x Q matrix per
head; the state that enters is read by C and multiplied by its decay since. Exponents are differences of sums taken in
double precision within the chunk, never ratios: all are sums of log decays over a stretch, so nothing overflows.

Legend: B batch, T tokens, G groups, R heads of a group (H = G R), P head width, N states, M chunks, Q tokens of one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


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


def segment(
    chunk: int, state_BHPN: Tensor, sequences: Sequence[Tensor], starts_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One segment of `walk`."""
    x_BTHP, log_decay_BTH, B_BTGN, C_BTGN = sequences
    (batch, length, heads, width), groups, dtype = x_BTHP.shape, B_BTGN.shape[2], state_BHPN.dtype
    chunk = min(chunk, max(length, 1))
    x_BMGRQP = chunked(x_BTHP.to(dtype), chunk).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5)
    B_BMGQN = chunked(B_BTGN.to(dtype), chunk).transpose(2, 3)
    C_BMGQN = chunked(C_BTGN.to(dtype), chunk).transpose(2, 3)
    # Differences of long sums lose digits in single precision.
    log_BMGRQ = chunked(log_decay_BTH.double(), chunk).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2)
    sum_BMGRQ = log_BMGRQ.cumsum(-1)
    since_begin_BMGRQ = sum_BMGRQ.to(dtype).exp()
    until_end_BMGRQ = (sum_BMGRQ[..., -1:] - sum_BMGRQ).to(dtype).exp()
    whole_BMGR = since_begin_BMGRQ[..., -1]
    count_BMQ = documents_before(starts_BT, chunk)
    pairs = causal_pairs(chunk, count_BMQ, x_BTHP.device)
    if count_BMQ is not None:
        pairs = pairs[:, :, None, None]
        first = (count_BMQ == 0)[:, :, None, None]
        since_begin_BMGRQ = since_begin_BMGRQ * first
        whole_BMGR = whole_BMGR * first[..., -1]
        until_end_BMGRQ = until_end_BMGRQ * (count_BMQ == count_BMQ[..., -1:])[:, :, None, None]
    exponent_BMGRQQ = (sum_BMGRQ.unsqueeze(-1) - sum_BMGRQ.unsqueeze(-2)).to(dtype)
    decay_BMGRQQ = exponent_BMGRQQ.masked_fill(~pairs, -torch.inf).exp()
    scores_BMGQQ = C_BMGQN @ B_BMGQN.mT
    y_BMGRQP = (scores_BMGQQ.unsqueeze(3) * decay_BMGRQQ) @ x_BMGRQP
    x_left = (x_BMGRQP * until_end_BMGRQ.unsqueeze(-1)).transpose(-1, -2).flatten(3, 4)
    added_BMGRPN = (x_left @ B_BMGQN).unflatten(3, (-1, width))
    entering_BMHPN, state_BHPN = pass_states(state_BHPN, added_BMGRPN.flatten(2, 3), whole_BMGR.flatten(2, 3))
    entering = entering_BMHPN.unflatten(2, (groups, -1)).flatten(3, 4)
    read_BMGQRP = (C_BMGQN @ entering.mT).unflatten(4, (-1, width))
    y_BMGRQP = y_BMGRQP + read_BMGQRP.transpose(3, 4) * since_begin_BMGRQ.unsqueeze(-1)
    y_BTHP = y_BMGRQP.permute(0, 1, 4, 2, 3, 5).reshape(batch, -1, heads, width)[:, :length]
    return y_BTHP.to(x_BTHP.dtype), state_BHPN


def pass_states(state_BH: Tensor, added_BMH: Tensor, decay_BMH: Tensor) -> tuple[Tensor, Tensor]:
    """The states that enter each chunk (B, M, H, ...) and the last one: state' = decay state + added.

    `decay_BMH` has the leading dimensions of the state: one number for all the rest.
    """
    decay_BMH = decay_BMH.reshape(*decay_BMH.shape, *([1] * (added_BMH.dim() - decay_BMH.dim())))
    entering = []
    for added, decay in zip(added_BMH.unbind(1), decay_BMH.unbind(1), strict=True):
        entering.append(state_BH)
        state_BH = torch.addcmul(added, decay, state_BH)
    return torch.stack(entering, 1) if entering else torch.empty_like(added_BMH), state_BH


def readout_segment(
    state_BHPN: Tensor, sequences: Sequence[Tensor], parameters: Sequence[Tensor], starts_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One segment of `walk` for the read-out; the state only decays. C comes with one row for each head."""
    log_decay_BTH, C_BTHN = sequences
    dtype = state_BHPN.dtype
    sum_BTH = log_decay_BTH.double().cumsum(1)
    decay_BTH = sum_BTH.to(dtype).exp()
    if starts_BT is not None:
        decay_BTH = decay_BTH * (starts_BT.long().cumsum(1) == 0).unsqueeze(2)
    y_BHTP = C_BTHN.to(dtype).transpose(1, 2) @ state_BHPN.mT
    y_BTHP = y_BHTP.transpose(1, 2) * decay_BTH.unsqueeze(-1)
    last_BH = decay_BTH[:, -1] if decay_BTH.shape[1] else torch.ones_like(state_BHPN[:, :, 0, 0])
    return y_BTHP, state_BHPN * last_BH[:, :, None, None]
