"""Long causal convolution: each channel with a filter that may be as long as the sequence.

Origin: the FFT convolutions of S4 and Hyena (arXiv 2302.10866, github.com/HazyResearch/safari, fftconv); filters of at
most a few hundred taps, as StripedHyena 2 has them, take products of Toeplitz matrices (toeplitz.py). Legend: B
batch, T tokens, D channels, K taps.
"""

import torch
from torch import Tensor

from ..documents import checked_starts
from .portable import LongConvolution
from .toeplitz import WIDEST, ToeplitzConvolution

__all__ = ["long_convolution"]

# Measured on two cores: for up to 64 taps products of matrices win at once, for more when the sequence is this many
# times longer, because the time of a transform grows with the length of the sequence and theirs with the taps.
_FEW_TAPS = 64
_LEAST_LENGTHS = {True: 8, False: 64}


def long_convolution(
    u_BTD: Tensor, filter_DL: Tensor, *, skip: Tensor | None = None, document_starts: Tensor | None = None
) -> Tensor:
    """y_t = skip u_t + sum_{k<=t} filter[:, k] u_{t-k}. FFTs are of at least the summed lengths: nothing wraps around.

    Args:
        u_BTD: inputs, any floating dtype; y has the same.
        filter_DL: (D, K) taps by lag; taps at or beyond the length have no effect, missing ones are zero.
        skip: (D,) direct term.
        document_starts: boolean (B or 1, T); each document is convolved by itself, so nothing crosses a True token.

    Computes in float64 if an argument is float64 and in float32 otherwise. The backward recomputes the spectra, both
    passes work on a few channels (with few taps: tokens) at a time: beyond arguments and results the memory is bounded.

    Raises:
        ValueError: if shapes do not agree.
    """
    batch, length, channels = u_BTD.shape
    if filter_DL.dim() != 2 or filter_DL.shape[0] != channels or filter_DL.shape[1] < 1:
        raise ValueError(f"long convolution: filter has shape {tuple(filter_DL.shape)}, expected ({channels}, taps)")
    if skip is not None and tuple(skip.shape) != (channels,):
        raise ValueError(f"long convolution: skip has shape {tuple(skip.shape)}, expected ({channels},)")
    starts_BT = checked_starts(document_starts, batch, length)
    double = torch.float64 in (u_BTD.dtype, filter_DL.dtype)
    dtype = torch.float64 if double else torch.float32
    filter_DL, skip = filter_DL.to(dtype), None if skip is None else skip.to(dtype)
    taps = filter_DL.shape[1]
    if taps > WIDEST or length < _LEAST_LENGTHS[taps <= _FEW_TAPS] * taps:
        return LongConvolution.apply(u_BTD, filter_DL, skip, starts_BT)
    y_BTD = ToeplitzConvolution.apply(u_BTD, filter_DL, u_BTD.new_zeros(batch, taps - 1, channels), starts_BT)
    return y_BTD if skip is None else torch.addcmul(y_BTD, u_BTD, skip.to(u_BTD.dtype))
