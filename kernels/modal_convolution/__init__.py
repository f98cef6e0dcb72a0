"""Modal convolution: a causal convolution whose filter is a sum of decaying (and turning) exponentials.

Origin: diagonal state spaces (S4D, A. Gu and others, arXiv 2206.11893; H3, arXiv 2212.14052) and modal Hyena filters
(S. Massaroli and others, arXiv 2310.18780; StripedHyena 2, arXiv 2503.01868; github.com/Zymrael/vortex). Unlike a
convolution by FFT it needs no memory of the sequence's length beyond input and output, keeps documents apart exactly,
and has a state that can be handed over. Legend: B batch, T tokens, D channels, N modes per channel.
"""

import torch
from torch import Tensor

from .. import triton_support
from ..documents import checked_starts
from ..segments import expect_shape, segment_tokens, state_dtype, walk
from .portable import CHUNK, modal_segment, modal_tables, widest
from .readout import readout

__all__ = ["modal_convolution", "modal_readout"]


def modal_convolution(
    u_BTD: Tensor,
    log_poles_DN: Tensor,
    residues_DN: Tensor,
    *,
    skip: Tensor | None = None,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x_t = exp(log_pole) x_{t-1} + u_t and y_t = Re sum_n R_n x_t + skip u_t. Returns (y_BTD, final_state_BDN).

    Args:
        u_BTD: inputs; float32, float64, bfloat16 or float16. y has its dtype.
        log_poles_DN: logarithms of the poles, real or complex; real part negative for a mode that decays.
        residues_DN: weights of the modes; complex if and only if the poles are.
        skip: (D,) direct term.
        initial_state: (B, D, N) state before the first token, complex if the poles are; zeros by default.
        document_starts: boolean (B or 1, T); at a True token the state before it is forgotten.

    Computes in float32, or in float64 if any argument is (states of complex modes: complex64 or complex128); powers of
    the poles and the states between chunks in double precision. Gradients flow through the initial and final state.

    Raises:
        ValueError: if shapes do not agree, or only one of poles and residues is complex.
    """
    batch, length, channels = u_BTD.shape
    modes = log_poles_DN.shape[-1]
    _check_modes(log_poles_DN, residues_DN, channels)
    expect_shape("modal convolution", "skip", skip, (channels,))
    expect_shape("modal convolution", "initial_state", initial_state, (batch, channels, modes))
    starts_BT = checked_starts(document_starts, batch, length)
    dtype = state_dtype(u_BTD, log_poles_DN, residues_DN, skip, initial_state)
    if triton_support.takes(u_BTD, log_poles_DN, residues_DN, skip, initial_state):
        from .triton_modal import WIDEST, TritonModal

        if modes <= WIDEST:
            state_type = dtype.to_complex() if log_poles_DN.is_complex() else dtype
            if initial_state is None:
                initial_state = torch.zeros(batch, channels, modes, dtype=state_type, device=u_BTD.device)
            skip = None if skip is None else skip.to(dtype)
            return TritonModal.apply(u_BTD, log_poles_DN, residues_DN, skip, initial_state.to(state_type), starts_BT)
    chunk = _chunk(batch, length, starts_BT)
    tables = modal_tables(log_poles_DN, residues_DN, chunk, length % chunk, dtype)
    wide = widest(log_poles_DN).dtype
    if initial_state is None:
        initial_state = torch.zeros(batch, channels, modes, dtype=wide, device=u_BTD.device)
    y_BTD, state_DBN = walk(
        modal_segment,
        initial_state.to(wide).transpose(0, 1),
        (u_BTD,),
        tables.tensors() if skip is None else (*tables.tensors(), skip.to(dtype)),
        segment=segment_tokens(chunk, batch * channels, u_BTD.device, least_chunks=16),
        starts_BT=starts_BT,
    )
    state_BDN = state_DBN.transpose(0, 1)
    return y_BTD, state_BDN.to(dtype.to_complex() if state_BDN.is_complex() else dtype).contiguous()


def modal_readout(
    state_BDN: Tensor,
    log_poles_DN: Tensor,
    residues_DN: Tensor,
    length: int,
    *,
    document_starts: Tensor | None = None,
) -> Tensor:
    """What a state that enters before the first of `length` tokens adds: y_t = Re sum_n R_n exp((t+1) log_pole_n) x_n.

    By linearity, a convolution from zero plus this is the convolution from `state_BDN`. The work stops, for each
    channel, where the decay has left less of its state than the dtype can show beside it, and at a sequence's first
    document start.

    Returns y_BTD in the dtype of the computation (float32, or float64 if any argument is); gradients flow to the
    state, the poles and the residues.

    Raises:
        ValueError: if shapes do not agree, or only some of the arguments are complex.
    """
    batch, channels, modes = state_BDN.shape
    expect_shape("modal readout", "log_poles_DN", log_poles_DN, (channels, modes))
    _check_modes(log_poles_DN, residues_DN, channels)
    starts_BT = checked_starts(document_starts, batch, length)
    dtype = state_dtype(state_BDN, log_poles_DN, residues_DN)
    if length and triton_support.takes(state_BDN, log_poles_DN, residues_DN):
        from .triton_readout import WIDEST, TritonModalReadout

        if modes <= WIDEST:
            return TritonModalReadout.apply(state_BDN, log_poles_DN, residues_DN, length, starts_BT)
    return readout(state_BDN, log_poles_DN, residues_DN, length, starts_BT, dtype)


def _check_modes(log_poles_DN: Tensor, residues_DN: Tensor, channels: int) -> None:
    expect_shape("modal convolution", "log_poles_DN", log_poles_DN, (channels, log_poles_DN.shape[-1]))
    expect_shape("modal convolution", "residues_DN", residues_DN, tuple(log_poles_DN.shape))
    if log_poles_DN.is_complex() != residues_DN.is_complex():
        raise ValueError(
            f"modal convolution: poles are {log_poles_DN.dtype} and residues {residues_DN.dtype}; "
            "make both real or both complex"
        )


def _chunk(batch: int, length: int, starts_BT: Tensor | None) -> int:
    """Tokens of a chunk; fewer when documents are so short that most rows of longer ones would be padding."""
    chunk = max(1, min(CHUNK, length))
    if starts_BT is not None:
        documents = int(starts_BT.expand(batch, -1).sum())
        while chunk > 8 and documents * chunk > batch * length:
            chunk //= 2
    return chunk
