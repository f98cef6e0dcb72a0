"""Long causal convolution: each channel with a filter that may be as long as the sequence.

Origin: the FFT convolutions of S4 and Hyena (arXiv 2302.10866, github.com/HazyResearch/safari, fftconv); filters of at
most a few hundred taps, as StripedHyena 2 has them, take products of Toeplitz matrices (toeplitz.py). Legend: B
batch, T tokens, D channels, K taps.
"""

import torch
from torch import Tensor

from .. import triton_support
from ..arguments import compute_dtype, expect_shape
from ..documents import checked_starts
from .portable import LongConvolution
from .toeplitz import WIDEST, ToeplitzConvolution

__all__ = ["long_convolution"]

# Measured on two cores: for up to 64 taps products of matrices win at once, for more when the sequence is this many
# times longer, because the time of a transform grows with the length of the sequence and theirs with the taps.
_FEW_TAPS = 64
_LEAST_LENGTHS = {True: 8, False: 64}


def long_convolution(
    u_BTD: Tensor,
    filter_DL: Tensor,
    *,
    skip: Tensor | None = None,
    input_gate: Tensor | None = None,
    gate: Tensor | None = None,
    document_starts: Tensor | None = None,
) -> Tensor:
    """y_t = gate_t (skip v_t + sum_{k<=t} filter[:, k] v_{t-k}) with v_t = input_gate_t u_t; gates of one by default.

    FFTs are of at least the summed lengths: nothing wraps around.

    Args:
        u_BTD: inputs, any floating dtype; y has the same. input_gate, gate: (B, T, D).
        filter_DL: (D, K) taps by lag; taps at or beyond the length have no effect, missing ones are zero.
        skip: (D,) direct term.
        document_starts: boolean (B or 1, T); each document is convolved by itself, so nothing crosses a True token.

    Computes in float64 if an argument is float64 and in float32 otherwise. The backward recomputes the spectra, both
    passes work on a few channels (with few taps: tokens) at a time: beyond arguments and results the memory is bounded.
    Neither v nor the ungated convolution is stored; with few taps they are, in the dtype of u.

    Raises:
        ValueError: if shapes do not agree.
    """
    batch, length, channels = u_BTD.shape
    if filter_DL.dim() != 2 or filter_DL.shape[0] != channels or filter_DL.shape[1] < 1:
        raise ValueError(f"long convolution: filter has shape {tuple(filter_DL.shape)}, expected ({channels}, taps)")
    expect_shape("long convolution", "skip", skip, (channels,))
    for name, factor in (("input_gate", input_gate), ("gate", gate)):
        expect_shape("long convolution", name, factor, tuple(u_BTD.shape))
    starts_BT = checked_starts(document_starts, batch, length)
    dtype = compute_dtype(u_BTD, filter_DL, input_gate, gate)
    filter_DL, skip = filter_DL.to(dtype), None if skip is None else skip.to(dtype)
    taps = filter_DL.shape[1]
    if taps > WIDEST or length < _LEAST_LENGTHS[taps <= _FEW_TAPS] * taps:
        if starts_BT is None and triton_support.takes(u_BTD, filter_DL, skip, input_gate, gate):
            from .triton_long import TritonLongConvolution

            return TritonLongConvolution.apply(u_BTD, filter_DL, skip, input_gate, gate)
        return LongConvolution.apply(u_BTD, filter_DL, skip, starts_BT, input_gate, gate)
    if input_gate is not None:
        u_BTD = (u_BTD * input_gate).to(u_BTD.dtype)
    y_BTD = ToeplitzConvolution.apply(u_BTD, filter_DL, u_BTD.new_zeros(batch, taps - 1, channels), starts_BT)
    if skip is not None:
        y_BTD = torch.addcmul(y_BTD, u_BTD, skip.to(u_BTD.dtype))
    return y_BTD if gate is None else (y_BTD * gate).to(u_BTD.dtype)
