"""Modal convolution: a causal convolution whose filter is a sum of decaying (and turning) exponentials.

Origin: diagonal state spaces (S4D, A. Gu and others, arXiv 2206.11893; H3, arXiv 2212.14052) and modal Hyena filters
(S. Massaroli and others, arXiv 2310.18780; StripedHyena 2, arXiv 2503.01868; github.com/Zymrael/vortex). Unlike a
convolution by FFT it needs no memory of the sequence's length beyond input and output, keeps documents apart exactly,
and has a state that can be handed over. Legend: B batch, T tokens, D channels, N modes per channel.
"""

import torch
from torch import Tensor

from .. import triton_support
from ..arguments import compute_dtype, expect_shape
from ..documents import checked_starts
from ..segments import segment_tokens, walk
from ..stages import Stages
from .portable import CHUNK, modal_segment, modal_tables, widest
from .stages import PortableStages

__all__ = ["begin_modal_convolution", "modal_convolution"]


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
    dtype = compute_dtype(u_BTD, log_poles_DN, residues_DN, skip, initial_state)
    if triton_support.takes(u_BTD, log_poles_DN, residues_DN, skip, initial_state):
        from .triton_modal import WIDEST, TritonModal

        if modes <= WIDEST:
            state_type = dtype.to_complex() if log_poles_DN.is_complex() else dtype
            if initial_state is None:
                initial_state = torch.zeros(batch, channels, modes, dtype=state_type, device=u_BTD.device)
            skip = None if skip is None else skip.to(dtype)
            return TritonModal.apply(u_BTD, log_poles_DN, residues_DN, skip, initial_state.to(state_type), starts_BT)
    chunk = _chunk(batch, length, starts_BT)
    tables = modal_tables(log_poles_DN, residues_DN, skip, chunk, length % chunk, dtype)
    wide = widest(log_poles_DN).dtype
    if initial_state is None:
        initial_state = torch.zeros(batch, channels, modes, dtype=wide, device=u_BTD.device)
    y_BTD, state_DBN = walk(
        modal_segment,
        initial_state.to(wide).transpose(0, 1),
        (u_BTD,),
        tables.tensors(),
        segment=segment_tokens(chunk, batch * channels, u_BTD.device, least_chunks=16),
        starts_BT=starts_BT,
    )
    state_BDN = state_DBN.transpose(0, 1)
    return y_BTD, state_BDN.to(dtype.to_complex() if state_BDN.is_complex() else dtype).contiguous()


def begin_modal_convolution(
    u_BTD: Tensor,
    log_poles_DN: Tensor,
    residues_DN: Tensor,
    *,
    skip: Tensor | None = None,
    document_starts: Tensor | None = None,
) -> Stages:
    """`modal_convolution` of a part of a sequence, in stages: the state that leaves, (B, D, N), is known before the
    outputs are. See `Stages`.

    Arguments and errors are those of `modal_convolution`. Between the stages, and for the backward pass, there is one
    state for each chunk of at most 64 tokens beside the arguments. The entering state is followed, channel by channel,
    for as long as the dtype can show what is left of it. On Triton the stages are the state that leaves from zero, the
    outputs from zero, and the read-out of the entering state, which is a pass of its own there; the gradient of u comes
    with the first.
    """
    batch, length, channels = u_BTD.shape
    _check_modes(log_poles_DN, residues_DN, channels)
    expect_shape("modal convolution", "skip", skip, (channels,))
    starts_BT = checked_starts(document_starts, batch, length)
    dtype = compute_dtype(u_BTD, log_poles_DN, residues_DN, skip)
    if triton_support.takes(u_BTD, log_poles_DN, residues_DN, skip):
        from .triton_modal import WIDEST
        from .triton_stages import TritonStages

        if log_poles_DN.shape[-1] <= WIDEST:
            return TritonStages(u_BTD, log_poles_DN, residues_DN, skip, starts_BT)
    chunk = _chunk(batch, length, starts_BT)
    return PortableStages(u_BTD, log_poles_DN, residues_DN, skip, starts_BT, chunk, dtype)


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
