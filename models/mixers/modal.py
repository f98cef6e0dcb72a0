"""Decoding a convolution by a sum of modes: what S4D, H3, StripedHyena and StripedHyena 2 share beside their parallel
form, which is `parallel.convolve` with a `ModalFilter`.

    x_t = e^{log_pole} x_{t-1} + u_t        y_t = Re sum_n residue_n x_{t,n} + skip u_t

The poles are the same at every token, so that between shards only the state travels.

Shapes: B batch, T local tokens, D channels, N modes, real or complex.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import begin_modal_convolution, modal_convolution
from ...parallel import Constant, SequenceShard, begin_prefix_state


def modal_prefill(
    u_BTD: Tensor,
    state_BDN: Tensor,
    log_poles_DN: Tensor,
    residues_DN: Tensor,
    skip_D: Tensor | None,
    shard: SequenceShard,
) -> tuple[Tensor, Tensor]:
    """One document after `state_BDN`, the same on every process: (y, the state after this shard's last token).

    Most of the convolution is computed while the states travel.
    """
    if shard.size == 1:
        return modal_convolution(u_BTD, log_poles_DN, residues_DN, skip=skip_D, initial_state=state_BDN)
    transition = Constant(log_poles_DN)
    stages = begin_modal_convolution(u_BTD, log_poles_DN, residues_DN, skip=skip_D)
    pending = begin_prefix_state(transition, stages.leaving, shard, initial=state_BDN)
    stages.compute_local()
    entering_BDN = pending.wait()
    return stages.finish(entering_BDN), transition.after(entering_BDN, stages.leaving, shard.local_length)


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
    """Operations a token: a mode is decayed, fed with a real number, and its product's real part summed.

    1, 1 and 2 operations if it is real; 6, 1 and 4 if complex.
    """
    return float(channels * modes * (11 if is_complex else 4))
