"""Long convolution on a GPU: the library's FFT with everything around it fused (triton_fourier.py).

Takes the place of portable.LongConvolution, argument for argument, where no documents begin.

Legend: B batch, L length, D channels, C channels of a block, K taps, F padded length, M frequencies.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..autograd import first_order
from ..triton_support import rows_contiguous
from .transform import fast_length
from .triton_fourier import multiply_spectra_, to_rows, to_token_gradients, to_tokens

# Padded elements in work at a time, 64 MiB; but never fewer channels than these, whose tokens fill what a GPU reads of
# memory at once.
_BLOCK_ELEMENTS = 1 << 24
_LEAST_CHANNELS = 8


def _blocks(shape: torch.Size, padded: int) -> Iterator[tuple[slice, slice]]:
    """(sequences, channels) to take together."""
    batch, _, channels = shape
    rows = max(1, _BLOCK_ELEMENTS // padded)
    width = min(channels, max(_LEAST_CHANNELS, rows // batch))
    several = max(1, min(batch, rows // width))
    for first in range(0, batch, several):
        for channel in range(0, channels, width):
            yield slice(first, min(first + several, batch)), slice(channel, min(channel + width, channels))


def _cut(x_BLD: Tensor | None, block: tuple[slice, slice]) -> Tensor | None:
    return None if x_BLD is None else x_BLD[block[0], :, block[1]]


def _fresh(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)


class TritonLongConvolution(torch.autograd.Function):
    """FFT convolution with recomputed spectra; u and gates in any floating dtype, filter and skip in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        u_BLD: Tensor,
        filter_DK: Tensor,
        skip: Tensor | None,
        input_gate: Tensor | None,
        gate: Tensor | None,
    ) -> Tensor:
        u_BLD = rows_contiguous(u_BLD)
        input_gate, gate = (None if x is None else rows_contiguous(x) for x in (input_gate, gate))
        skip = None if skip is None else skip.contiguous()
        ctx.save_for_backward(u_BLD, filter_DK, skip, input_gate, gate)
        length = u_BLD.shape[1]
        padded = ctx.padded = fast_length(length + min(filter_DK.shape[1], length) - 1)
        y_BLD = torch.empty(u_BLD.shape, dtype=u_BLD.dtype, device=u_BLD.device)
        for block in _blocks(u_BLD.shape, padded):
            u, first, last, y = (_cut(x, block) for x in (u_BLD, input_gate, gate, y_BLD))
            assert u is not None and y is not None
            spectrum_BCM = torch.fft.rfft(to_rows(u, first, padded))
            spectrum_BCM *= torch.fft.rfft(filter_DK[block[1], :length], padded)
            rows_BCF = torch.fft.irfft(spectrum_BCM, padded, norm="forward")
            to_tokens(rows_BCF, u, first, last, None if skip is None else skip[block[1]], y)
        return y_BLD

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_BLD = rows_contiguous(grads[0])
        u_BLD, filter_DK, skip, input_gate, gate = ctx.saved_tensors
        length, padded, need_filter = u_BLD.shape[1], ctx.padded, ctx.needs_input_grad[1]
        outs = _fresh(u_BLD), _fresh(input_gate), _fresh(gate)
        grad_filter = torch.zeros_like(filter_DK) if need_filter else None
        grad_skip = None if skip is None else torch.zeros_like(skip)
        for block in _blocks(u_BLD.shape, padded):
            tokens, out = [_cut(x, block) for x in (u_BLD, input_gate, gate, grad_BLD)], [_cut(x, block) for x in outs]
            skip_C = None if skip is None else skip[block[1]]
            taps_CK = filter_DK[block[1], :length]
            lags_CF, own = _block_gradients(padded, need_filter, taps_CK, skip_C, tokens, out)
            if grad_filter is not None and lags_CF is not None:
                grad_filter[block[1], :length].add_(lags_CF[:, : taps_CK.shape[1]], alpha=1.0 / padded)
            if grad_skip is not None and own is not None:
                grad_skip[block[1]] += own
        return outs[0], grad_filter, grad_skip, outs[1], outs[2]


def _block_gradients(
    padded: int,
    need_filter: bool,
    taps_CK: Tensor,
    skip_C: Tensor | None,
    tokens: Sequence[Tensor | None],
    outs: Sequence[Tensor | None],
) -> tuple[Tensor | None, Tensor | None]:
    """Writes the gradients of u and gates to `outs`; returns those of the taps, times F, and of the skip.

    `tokens` are u, both gates and the gradient of y.
    """
    u, first, last, grad = tokens
    out, out_first, out_last = outs
    assert u is not None and grad is not None and out is not None
    taps_CM = torch.fft.rfft(taps_CK, padded)
    grad_BCM = torch.fft.rfft(to_rows(grad, last, padded))
    v_BCM = torch.fft.rfft(to_rows(u, first, padded)) if need_filter or last is not None else None
    lags_CM = multiply_spectra_(taps_CM, grad_BCM, v_BCM, with_y=last is not None, with_lags=need_filter)
    lags_CF = None if lags_CM is None else torch.fft.irfft(lags_CM, padded, norm="forward")
    y_BCF = None if last is None or v_BCM is None else torch.fft.irfft(v_BCM, padded, norm="forward")
    del v_BCM
    grad_BCF = torch.fft.irfft(grad_BCM, padded, norm="forward")
    own = to_token_gradients((grad_BCF, y_BCF), (u, first, last, grad), skip_C, (out, out_first, out_last))
    return lags_CF, own
