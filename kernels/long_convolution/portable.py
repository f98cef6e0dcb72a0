"""Long causal convolution by real FFT, in blocks of channels, with spectra recomputed in the backward.

A sequence of L tokens and a filter of K taps are padded to at least L + K - 1 so that nothing wraps around. Spectra are
complex and twice as long as the signal: autograd would keep three of them per channel. Here the backward computes
them again, and both passes take a few channels at a time, so that the extra memory does not grow with their number.
Gates before and behind the convolution are multiplied block by block too, so that no product of the sequence's size is
ever stored. Documents are convolved one by one, those of similar length together.

Legend: B batch, L length, D channels, C channels of a block, K taps, R documents of one length class, F padded length.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..autograd import first_order
from ..documents import document_ranges

# Padded signal elements in work at a time; but never fewer rows than these: the FFT library plans every call anew,
# which costs as much as transforming five rows.
_BLOCK_ELEMENTS = 1 << 19
_LEAST_ROWS = 8


def fast_length(minimum: int) -> int:
    """The smallest 2^a 3^b 5^c, with a of at least 1, that is not below `minimum`: lengths that FFTs like."""
    best = 2
    while best < minimum:
        best *= 2
    five = 1
    while five < best:
        three = five
        while three < best:
            two = 2 * three
            while two < minimum:
                two *= 2
            best = min(best, two)
            three *= 3
        five *= 5
    return best


@dataclass(frozen=True)
class _Pieces:
    """Documents (row, start, stop) that share one padded length."""

    ranges: tuple[tuple[int, int, int], ...]
    longest: int
    padded: int

    def gather(self, x_BLD: Tensor, channels: slice, dtype: torch.dtype, factor_BLD: Tensor | None = None) -> Tensor:
        """(R, C, longest), zero behind the end of each document; times a factor, multiplied as tokens lie in memory."""
        if len(self.ranges) == x_BLD.shape[0] and all(stop - start == x_BLD.shape[1] for _, start, stop in self.ranges):
            return _product(x_BLD, factor_BLD, (..., channels), dtype).transpose(1, 2).contiguous()
        width = len(range(*channels.indices(x_BLD.shape[2])))
        out = x_BLD.new_zeros(len(self.ranges), width, self.longest, dtype=dtype)
        for index, (row, start, stop) in enumerate(self.ranges):
            part = (row, slice(start, stop), channels)
            out[index, :, : stop - start] = _product(x_BLD, factor_BLD, part, dtype).t()
        return out

    def scatter(self, y_RCL: Tensor, out_BLD: Tensor, channels: slice, factor_BLD: Tensor | None = None) -> None:
        """Write y, times a factor, where its tokens belong."""
        for index, (row, start, stop) in enumerate(self.ranges):
            part, y_TC = (row, slice(start, stop), channels), y_RCL[index, :, : stop - start].t()
            if factor_BLD is None:
                out_BLD[part] = y_TC
            else:
                torch.mul(y_TC, factor_BLD[part], out=out_BLD[part])


def _product(x_BLD: Tensor, factor_BLD: Tensor | None, part: tuple, dtype: torch.dtype) -> Tensor:
    x = x_BLD[part].to(dtype)
    return x if factor_BLD is None else x * factor_BLD[part]


def _classes(starts_BL: Tensor | None, batch: int, length: int, taps: int) -> list[_Pieces]:
    """All documents of all rows, grouped by length rounded up to a power of two."""
    rows = document_ranges(starts_BL, length)
    by_class: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for row in range(batch):
        for start, stop in rows[row if len(rows) > 1 else 0]:
            by_class[(stop - start - 1).bit_length()].append((row, start, stop))
    classes = []
    for ranges in by_class.values():
        longest = max(stop - start for _, start, stop in ranges)
        classes.append(_Pieces(tuple(ranges), longest, fast_length(longest + min(taps, longest) - 1)))
    return classes


def _work(classes: list[_Pieces], channels: int) -> Iterator[tuple[_Pieces, slice]]:
    """Documents and channels in blocks of bounded size."""
    for pieces in classes:
        rows = max(_LEAST_ROWS, _BLOCK_ELEMENTS // pieces.padded)
        for first in range(0, len(pieces.ranges), rows):
            part = _Pieces(pieces.ranges[first : first + rows], pieces.longest, pieces.padded)
            block = max(1, rows // len(part.ranges))
            for channel in range(0, channels, block):
                yield part, slice(channel, min(channel + block, channels))


def _inverse(product_RCF: Tensor, padded: int, x_RCL: Tensor, skip_C1: Tensor | None) -> Tensor:
    """What the product of spectra stands for, and the direct term of x."""
    y_RCL = torch.fft.irfft(product_RCF, padded)[..., : x_RCL.shape[2]]
    return y_RCL if skip_C1 is None else y_RCL.addcmul_(x_RCL, skip_C1)


class LongConvolution(torch.autograd.Function):
    """FFT convolution with recomputed spectra; u and gates in any floating dtype, filter and skip in that of the
    computation. What is multiplied with the gates exists for a block of channels at a time only."""

    @staticmethod
    def forward(
        ctx: Any,
        u_BLD: Tensor,
        filter_DK: Tensor,
        skip: Tensor | None,
        starts_BL: Tensor | None,
        input_gate: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        batch, length, channels = u_BLD.shape
        ctx.save_for_backward(u_BLD, filter_DK, skip, input_gate, gate)
        ctx.classes = _classes(starts_BL, batch, length, filter_DK.shape[1]) if u_BLD.numel() else []
        y_BLD = torch.empty_like(u_BLD, memory_format=torch.contiguous_format)
        for pieces, block in _work(ctx.classes, channels):
            v_RCL = pieces.gather(u_BLD, block, filter_DK.dtype, input_gate)
            spectrum_RCF = torch.fft.rfft(v_RCL, pieces.padded)
            spectrum_RCF *= torch.fft.rfft(filter_DK[block, : pieces.longest], pieces.padded)
            y_RCL = _inverse(spectrum_RCF, pieces.padded, v_RCL, None if skip is None else skip[block, None])
            pieces.scatter(y_RCL, y_BLD, block, gate)
        return y_BLD

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BLD,) = grads
        u_BLD, filter_DK, skip, input_gate, gate = ctx.saved_tensors
        grad_u = torch.empty_like(u_BLD, memory_format=torch.contiguous_format)
        grad_input_gate, grad_gate = (
            None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in (input_gate, gate)
        )
        grad_filter = torch.zeros_like(filter_DK)
        grad_skip = None if skip is None else torch.zeros_like(skip)
        for pieces, block in _work(ctx.classes, u_BLD.shape[2]):
            taps, skip_C1 = filter_DK[block, : pieces.longest], None if skip is None else skip[block, None]
            taps_CF = torch.fft.rfft(taps, pieces.padded)
            grad_RCL = pieces.gather(grad_BLD, block, filter_DK.dtype, gate)
            grad_RCF = torch.fft.rfft(grad_RCL, pieces.padded)
            grad_v_RCL = _inverse(taps_CF.conj() * grad_RCF, pieces.padded, grad_RCL, skip_C1)
            pieces.scatter(grad_v_RCL, grad_u, block, input_gate)
            if grad_input_gate is not None:
                pieces.scatter(grad_v_RCL, grad_input_gate, block, u_BLD)
            if grad_gate is None and grad_skip is None and not ctx.needs_input_grad[1]:
                continue
            v_RCL = pieces.gather(u_BLD, block, filter_DK.dtype, input_gate)
            v_RCF = torch.fft.rfft(v_RCL, pieces.padded)
            if grad_gate is not None:
                y_RCL = _inverse(taps_CF * v_RCF, pieces.padded, v_RCL, skip_C1)
                pieces.scatter(y_RCL, grad_gate, block, grad_BLD)
            if grad_skip is not None:
                grad_skip[block] += (v_RCL * grad_RCL).sum((0, 2))
            if ctx.needs_input_grad[1]:
                grad_RCF.mul_(v_RCF.conj_physical_())
                lags_CF = torch.fft.irfft(grad_RCF.sum(0), pieces.padded)
                grad_filter[block, : pieces.longest] += lags_CF[:, : taps.shape[1]]
        return grad_u, grad_filter, grad_skip, None, grad_input_gate, grad_gate
