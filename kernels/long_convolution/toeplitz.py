"""Causal convolution of each channel with some tens to hundreds of taps, as products with Toeplitz matrices.

The tokens of a channel are laid out in rows of Q. What a row's tokens give each other is a product with a Toeplitz
matrix of the filter, what spills over from the row j places before a product with another: y_r = sum_j x_{r-j} T_j,
T_j[s, t] = filter at lag j Q + t - s. With Q of at least W - 1 there are two matrices, the two-stage form of
StripedHyena 2 (arXiv 2503.01868; github.com/Zymrael/savanna); shorter rows need more of them and waste fewer products
on zeros. A document begins a row of its own and takes nothing from the rows before.

`short_convolution` and `long_convolution` come here for filters of medium width; models use those.

Legend: B batch, T tokens, D channels, W taps, E tokens of a segment and the W - 1 before it, R rows of Q tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import triton_support
from ..autograd import first_order, own_precision
from .toeplitz_products import PortableProducts, Products
from .toeplitz_rows import IndexedRows, PlainRows, Rows

WIDEST = 256  # taps; for more a Fourier transform takes fewer operations
_SEGMENT_ELEMENTS = 1 << 20  # of a segment's tokens on a CPU: rows, outputs and gradients stay in cache


def _products(x_BTD: Tensor, taps_DW: Tensor) -> Products:
    if triton_support.takes(x_BTD, taps_DW):
        from .triton_toeplitz import TritonProducts

        return TritonProducts(taps_DW, x_BTD.dtype)
    return PortableProducts(taps_DW)


@dataclass(frozen=True)
class _Segments:
    """Stretches of tokens, how they lie in rows, and the W - 1 tokens before them."""

    x_BTD: Tensor
    halo: Tensor
    starts_BT: Tensor | None
    products: Products

    def __iter__(self) -> Iterator[tuple[int, int, Rows]]:
        batch, length, channels = self.x_BTD.shape
        before, row, spill = self.halo.shape[1], self.products.row, self.products.spill
        elements = _SEGMENT_ELEMENTS if self.x_BTD.device.type == "cpu" else _SEGMENT_ELEMENTS << 8
        size = max(4, elements // max(1, batch * channels * row)) * row
        ranges = [(start, min(start + size, length)) for start in range(0, length, size)]
        starts_BE, has_start = None, [False] * len(ranges)
        if self.starts_BT is not None and ranges:
            starts_BE = F.pad(self.starts_BT, (before, 0))
            has_start = torch.stack([starts_BE[:, start : stop + before].any() for start, stop in ranges]).tolist()
        for (start, stop), mixed in zip(ranges, has_start, strict=True):
            shape = (batch, stop - start, before)
            if starts_BE is not None and mixed:
                yield start, stop, IndexedRows.of(shape, row, spill, starts_BE[:, start : stop + before])
            else:
                yield start, stop, PlainRows(shape, row, spill)

    def rows_of_x(self, start: int, stop: int, rows: Rows) -> Tensor:
        """Tokens start - (W - 1) .. stop, from the halo where x has none."""
        before = self.halo.shape[1]
        if start >= before:
            x_BED = self.x_BTD[:, start - before : stop]
        else:
            x_BED = torch.cat((self.halo[:, start:], self.x_BTD[:, :stop]), 1)
        return rows.of_inputs(x_BED.to(self.products.dtype))


class ToeplitzConvolution(torch.autograd.Function):
    """y_t = sum_k taps[:, k] x_{t-k} with taps (D, W) by lag in the dtype of the computation; halo (B, W - 1, D)."""

    @staticmethod
    @own_precision
    def forward(ctx: Any, x_BTD: Tensor, taps_DW: Tensor, halo: Tensor, starts_BT: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_BTD, taps_DW, halo, starts_BT)
        products = _products(x_BTD, taps_DW)
        segments = _Segments(x_BTD, halo, starts_BT, products)
        y_BTD = torch.empty_like(x_BTD, memory_format=torch.contiguous_format)
        for start, stop, rows in segments:
            y_DRQ = products.forward(segments.rows_of_x(start, stop, rows), rows.depth_R)
            y_BTD[:, start:stop] = rows.to_outputs(y_DRQ)
        return y_BTD

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BTD,) = grads
        x_BTD, taps_DW, halo, starts_BT = ctx.saved_tensors
        products, before = _products(x_BTD, taps_DW), halo.shape[1]
        segments = _Segments(x_BTD, halo, starts_BT, products)
        # Gradients of halo and x side by side: what a segment reads before its begin belongs to the one before it.
        grad_extended = taps_DW.new_zeros(x_BTD.shape[0], before + x_BTD.shape[1], x_BTD.shape[2])
        grad_taps = torch.zeros_like(taps_DW)
        for start, stop, rows in segments:
            grad_DRQ = rows.of_outputs(grad_BTD[:, start:stop].to(products.dtype))
            grad_extended[:, start : stop + before] += rows.to_inputs(products.to_inputs(grad_DRQ, rows.depth_R))
            if ctx.needs_input_grad[1]:
                grad_taps += products.to_taps(segments.rows_of_x(start, stop, rows), grad_DRQ, rows.depth_R)
        grad_halo, grad_x = grad_extended.to(x_BTD.dtype).split((before, x_BTD.shape[1]), 1)
        return grad_x, grad_taps, grad_halo, None
