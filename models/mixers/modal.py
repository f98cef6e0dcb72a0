"""Convolution by a sum of modes, over a sequence shard: what S4D, H3, StripedHyena and StripedHyena 2 share.

    x_t = e^{log_pole} x_{t-1} + u_t        y_t = Re sum_n residue_n x_{t,n} + skip u_t

The poles are the same at every token, so that between shards only the state travels.

Shapes: B batch, T local tokens, D channels, N modes, real or complex.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels import modal_convolution, modal_readout
from ...parallel import Constant, SequenceShard, begin_prefix_state, prefix_state


def begin_modal_mixing(
    u_BTD: Tensor, log_poles_DN: Tensor, residues_DN: Tensor, skip_D: Tensor | None, shard: SequenceShard
) -> Callable[[], Tensor]:
    """Mix this shard from zero and send the state it reaches on its way; calling the result gives y (B, T, D).

    Whatever does not depend on y can be computed between the two calls.

    Args:
        u_BTD: inputs of any floating dtype.
        log_poles_DN, residues_DN: both real or both complex, float32 or wider.
    """
    starts_BT = shard.start_mask(u_BTD.device)
    y_BTD, state_BDN = modal_convolution(u_BTD, log_poles_DN, residues_DN, skip=skip_D, document_starts=starts_BT)
    if shard.size == 1:
        return lambda: y_BTD
    pending = begin_prefix_state(Constant(log_poles_DN, shard.reset_mask(u_BTD.device)), state_BDN, shard)

    def finish() -> Tensor:
        entering_BDN = pending.wait()
        length = u_BTD.shape[1]
        return y_BTD + modal_readout(entering_BDN, log_poles_DN, residues_DN, length, document_starts=starts_BT)

    return finish


def modal_mixing(
    u_BTD: Tensor, log_poles_DN: Tensor, residues_DN: Tensor, skip_D: Tensor | None, shard: SequenceShard
) -> Tensor:
    """`begin_modal_mixing`, finished at once."""
    return begin_modal_mixing(u_BTD, log_poles_DN, residues_DN, skip_D, shard)()


def modal_prefill(
    u_BTD: Tensor,
    state_BDN: Tensor,
    log_poles_DN: Tensor,
    residues_DN: Tensor,
    skip_D: Tensor | None,
    shard: SequenceShard,
) -> tuple[Tensor, Tensor]:
    """One document after `state_BDN`, the same on every process: (y, the state after this shard's last token)."""
    initial_BDN = state_BDN if shard.rank == 0 else None
    y_BTD, leaving_BDN = modal_convolution(u_BTD, log_poles_DN, residues_DN, skip=skip_D, initial_state=initial_BDN)
    if shard.size == 1:
        return y_BTD, leaving_BDN
    entering_BDN = prefix_state(Constant(log_poles_DN), leaving_BDN, shard)
    length = u_BTD.shape[1]
    y_BTD = y_BTD + modal_readout(entering_BDN, log_poles_DN, residues_DN, length)
    return y_BTD, leaving_BDN + torch.exp(log_poles_DN * length) * entering_BDN


def modal_step(
    u_BD: Tensor, state_BDN: Tensor, log_poles_DN: Tensor, residues_DN: Tensor, skip_D: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: (y_BD, the next state)."""
    state_BDN = torch.exp(log_poles_DN) * state_BDN + u_BD.unsqueeze(-1)
    y_BD = (residues_DN * state_BDN).sum(dim=-1)
    return (y_BD.real if y_BD.is_complex() else y_BD) + skip_D * u_BD, state_BDN


def complex_dtype(dtype: torch.dtype) -> torch.dtype:
    """The complex type as wide as a real one, at least complex64."""
    return torch.promote_types(dtype, torch.complex64)


def as_complex(pairs: Tensor) -> Tensor:
    """(..., 2) real and imaginary parts, in which complex parameters are kept, to complex numbers."""
    return torch.view_as_complex(pairs.contiguous())


def modal_flops(channels: int, modes: int, *, is_complex: bool) -> float:
    """Operations a token: a mode is decayed, fed and read; 2, 1 and 1 of them real, 6, 1 and 4 complex."""
    return float(channels * modes * (11 if is_complex else 4))
