"""Short causal convolution as shifted additions, in blocks of tokens that stay in cache.

The operation moves memory and hardly computes: one pass over x and y is the aim, and one pass over the whole sequence
for every tap would be W of them. A block reads its own tokens and the W-1 before them (from the halo at the left
edge). Where a document begins, a tap that would reach back over it is dropped.

Legend: B batch, T tokens, D channels, W taps, S tokens of a block.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import first_order
from ..documents import document_age

_BLOCK_ELEMENTS = 1 << 16


def _blocks(x_BTD: Tensor) -> Iterator[tuple[int, int]]:
    batch, length, channels = x_BTD.shape
    size = max(32, _BLOCK_ELEMENTS // max(batch * channels, 1))
    if x_BTD.device.type != "cpu":
        size = max(length, 1)
    for start in range(0, length, size):
        yield start, min(start + size, length)


def _reaching_back(starts_BT: Tensor | None, width: int) -> tuple[Tensor | None, Tensor | None]:
    """Age of each token in its document, and for each token whether any tap crosses a document's start."""
    if starts_BT is None:
        return None, None
    age_BT = document_age(starts_BT)
    return age_BT, (age_BT < width - 1).any(0)


class ShortConvolution(torch.autograd.Function):
    """Shift-add convolution; taps and bias have the dtype of the computation, x, halo and y their own."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTD: Tensor,
        weight_DW: Tensor,
        bias: Tensor | None,
        halo: Tensor,
        starts_BT: Tensor | None,
        silu: bool,
    ) -> Tensor:
        ctx.save_for_backward(x_BTD, weight_DW, bias, halo, starts_BT)
        ctx.silu = silu
        y_BTD = torch.empty_like(x_BTD, memory_format=torch.contiguous_format)
        walk = _Walk(x_BTD, weight_DW, bias, halo, starts_BT)
        for start, stop in _blocks(x_BTD):
            out_BSD = y_BTD[:, start:stop]
            sum_BSD = out_BSD if out_BSD.dtype == walk.dtype else torch.empty_like(out_BSD, dtype=walk.dtype)
            walk.convolve(start, stop, sum_BSD)
            if silu:
                F.silu(sum_BSD, inplace=True)
            if sum_BSD is not out_BSD:
                out_BSD.copy_(sum_BSD)
        return y_BTD

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BTD,) = grads
        x_BTD, weight_DW, bias, halo, starts_BT = ctx.saved_tensors
        walk = _Walk(x_BTD, weight_DW, bias, halo, starts_BT)
        width = weight_DW.shape[1]
        # Gradients of the halo and of x side by side: a tap's gradient goes to the token it read, wherever that lies.
        shape = (x_BTD.shape[0], width - 1 + x_BTD.shape[1], x_BTD.shape[2])
        grad_extended = grad_BTD.new_zeros(shape, dtype=walk.dtype)
        grad_taps_WD = torch.zeros_like(walk.taps_WD)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for start, stop in _blocks(x_BTD):
            grad_BSD = grad_BTD[:, start:stop].to(walk.dtype)
            if ctx.silu:
                before_BSD = walk.convolve(start, stop, torch.empty_like(grad_BSD))
                grad_BSD = torch.ops.aten.silu_backward(grad_BSD, before_BSD)
            if grad_bias is not None:
                grad_bias += grad_BSD.sum((0, 1))
            for j in range(width):
                source = walk.source(start, stop, j)
                grad_tap_BSD = grad_BSD if (keep := walk.keep(start, stop, j)) is None else grad_BSD * keep
                grad_taps_WD[j] += (source * grad_tap_BSD).sum((0, 1))
                first = width - 1 + start - j
                grad_extended[:, first : first + stop - start].addcmul_(grad_tap_BSD, walk.taps_WD[j])
        grad_halo, grad_x = grad_extended.to(x_BTD.dtype).split((width - 1, x_BTD.shape[1]), 1)
        return grad_x, grad_taps_WD.flip(0).t(), grad_bias, grad_halo, None, None


class _Walk:
    """Reads the token `j` places back, for blocks of tokens, from x or from the halo."""

    def __init__(
        self, x_BTD: Tensor, weight_DW: Tensor, bias: Tensor | None, halo: Tensor, starts_BT: Tensor | None
    ) -> None:
        self.x_BTD, self.bias, self.halo = x_BTD, bias, halo
        self.taps_WD = weight_DW.t().flip(0).contiguous()  # taps_WD[j] multiplies the token j places back
        self.dtype, self.width = weight_DW.dtype, weight_DW.shape[1]
        self.age_BT, crossing_T = _reaching_back(starts_BT, self.width)
        self.crossing = [False] if crossing_T is None else crossing_T.tolist()

    def source(self, start: int, stop: int, j: int) -> Tensor:
        if start >= j:
            return self.x_BTD[:, start - j : stop - j].to(self.dtype)
        from_halo = self.halo[:, self.width - 1 + start - j : min(self.width - 1, self.width - 1 + stop - j)]
        return torch.cat((from_halo, self.x_BTD[:, : max(stop - j, 0)]), 1).to(self.dtype)

    def keep(self, start: int, stop: int, j: int) -> Tensor | None:
        """(B or 1, S, 1) of zeros and ones, or None where no token of the block loses tap j."""
        if self.age_BT is None or j == 0 or not any(self.crossing[start:stop]):
            return None
        return (self.age_BT[:, start:stop, None] >= j).to(self.dtype)

    def convolve(self, start: int, stop: int, out_BSD: Tensor) -> Tensor:
        torch.mul(self.source(start, stop, 0), self.taps_WD[0], out=out_BSD)
        for j in range(1, self.width):
            source, keep = self.source(start, stop, j), self.keep(start, stop, j)
            out_BSD.addcmul_(source if keep is None else source * keep, self.taps_WD[j])
        return out_BSD if self.bias is None else out_BSD.add_(self.bias)
