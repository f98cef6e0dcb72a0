"""What an entering state adds to the outputs of a modal convolution, for as long as it is alive.

Channels are grouped by how long their slowest mode lives; each group is computed to its own end and no further.

Legend: B batch, T tokens, D channels, K channels of a group, N modes, M chunks, Q tokens of a chunk, S real numbers of
a state.
"""

import torch
from torch import Tensor

from ..documents import first_start
from ..living import NothingLeft, negligible_exponent
from .portable import CHUNK, leaving, powers, real_parts, widest


def lifetimes(log_poles_DN: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """(D,) int64: tokens after which less than epsilon to the power 1.5 of any mode is left; at most `length`."""
    slowest_D = (log_poles_DN.real if log_poles_DN.is_complex() else log_poles_DN).detach().double().amax(1)
    tokens_D = negligible_exponent(dtype) / (-slowest_D).clamp_min(1e-30)
    return tokens_D.clamp(max=length).ceil().long()


def readout(
    state_BDN: Tensor,
    log_poles_DN: Tensor,
    residues_DN: Tensor,
    length: int,
    starts_BT: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See `modal_readout`; arguments are checked."""
    reach = length if starts_BT is None or not length else int(first_start(starts_BT).max())
    y_BTD = torch.zeros(state_BDN.shape[0], length, state_BDN.shape[1], dtype=dtype, device=state_BDN.device)
    if not reach:
        return NothingLeft.apply(y_BTD, state_BDN, log_poles_DN, residues_DN)
    lives_D = lifetimes(log_poles_DN, reach, dtype)
    # one group for each power of two of the lifetime
    level_D = torch.ceil(torch.log2(lives_D.clamp_min(CHUNK).double())).long()
    before_BT = None
    if starts_BT is not None:
        before_BT = torch.arange(length, device=y_BTD.device) < first_start(starts_BT).unsqueeze(1)
    for level in level_D.unique().tolist():
        channels_K = (level_D == level).nonzero().squeeze(1)
        tokens = int(lives_D[channels_K].max())
        part_BTK = _living(state_BDN[:, channels_K], log_poles_DN[channels_K], residues_DN[channels_K], tokens, dtype)
        if before_BT is not None:
            part_BTK = part_BTK * before_BT[:, :tokens, None]
        y_BTD[:, :tokens].index_copy_(2, channels_K, part_BTK)
    return y_BTD


def _living(state_BKN: Tensor, log_poles_KN: Tensor, residues_KN: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """(B, tokens, K): the states at the beginnings of chunks, times one chunk's table."""
    batch, channels, _ = state_BKN.shape
    chunk = min(CHUNK, tokens)
    chunks = -(-tokens // chunk)
    leave_KSQ = leaving(residues_KN, powers(log_poles_KN, chunk + 1)[..., 1:], dtype)
    begins_KNM = powers(log_poles_KN * chunk, chunks)
    states_KBMN = widest(state_BKN).transpose(0, 1).unsqueeze(2) * begins_KNM.transpose(1, 2).unsqueeze(1)
    states_KRS = real_parts(states_KBMN.flatten(1, 2)).to(dtype)
    y_KBT = torch.bmm(states_KRS, leave_KSQ).view(channels, batch, chunks * chunk)
    return y_KBT[..., :tokens].permute(1, 2, 0)
