"""Long causal convolution by FFT (transform.py), in blocks of channels, with spectra recomputed in the backward.

A sequence of L tokens and a filter of K taps have a product of L + K - 1, which must not wrap around: spectra are twice
as large as the signal, and autograd would keep three of them per channel. Here the backward computes them again, and
both passes take a few channels at a time, so that the extra memory does not grow with their number. Gates before and
behind the convolution are multiplied block by block too, so that no product of the sequence's size is ever stored.
Documents are convolved one by one, those of similar length together.

Legend: B batch, L length, D channels, C channels of a block, K taps, R documents of one length class, S a spectrum's
numbers.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..autograd import first_order
from ..documents import document_ranges
from .transform import Transform

# Values of products in work at a time: an array or two of as many numbers fit a core's cache, and there are rows enough
# for the FFT library, which plans every call anew.
_BLOCK_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class _Pieces:
    """Documents (row, start, stop) that share one transform; their products have at most `values` numbers."""

    ranges: tuple[tuple[int, int, int], ...]
    longest: int
    values: int

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
        classes.append(_Pieces(tuple(ranges), longest, longest + min(taps, longest) - 1))
    return classes


def _work(classes: list[_Pieces], x_BLD: Tensor, dtype: torch.dtype) -> Iterator[tuple[_Pieces, slice, Transform]]:
    """Documents and channels in blocks of bounded size."""
    channels = x_BLD.shape[2]
    for pieces in classes:
        transform = Transform(pieces.values, dtype, x_BLD.device)
        rows = max(1, _BLOCK_ELEMENTS // pieces.values)
        for first in range(0, len(pieces.ranges), rows):
            part = _Pieces(pieces.ranges[first : first + rows], pieces.longest, pieces.values)
            block = max(1, rows // len(part.ranges))
            for channel in range(0, channels, block):
                yield part, slice(channel, min(channel + block, channels)), transform


def _inverse(transform: Transform, product_RCS: Tensor, x_RCL: Tensor, skip_C1: Tensor | None) -> Tensor:
    """What the product of spectra stands for, and the direct term of x."""
    y_RCL = transform.backward(product_RCS, x_RCL.shape[2])
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
        batch, length, _ = u_BLD.shape
        ctx.save_for_backward(u_BLD, filter_DK, skip, input_gate, gate)
        ctx.classes = _classes(starts_BL, batch, length, filter_DK.shape[1]) if u_BLD.numel() else []
        y_BLD = torch.empty_like(u_BLD, memory_format=torch.contiguous_format)
        for pieces, block, transform in _work(ctx.classes, u_BLD, filter_DK.dtype):
            v_RCL = pieces.gather(u_BLD, block, filter_DK.dtype, input_gate)
            spectrum_RCS = transform.forward(v_RCL)
            spectrum_RCS *= transform.forward(filter_DK[block, : pieces.longest])
            y_RCL = _inverse(transform, spectrum_RCS, v_RCL, None if skip is None else skip[block, None])
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
        for pieces, block, transform in _work(ctx.classes, u_BLD, filter_DK.dtype):
            taps, skip_C1 = filter_DK[block, : pieces.longest], None if skip is None else skip[block, None]
            taps_CS = transform.forward(taps)
            grad_RCL = pieces.gather(grad_BLD, block, filter_DK.dtype, gate)
            grad_RCS = transform.forward(grad_RCL)
            grad_v_RCL = _inverse(transform, taps_CS.conj() * grad_RCS, grad_RCL, skip_C1)
            pieces.scatter(grad_v_RCL, grad_u, block, input_gate)
            if grad_input_gate is not None:
                pieces.scatter(grad_v_RCL, grad_input_gate, block, u_BLD)
            if grad_gate is None and grad_skip is None and not ctx.needs_input_grad[1]:
                continue
            v_RCL = pieces.gather(u_BLD, block, filter_DK.dtype, input_gate)
            v_RCS = transform.forward(v_RCL)
            if grad_gate is not None:
                y_RCL = _inverse(transform, taps_CS * v_RCS, v_RCL, skip_C1)
                pieces.scatter(y_RCL, grad_gate, block, grad_BLD)
            if grad_skip is not None:
                grad_skip[block] += (v_RCL * grad_RCL).sum((0, 2))
            if ctx.needs_input_grad[1]:
                grad_RCS.mul_(v_RCS.conj_physical_())
                grad_filter[block, : pieces.longest] += transform.backward(grad_RCS.sum(0), taps.shape[1])
        return grad_u, grad_filter, grad_skip, None, grad_input_gate, grad_gate
